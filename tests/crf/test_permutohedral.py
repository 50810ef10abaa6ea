"""The lattice filter of compiled programs: the host's lattices, sums over all pairs, its keys and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, host_lattice, lattice_design, mean_field, permutohedral, traced_lattice, vertices
from deeplab_jax.target import tracing_for

FORMS = ("direct", "axes")


def _pairs(features):
    squared = ((features[:, None] - features[None]) ** 2).sum(-1)
    return np.exp(-0.5 * squared)


def _built(features, form):
    """Lattices of one form, whatever the number of vertices."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lattice_design, "few", lambda points: {"direct": -1, "axes": 2**30}[form])
        lattice = jax.jit(lambda f: traced_lattice.build(f))(features)  # traced anew
    assert bool(lattice.axes) == (form == "axes")
    return lattice


def _distinct_vertices(features, form="direct"):
    """The number of vertices of each lattice by exact comparison on the host."""
    features = features - features.min(0)
    counts = []
    for n in range(lattice_design.lattices(len(features))):
        matrix, shift = (x.astype(np.float32) for x in lattice_design.embedding(form, features.shape[1], n))
        base, rank, _ = (np.stack(x, -1) for x in jax.jit(traced_lattice._simplices)(features, matrix, shift))
        order = base.shape[1]
        keys = [np.c_[base - (rank > order - 1 - k), np.full(len(base), k)] for k in range(order)]
        counts.append(len(np.unique(np.concatenate(keys), axis=0)))
    return counts


def _host(lattice, form, values):
    """The filter of one of the host's lattices."""
    grid = np.stack(
        [np.bincount(lattice.vertices.ravel(), (lattice.weights * v[:, None]).ravel(), lattice.count) for v in values.T]
    ).astype(np.float32)
    mixed = np.stack([host_lattice.between(lattice, form, g) for g in grid])
    sliced = np.einsum("cnd,nd->nc", mixed[:, lattice.vertices], lattice.weights)
    return sliced * lattice_design.scale(form, lattice.vertices.shape[1] - 1)


def _own(lattice):
    """What a point hears of itself, not scaled: its simplex's vertices, and of each the next and the previous one."""
    weights = np.asarray(lattice.weights)
    side = lattice_design.constants("direct", weights.shape[1] - 1)[1]
    return (weights * (weights + side * (np.roll(weights, 1, 1) + np.roll(weights, -1, 1)))).sum(1).mean(0)


@pytest.fixture
def optimized():
    """The photograph's lattice too takes longer to compile than to run."""


@pytest.fixture(scope="module", params=FORMS)
def case(request):
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 6, (3000, 3)).astype(np.float32)
    return features, rng.uniform(size=(3000, 4)).astype(np.float32), _built(features, request.param)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dimensions", [1, 5, *(pytest.param(d, marks=pytest.mark.long) for d in (2, 3, 4, 6, 7, 8))])
def test_lattices_are_those_that_the_host_builds(dimensions, form):
    """With as many vertices, neighbors included, and the same results."""
    rng = np.random.default_rng(dimensions)
    points = 500 if dimensions < 6 else 60  # there is room for the neighbors of so many
    features = rng.uniform(0, 5, (points, dimensions)).astype(np.float32)
    values = rng.uniform(size=(points, 3)).astype(np.float32)
    ours, (_, host) = _built(features, form), host_lattice.build(features, form)
    assert ours.counts.tolist() == [lattice.count for lattice in host]
    apply = jax.jit(permutohedral.apply)
    for n, lattice in enumerate(host):
        np.testing.assert_allclose(apply(ours, values, n), _host(lattice, form, values), rtol=1e-4, atol=1e-5)
    mean = np.mean([_host(lattice, form, values) for lattice in host], axis=0)
    np.testing.assert_allclose(apply(ours, values), mean, rtol=1e-4, atol=1e-5)


def test_the_form_follows_the_number_of_vertices(monkeypatch):
    features = np.random.default_rng(0).uniform(0, 4, (2000, 3)).astype(np.float32)
    count = int(_built(features, "direct").counts[0])
    for limit, axes in ((count, True), (count - 1, False)):
        monkeypatch.setattr(lattice_design, "few", lambda points, limit=limit: limit)
        assert bool(jax.jit(lambda f: traced_lattice.build(f))(features).axes) == axes


