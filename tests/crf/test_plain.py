"""The plain call compared with the sum over all pairs, and pruning compared with no pruning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import (
    CRFParams,
    buffers,
    host_lattice,
    lattice_design,
    mean_field,
    mean_field_features,
    plain,
    ready,
    unary_from_probabilities,
)  # fmt: skip

PARAMS = CRFParams(4.0, 20.0, 10.0, 3.0, 2.0)


def photograph(height, width, labels=5, seed=0):
    """Blocks of colour with noise, and scores that know a block's label most of the time."""
    rng = np.random.default_rng(seed)
    grow = lambda x: np.asarray(x).repeat(12, 0).repeat(12, 1)[:height, :width]  # noqa: E731
    blocks = rng.integers(0, 255, (-(-height // 12), -(-width // 12), 3))
    image = np.clip(grow(blocks) + rng.normal(0, 6, (height, width, 3)), 0, 255).astype(np.uint8)
    truth = grow(rng.integers(0, labels, blocks.shape[:2]))
    logits = 1.5 * np.eye(labels)[truth] + rng.normal(0, 1, (height, width, labels))
    return jnp.asarray(-jax.nn.log_softmax(jnp.asarray(logits, jnp.float32))), image


@pytest.fixture(scope="module")
def all_pairs():
    unary, image = photograph(50, 60)
    run = lambda n: np.asarray(mean_field(unary, image, PARAMS, 5, bilateral="exact", normalization=n))  # noqa: E731
    return unary, image, {normalization: run(normalization) for normalization in ("symmetric", "after")}


@pytest.mark.parametrize("form", ["direct", "axes", "dense"])
def test_each_form_is_close_to_all_pairs(form, all_pairs, monkeypatch):
    unary, image, wanted = all_pairs
    build = host_lattice.build
    monkeypatch.setattr(host_lattice, "build", lambda features, points=None: build(features, form))
    for normalization, exact in wanted.items():
        options = {"bilateral": "permutohedral", "normalization": normalization}
        ours = np.asarray(mean_field(unary, image, PARAMS, 5, **options))
        assert (np.argmin(unary, -1) != exact.argmax(-1)).mean() > 0.1  # the CRF has something to do
        assert (ours.argmax(-1) != exact.argmax(-1)).mean() <= 0.01
        assert np.abs(ours - exact).mean() < 0.005


def test_another_size_compiles_nothing():
    """From a host's probabilities to marginals: any operation of JAX on a whole array would be a program."""
    sizes = (64, 72), (66, 70), (72, 64), (40, 120)
    given = [photograph(*size) for size in sizes]
    compiled = []

    def listen(event, _, **about):
        if event.endswith("backend_compile_duration"):
            compiled.append(about)

    def marginals(unary, image):
        unary = unary_from_probabilities(np.exp(-np.asarray(unary)))
        return mean_field(unary, image, PARAMS, 2, bilateral="permutohedral", mask=np.ones(unary.shape[:2]))

    marginals(*given[0])
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for size, (unary, image) in zip(sizes[1:], given[1:], strict=True):
            assert marginals(unary, image).shape == (*size, 5)
        assert not compiled
        assert (jnp.ones((41, 43)) + 1).shape == (41, 43)
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("form", ["direct", "axes"])
def test_no_pass_copies_a_buffer(form, monkeypatch):
    """An update of a buffer that is also read later would have XLA copy it, once for each pass."""
    build, run, arguments = host_lattice.build, ready.run, []
    monkeypatch.setattr(host_lattice, "build", lambda features, points=None: build(features, form))
    monkeypatch.setattr(ready, "run", lambda *given: arguments.extend(given) or given[0])
    mean_field(*photograph(30, 40), PARAMS, 2, bilateral="permutohedral")
    text = run.lower(*arguments).compile().as_text()
    before_main, main = text.split("ENTRY", 1)
    assert "while(" in before_main and "while(" in main
    places, labels = arguments[0].shape
    sizes = [f"[{n}," for n in (places, *(kernel.neighbors.shape[2] for kernel in arguments[1]))]
    sizes.append(f"[{(places + 2 * arguments[2].margin) * labels}]")
    assert not [line for line in before_main.splitlines() if " copy(" in line and any(size in line for size in sizes)]


@pytest.mark.parametrize("form", ["direct", "axes"])
@pytest.mark.parametrize("normalization", ["symmetric", "after", "none"])
def test_a_crowded_vertex_neither_overflows_nor_hides_a_lonely_one(form, normalization, monkeypatch):
    """Values between vertices are float16, which ends at 65504: 60,000 equal points beside four scattered ones."""
    build = host_lattice.build
    monkeypatch.setattr(host_lattice, "build", lambda features, points=None: build(features, form))
    monkeypatch.setattr(lattice_design, "SMALL", 0)  # two lattices for either number of points
    monkeypatch.setattr(host_lattice, "THIRD", 0)
    rng = np.random.default_rng(2)
    unary = rng.normal(size=(60_004, 3)).astype(np.float32)
    features = np.zeros((60_004, 2), np.float32)
    features[:4] = [[30, 0], [30, 1], [0, 30], [31, 30]]
    weight = 1e-3 if normalization == "none" else 2.0
    run = lambda u, f, w: mean_field_features(  # noqa: E731
        u, [(f, w)], 3, bilateral="permutohedral", normalization=normalization
    )
    crowded = np.asarray(run(unary, features, weight))
    np.testing.assert_allclose(crowded.sum(-1), 1, atol=1e-5)
    if normalization == "none":
        assert (crowded[4:].argmax(-1) == np.bincount(crowded[4:].argmax(-1)).argmax()).all()  # 60 votes against noise
    else:
        q = jax.nn.softmax(-unary[4:])
        for _ in range(3):  # all alike: each hears the mean
            q = jax.nn.softmax(-unary[4:] + weight * q.mean(0))
        np.testing.assert_allclose(crowded[4:], q, atol=2e-3)
    lonely = run(unary[:4], features[:4], weight)
    np.testing.assert_allclose(crowded[:4], lonely, atol=2e-3)


def test_padding_does_not_choose_the_form(monkeypatch):
    """A photograph is filtered in the same way alone and, with a mask, inside a larger one."""
    unary, image = photograph(60, 70)
    forms, build = [], host_lattice.build

    def noted(features, form="auto", points=None):
        found = build(features, form, points)
        forms.append((found[0], found[1][0].count / (points or len(features))))
        return found

    monkeypatch.setattr(host_lattice, "build", noted)
    monkeypatch.setattr(host_lattice, "DENSE_UP_TO", 1)
    monkeypatch.setattr(lattice_design, "FEW_IN_ALL", 1)
    run = lambda u, i, **options: mean_field(u, i, PARAMS, 3, bilateral="permutohedral", **options)  # noqa: E731
    monkeypatch.setitem(lattice_design.FEW, 65_536, 0.0)
    run(unary, image)
    monkeypatch.setitem(
        lattice_design.FEW, 65_536, 0.9 * forms.pop()[1]
    )  # below the photograph's number, above half of it
    mask = np.zeros((100, 100), bool)
    mask[:60, :70] = True
    wide = np.pad(unary, ((0, 40), (0, 30), (0, 0))), np.pad(image, ((0, 40), (0, 30), (0, 0)))
    np.testing.assert_allclose(run(*wide, mask=mask)[:60, :70], run(unary, image), atol=1e-5)
    assert [form for form, _ in forms] == ["direct", "direct"]


def test_batch_mask_and_history():
    unary, image = photograph(30, 40)
    one = mean_field(unary, image, PARAMS, 3, bilateral="permutohedral")
    two = mean_field(jnp.stack([unary] * 2), np.stack([image] * 2), PARAMS, 3, bilateral="permutohedral")
    np.testing.assert_array_equal(two[1], one)
    history = mean_field(unary, image, PARAMS, 3, bilateral="permutohedral", return_all=True)
    np.testing.assert_allclose(history[0], jax.nn.softmax(-unary), atol=1e-6)
    np.testing.assert_array_equal(history[3], one)
    some = mean_field(unary, image, PARAMS, 3, bilateral="permutohedral", return_all=[3, 0])
    np.testing.assert_array_equal(some, history[np.array([3, 0])])
    mask = np.zeros((36, 45), bool)
    mask[:30, :40] = True
    wide = np.pad(unary, ((0, 6), (0, 5), (0, 0))), np.pad(image, ((0, 6), (0, 5), (0, 0)))
    masked = mean_field(*wide, PARAMS, 3, bilateral="permutohedral", mask=mask)
    np.testing.assert_allclose(masked[:30, :40], one, atol=1e-4)
    np.testing.assert_allclose(masked[30:], 0.2, atol=1e-6)


@pytest.mark.parametrize("labels", [5, 12])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_under_the_mask_does_not_matter(value, labels):
    unary, image = photograph(30, 40, labels)
    mask = np.ones((30, 40), bool)
    mask[:, 33:] = False
    options = plain.Options(bilateral="permutohedral", iterations=3, radius=(9, 9))
    run = lambda u: plain.image_marginals(u, image, PARAMS, None, mask, (), (), options)  # noqa: E731
    spoiled = np.where(mask[..., None], unary, value).astype(np.float32)
    plainly = np.where(mask[..., None], unary, 0).astype(np.float32)
    np.testing.assert_array_equal(run(spoiled), run(plainly))


def test_leaving_labels_out_changes_few_labels():
    unary, image = photograph(60, 60, labels=12)
    unary = unary.at[..., 5:].add(6.0)
    whole, pruned = (mean_field(unary, image, PARAMS, 5, bilateral="permutohedral", prune=p) for p in (False, None))
    np.testing.assert_allclose(pruned.sum(-1), 1, atol=1e-5)
    assert float(jnp.abs(whole - pruned).max()) > 0
    assert (whole.argmax(-1) != pruned.argmax(-1)).mean() <= 0.0005


def test_points_with_several_kernels(definition):
    rng = np.random.default_rng(1)
    unary = rng.normal(size=(300, 3)).astype(np.float32)
    kernels = [(rng.uniform(0, 3, (300, d)).astype(np.float32), w) for d, w in ((2, 2.0), (4, 1.0))]
    ours = np.asarray(mean_field_features(unary, kernels, 4, bilateral="permutohedral"))
    wanted = definition.mean_field(unary, [(definition.kernel(f), w) for f, w in kernels], 4, "symmetric")
    assert (ours.argmax(-1) != wanted.argmax(-1)).mean() <= 0.02
    (found,) = mean_field_features(unary, kernels, 4, bilateral="permutohedral", return_all=[4])
    np.testing.assert_array_equal(found, ours)


def test_every_lattice_counts_alike_where_kernels_have_different_numbers_of_them(monkeypatch):
    """One iteration is the last one, with the mean of all lattices; three of one kernel, two of the other."""
    rng = np.random.default_rng(3)
    unary = rng.normal(size=(400, 3)).astype(np.float32)
    features = [rng.uniform(0, 4, (400, 2)).astype(np.float32) for _ in range(2)]
    build = host_lattice.build
    few = lambda f, points=None: ("direct", build(f, "direct")[1][: 3 if f[0, 0] == features[0][0, 0] else 2])  # noqa: E731
    monkeypatch.setattr(host_lattice, "build", few)
    kernels = list(zip(features, (3.0, 2.0), strict=True))
    ours = mean_field_features(unary, kernels, 1, bilateral="permutohedral", normalization="after")
    q = np.exp(-unary) / np.exp(-unary).sum(-1, keepdims=True)
    logits = -unary
    for f, weight in kernels:
        heard, sums = 0, 0
        for lattice in few(f)[1]:
            splat = np.zeros((lattice.count, 400))
            for v, w in zip(lattice.vertices.T, lattice.weights.T):
                np.add.at(splat, (v, np.arange(400)), w)
            between = np.stack([host_lattice.between(lattice, "direct", e) for e in np.eye(lattice.count)], 1)
            heard, sums = heard + splat.T @ between @ splat @ q, sums + (splat.T @ between @ splat).sum(1)
        logits = logits + weight * heard / sums[:, None]
    np.testing.assert_allclose(ours, jax.nn.softmax(logits), atol=2e-4)


def test_vertices_may_fill_their_blocks(monkeypatch):
    """The vertex that stands for none is then in a block of its own, where a larger lattice had values before."""
    rng = np.random.default_rng(4)
    unary = rng.normal(size=(3000, 3)).astype(np.float32)
    features = rng.uniform(0, 20, (3000, 3)).astype(np.float32)
    larger = host_lattice.build(features, "direct")[1][0]
    smaller = host_lattice.build(features / 4, "direct")[1][1]
    assert larger.count > buffers.POINTS > smaller.count

    def with_idle_vertices(count):
        neighbors = np.full((len(smaller.neighbors), count), count, np.int32)
        neighbors[:, : smaller.count] = np.where(smaller.neighbors == smaller.count, count, smaller.neighbors)
        idle = dataclasses.replace(smaller, neighbors=neighbors, count=count)
        monkeypatch.setattr(host_lattice, "build", lambda features, points=None: ("direct", [larger, idle]))
        return mean_field_features(unary, [(features, 2.0)], 4, bilateral="permutohedral")

    np.testing.assert_array_equal(with_idle_vertices(buffers.POINTS), with_idle_vertices(buffers.POINTS - 5))


@pytest.mark.parametrize("labels", [2, 8, 16])
def test_softmax_of_either_form(labels):
    x = np.random.default_rng(0).normal(0, 30, (50, labels)).astype(np.float32)
    np.testing.assert_allclose(ready._softmax(x), jax.nn.softmax(x, axis=-1), atol=1e-6)


def test_a_wide_smoothness_kernel_takes_its_taps_in_groups():
    """Radius 36: three groups of taps, and a gap between rows wider than the photograph."""
    unary, image = photograph(24, 30)
    params = CRFParams(1e-6, 20.0, 10.0, 3.0, 8.0)
    ours, exact = (mean_field(unary, image, params, 3, bilateral=b) for b in ("permutohedral", "exact"))
    np.testing.assert_allclose(ours, exact, atol=1e-4)


def test_a_jit_and_a_gradient_go_another_way():
    unary, image = photograph(20, 20)
    options = plain.Options(bilateral="permutohedral")
    assert plain.covers(options, unary, image)
    seen = []
    jax.jit(lambda u: seen.append(plain.covers(options, u, image)) or u)(unary)
    jax.jit(lambda u: seen.append(plain.covers(options, unary, image)) or u)(unary)
    jax.grad(lambda u: seen.append(plain.covers(options, u, image)) or u.sum())(unary)
    assert seen == [False] * 3


def test_a_result_is_committed_to_a_device_only_if_an_argument_is():
    """As of any function of JAX: otherwise it could not be added to an array on several devices."""
    unary = np.random.default_rng(0).normal(size=(12, 15, 3)).astype(np.float32)
    image, params = np.zeros((12, 15, 3), np.uint8), CRFParams(3.0, 5.0, 5.0)
    features = np.mgrid[:12, :15].reshape(2, -1).T / 5.0
    there = jax.device_put(unary, jax.devices()[0])
    for held, committed in ((unary, False), (jnp.asarray(unary), False), (there, True)):
        q = mean_field(held, image, params, 2, bilateral="permutohedral")
        points = mean_field_features(held.reshape(-1, 3), [(features, 1.0)], 2, bilateral="permutohedral")
        assert (q.committed, points.committed) == (committed, committed)