def test_a_lattice_is_widened_as_far_as_there_is_room(monkeypatch):
    """Points far from each other have more neighbors than that; those that are added are joined like the others."""
    monkeypatch.setattr(traced_lattice, "LEAST", 4096)
    monkeypatch.setattr(traced_lattice, "BLOCK", 256)
    features = np.random.default_rng(0).uniform(0, 60, (900, 3)).astype(np.float32)
    lattice = _built(features, "axes")
    count = int(lattice.counts[0])
    assert _distinct_vertices(features, "axes")[0] < lattice.rooms[0] - 256 <= count < lattice.rooms[0]  # full
    near = np.asarray(lattice.neighbors[0])
    for j in range(4):
        ahead = near[2 * j, :count]
        np.testing.assert_array_equal(near[2 * j + 1][ahead[ahead < count]], np.flatnonzero(ahead < count))
        assert (near[2 * j + 1, :count] < count).sum() == (ahead < count).sum() > 0
    sums = np.asarray(permutohedral.apply(lattice, np.ones((900, 1), np.float32)))
    assert sums.min() > 0.3


@pytest.mark.parametrize(("usual", "room", "which"), [(1 / 4, 1808, 0), (2340 / 7200, 2352, 3)])
def test_points_that_touch_more_vertices_than_can_be_blurred_have_the_other_form(usual, room, which, monkeypatch):
    """Also where it shows only in the last lattice; the result is the filter, not zero."""
    features = np.random.default_rng(2).normal(0, 0.6, (900, 7)).astype(np.float32)
    ones = np.ones((900, 1), np.float32)
    direct = _built(features, "direct")
    assert direct.counts[0] <= lattice_design.few(900)
    for name, value in {"LEAST": 256, "BLOCK": 16, "USUAL": usual}.items():
        monkeypatch.setattr(traced_lattice, name, value)
    found = jax.jit(lambda f: traced_lattice.build(f))(features)
    touched = np.array(_distinct_vertices(features, "axes"))
    assert found.rooms[0] == room and np.argmax(touched >= room) == which
    assert not found.axes
    np.testing.assert_array_equal(found.counts, direct.counts)
    sums = np.asarray(permutohedral.apply(found, ones))
    np.testing.assert_allclose(sums, permutohedral.apply(direct, ones), rtol=1e-4)
    assert sums.min() > 0.3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_with_64_bit_types(dtype):
    """Where JAX's integers and floats have 64 bits by default the same comes out."""
    image = np.random.default_rng(0).uniform(0, 255, (12, 15, 3)).astype(np.float32)
    unary = np.random.default_rng(1).uniform(0, 2, (12, 15, 3)).astype(dtype)

    def run(unary):
        return mean_field(unary, image, CRFParams(3.0, 6.0, 60.0, 1.0, 2.0), 3, bilateral="permutohedral")

    compiled = jax.jit(lambda u: run(u))
    plain_in_32, compiled_in_32 = (f(unary.astype(np.float32)) for f in (run, compiled))
    with jax.enable_x64(True):
        plain_call, jitted = run(unary), compiled(unary)
        assert plain_call.dtype == jitted.dtype == dtype
        gradient = jax.eval_shape(jax.grad(lambda u: (run(u) ** 2).sum()), jax.ShapeDtypeStruct(unary.shape, dtype))
    assert gradient.dtype == dtype
    # Of 64 bits the uncompiled call too runs the compiled program.
    np.testing.assert_allclose(plain_call, plain_in_32 if dtype == "float32" else compiled_in_32, atol=1e-4)
    np.testing.assert_allclose(jitted, compiled_in_32, atol=1e-4)


def test_a_lattice_that_ends_with_a_block_hears_nothing_of_another(monkeypatch):
    """The row after its vertices stands for those that do not exist, and holds zeros, whatever was there before."""
    rng = np.random.default_rng(4)
    features, values = rng.uniform(0, 4, (400, 3)).astype(np.float32), rng.uniform(size=(400, 4)).astype(np.float32)
    ones = np.ones((400, 1), np.float32)
    before = _built(features, "axes")
    order = np.argsort(-before.counts)
    wanted = [permutohedral.apply(before, values, n) for n in order]
    assert before.counts[order[0]] > before.counts[order[-1]]
    monkeypatch.setattr(traced_lattice, "BLOCK", int(before.counts[order[-1]]))
    lattice = _built(features, "axes")
    np.testing.assert_array_equal(lattice.counts, before.counts)
    state = permutohedral.start(lattice, 4, lattice.rooms[0])
    for n, one in zip(order, wanted, strict=True):
        state, out = jax.jit(lambda *x: permutohedral.advance(*x))(lattice, state, values, ones, n)
        np.testing.assert_allclose(out, one, rtol=1e-4)


def test_close_to_all_pairs(case):
    features, values, lattice = case
    pairs, apply = _pairs(features), jax.jit(permutohedral.apply)
    exact, out = pairs @ values, np.asarray(apply(lattice, values))
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.03
    sums = np.asarray(apply(lattice, np.ones_like(values)))
    assert abs(np.median(sums[:, 0] / pairs.sum(1)) - 1) < 0.03  # the scale of dense points in three dimensions


def filtered(features, values):
    return permutohedral.apply(permutohedral.build(features), values)


@pytest.mark.parametrize(
    ("dimensions", "points", "side"),
    [
        pytest.param(1, 2000, 20, marks=pytest.mark.long),
        (2, 4000, 10),
        pytest.param(3, 6000, 7, marks=pytest.mark.long),
    ],
)
def test_scale_of_dense_points(dimensions, points, side):
    features = np.random.default_rng(dimensions).uniform(0, side, (points, dimensions)).astype(np.float32)
    out = np.asarray(jax.jit(filtered)(features, np.ones((points, 1), np.float32)))
    exact = _pairs(features).sum(1)
    assert abs(np.median(out[:, 0] / exact) - 1) < 0.03


def test_weights_are_barycentric(case):
    _, _, lattice = case
    assert lattice.weights.min() > -1e-5
    np.testing.assert_allclose(lattice.weights.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("turn", [None, 0, 1])
def test_transposed_gradient(case, turn):
    _, values, lattice = case
    other = jnp.asarray(np.random.default_rng(1).normal(size=values.shape), jnp.float32)
    out, pull = jax.vjp(lambda v: permutohedral.apply(lattice, v, turn), jnp.asarray(values))
    np.testing.assert_allclose((out * other).sum(), (pull(other)[0] * values).sum(), rtol=2e-4)
    np.testing.assert_allclose(pull(other)[0], permutohedral.transpose(lattice, other, turn), rtol=1e-5)


def test_blurs_in_reverse_order_are_the_transpose():
    """Of one lattice; the mean of both orders is nearly symmetric."""
    features = np.random.default_rng(2).uniform(0, 3, (40, 3)).astype(np.float32)
    lattice = _built(features, "axes")
    for turn in (0, 1):
        there = permutohedral.apply(lattice, jnp.eye(40), turn)
        back = permutohedral.transpose(lattice, jnp.eye(40), turn)
        np.testing.assert_allclose(there, back.T, rtol=1e-4, atol=1e-6)
        assert np.abs(there - there.T).max() > 1e-4


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param((1000 / 0.5, 750 / 0.5, 2550, 2550, 2550), id="rgb 0.1, xy 0.5"),
        pytest.param((4000 / 67, 3000 / 67, 85, 85, 85), id="12 megapixels", marks=pytest.mark.long),
        pytest.param((4000 / 0.5, 3000 / 0.5, 2550, 2550, 2550), id="12 megapixels, rgb 0.1, xy 0.5"),
        pytest.param((3e5, 3e5, 3e5, 3e5, 3e5), id="wider than 64 bits"),
    ],
)
def test_keys_never_collide(scale):
    rng = np.random.default_rng(2)
    features = (rng.uniform(size=(3000, 5)) * scale).astype(np.float32)
    features[1500:2000] = features[:500]  # points that share all vertices
    lattice = jax.jit(permutohedral.build)(features)
    assert lattice.counts.tolist() == _distinct_vertices(features)
    np.testing.assert_array_equal(lattice.vertices[..., 1500:2000], lattice.vertices[..., :500])
    assert lattice.vertices.max(axis=(1, 2)).tolist() == (lattice.counts - 1).tolist()


@pytest.mark.parametrize(("span", "exact"), [(50, True), (600, True), (10**6, False)])
def test_keys_are_exact_where_they_fit(span, exact):
    """A mixed radix, checked as whole numbers: all cells of the range have keys of their own."""
    rng = np.random.default_rng(3)
    base = rng.integers(0, span, (6, 4000)).astype(np.int32)
    base[:, 0], base[:, 1] = 0, span - 1
    units, steps = vertices.axis_steps([jnp.asarray(b) for b in base])
    first, second = (np.asarray(u).astype(object) for u in units)
    if not exact:
        assert all(u % 2 == 1 for u in (*first[:-1], *second[:-1]))  # hashes
        return
    assert first.sum() % 6 == 1
    for word in (first, second):
        reach = 0  # of the coordinates so far, whose margin is 4 cells on each side
        for unit in sorted(u for u in word if u):
            assert unit > reach
            reach += unit * (span + 2 * 4 - 1)
        assert 6 * reach + 5 * word.sum() < 2**32
    assert sum(u > 0 for u in (*first, *second)) == 5
    for word, step in zip((first, second), steps, strict=True):
        assert [int(s) for s in step] == [(word.sum() - 6 * u) % 2**32 for u in word]


@pytest.mark.parametrize("form", FORMS)
def test_every_room_gives_the_same(form, monkeypatch):
    monkeypatch.setattr(traced_lattice, "LEAST", 1024)
    monkeypatch.setattr(traced_lattice, "BLOCK", 512)
    rng = np.random.default_rng(0)
    features, values = rng.uniform(0, 6, (3000, 3)).astype(np.float32), rng.uniform(size=(3000, 4)).astype(np.float32)
    lattice = _built(features, form)
    small, large = lattice.rooms
    assert int(lattice.which_room()) == 0
    spread = _built(features * 1e3, "direct")  # hardly a vertex is shared: the largest room is needed
    assert int(spread.which_room()) == 1 and spread.counts.min() > small
    alone = np.asarray(permutohedral.apply(spread, values))
    assert (np.abs(alone / (spread.scale * _own(spread)[:, None] * values) - 1) < 1e-3).mean() > 0.98
    if not lattice.axes:
        alone = jax.jit(permutohedral._alone, static_argnums=3)
        np.testing.assert_allclose(alone(lattice, values, 1, large), alone(lattice, values, 1, small), rtol=1e-5)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_form_for_other_platforms_is_the_same_filter(case, platform):
    """Whole scatters and gathers in place of chunks."""
    features, values, here = case
    with tracing_for(platform):
        there = _built(features, "axes" if here.axes else "direct")
        out = jax.jit(lambda *x: permutohedral.apply(*x))(there, values)
        loops = str(jax.make_jaxpr(permutohedral.apply)(there, values)).count("while[")
        state = permutohedral.start(there, 4, there.rooms[0])
        _, alone = jax.jit(lambda *x: permutohedral.advance(*x))(
            there, state, values, np.ones((3000, 1), np.float32), 1
        )
        wide = jax.jit(lambda v: permutohedral._alone(there, v, 1, there.rooms[-1]))(np.tile(values, (1, 5)))
    assert loops == 0
    assert here.counts.tolist() == there.counts.tolist()
    for n in range(here.lattices):  # the same vertices by other numbers
        pairs = np.c_[np.asarray(here.vertices[n]).ravel(), np.asarray(there.vertices[n]).ravel()]
        assert len(np.unique(pairs, axis=0)) == len(np.unique(pairs[:, 0]))
    np.testing.assert_allclose(out, permutohedral.apply(here, values), rtol=1e-4)
    np.testing.assert_allclose(alone, permutohedral.apply(here, values, 1), rtol=1e-4)
    if not here.axes:  # in the largest room, a group of channels after another
        np.testing.assert_allclose(wide, np.tile(alone, (1, 5)), rtol=1e-4)


@pytest.mark.parametrize(("platform", "gathers", "scatters"), [("gpu", 37, 12), ("tpu", 37, 12)])
def test_mean_field_gathers_and_scatters_little_on_other_platforms(platform, gathers, scatters):
    """In the traced program; the CPU's, in chunks, has 107 and 30."""
    params, image = CRFParams(4.0, 8.0, 20.0, 3.0, 2.0), np.zeros((8, 9, 3), np.float32)

    def text(platform):
        with tracing_for(platform):
            program = jax.jit(lambda unary: mean_field(unary, image, params, 10, bilateral="permutohedral"))
            return program.lower(jax.ShapeDtypeStruct((8, 9, 4), jnp.float32)).as_text()

    here, there = text("cpu"), text(platform)
    assert 0 < there.count('"stablehlo.gather"') <= gathers < here.count('"stablehlo.gather"')
    assert 0 < there.count('"stablehlo.scatter"') <= scatters


def test_chunks_do_not_overlap(monkeypatch):
    """Points just beyond a chunk: none counts twice."""
    monkeypatch.setattr(permutohedral, "CHUNK", 64)
    points = permutohedral._chunk(10**6, 1) + 5
    assert points == 69
    lattice = _built(np.zeros((points, 2), np.float32), "direct")
    out = np.asarray(jax.jit(lambda ones: permutohedral.apply(lattice, ones, 0))(jnp.ones((points, 1))))
    own = np.asarray(lattice.weights[0, :, 0])
    side = lattice_design.constants("direct", 2)[1]
    near = (own.sum() ** 2 - (own**2).sum()) * side  # each vertex of a simplex is a neighbor of the others
    np.testing.assert_allclose(out / float(lattice.scale), points * ((own**2).sum() + near), rtol=1e-4)


def test_blocks_do_not_show(monkeypatch):
    features = np.random.default_rng(5).uniform(0, 6, (900, 3)).astype(np.float32)
    values = np.random.default_rng(6).uniform(size=(900, 2)).astype(np.float32)
    for form in FORMS:
        whole = permutohedral.apply(_built(features, form), values)
        with monkeypatch.context() as patch:
            patch.setattr(traced_lattice, "BLOCK", 128)
            np.testing.assert_allclose(
                jax.jit(lambda *x: permutohedral.apply(*x))(_built(features, form), values), whole, rtol=1e-5
            )


@pytest.mark.long
def test_vmap_is_the_loop():
    rng = np.random.default_rng(3)
    features = rng.uniform(0, 5, (2, 60, 2)).astype(np.float32)
    values = rng.uniform(size=(2, 60, 3)).astype(np.float32)
    together, one = jax.jit(jax.vmap(filtered))(features, values), jax.jit(filtered)
    for n in range(2):
        np.testing.assert_allclose(together[n], one(features[n], values[n]), rtol=1e-5)


@pytest.mark.parametrize("derived", [lambda f: f, jax.grad], ids=["marginals", "gradient"])
def test_under_vmap_images_take_their_turns(derived):
    """Branches remain branches: batched, they would become selections, and every image would pay for all of them."""
    image = np.random.default_rng(0).uniform(0, 255, (3, 8, 10, 3)).astype(np.float32)
    unary = np.random.default_rng(1).uniform(0, 3, (3, 8, 10, 4)).astype(np.float32)

    def first_label(unary, image):
        return mean_field(unary, image, CRFParams(3, 4, 40, 1, 1), 3, bilateral="permutohedral")[..., 0].sum()

    function = derived(first_label)
    single, together = (
        jax.jit(f).lower(*(x[at] for x in (unary, image))).as_text().count("stablehlo.case")
        for f, at in ((function, 0), (jax.vmap(function), slice(None)))
    )
    assert together == single > 0


@pytest.mark.parametrize(("xy_std", "rgb_std"), [(67, 3), (121, 5)])
@pytest.mark.long
def test_scale_on_a_photograph(test_data, xy_std, rgb_std):
    image = np.load(test_data / "crf_cases" / "v2_full.npz")["image"].astype(np.float32)
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    features = np.c_[x.ravel() / xy_std, y.ravel() / xy_std, image.reshape(-1, 3) / rgb_std].astype(np.float32)
    ones = np.ones((len(features), 1), np.float32)
    lattice = jax.jit(permutohedral.build)(features)
    out = np.asarray(jax.jit(permutohedral.apply)(lattice, ones))[:, 0]
    at = np.random.default_rng(0).choice(len(features), 300, replace=False)
    exact = np.array([np.exp(-0.5 * ((features - features[i]) ** 2).sum(1)).sum() for i in at])
    assert abs(np.median(out[at] / exact) - 1) < 0.02
    assert 0.9 < float(lattice.scale) * _own(lattice).mean() < 1.2
