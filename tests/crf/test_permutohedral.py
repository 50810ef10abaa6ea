"""The lattice filter against sums over all pairs, its scale, its keys and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, mean_field, permutohedral
from deeplab_jax.target import tracing_for


def _pairs(features):
    squared = ((features[:, None] - features[None]) ** 2).sum(-1)
    return np.exp(-0.5 * squared)


def _distinct_vertices(features):
    """The number of vertices by exact comparison on the host."""
    features = features - features.min(0)
    count = 0
    lattices = (np.stack(x, -1) for x in jax.jit(permutohedral._simplex)(features))
    for base, rank, _ in zip(*lattices, strict=True):
        order = base.shape[1]
        keys = [np.c_[base - (rank > order - 1 - k), np.full(len(base), k)] for k in range(order)]
        count += len(np.unique(np.concatenate(keys), axis=0))
    return count


@pytest.fixture
def optimized():
    """The photograph's lattice too takes longer to compile than to run."""


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 4, (1500, 3)).astype(np.float32)
    return features, rng.uniform(size=(1500, 4)).astype(np.float32), jax.jit(permutohedral.build)(features)


def test_close_to_all_pairs(case):
    features, values, lattice = case
    pairs, apply = _pairs(features), jax.jit(permutohedral.apply)
    exact, out = pairs @ values, np.asarray(apply(lattice, values))
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.12
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
    weights = np.stack(lattice.weights)
    assert weights.min() > -1e-5
    np.testing.assert_allclose(weights.sum(0), 1, atol=1e-5)


def test_transposed_gradient(case):
    _, values, lattice = case
    other = jnp.asarray(np.random.default_rng(1).normal(size=values.shape), jnp.float32)
    out, pull = jax.vjp(lambda v: permutohedral.apply(lattice, v), jnp.asarray(values))
    np.testing.assert_allclose((out * other).sum(), (pull(other)[0] * values).sum(), rtol=2e-4)
    np.testing.assert_allclose(pull(other)[0], permutohedral.transpose(lattice, other), rtol=1e-5)


@pytest.mark.parametrize(
    "scale",
    [
        pytest.param((1000 / 0.5, 750 / 0.5, 2550, 2550, 2550), id="rgb 0.1, xy 0.5"),
        pytest.param((4000 / 67, 3000 / 67, 85, 85, 85), id="12 megapixels", marks=pytest.mark.long),
        pytest.param((4000 / 0.5, 3000 / 0.5, 2550, 2550, 2550), id="12 megapixels, rgb 0.1, xy 0.5"),
    ],
)
def test_keys_never_collide(scale):
    rng = np.random.default_rng(2)
    features = (rng.uniform(size=(3000, 5)) * scale).astype(np.float32)
    features[1500:2000] = features[:500]  # points that share all vertices
    lattice = jax.jit(permutohedral.build)(features)
    assert int(lattice.count) == _distinct_vertices(features)
    vertices = np.stack(lattice.vertices)
    np.testing.assert_array_equal(vertices[..., 1500:2000], vertices[..., :500])
    assert vertices.max() == int(lattice.count) - 1


def test_every_capacity_gives_the_same(case):
    features, values, lattice = case
    size = np.stack(lattice.vertices).size
    expected = permutohedral._splat_and_slice(lattice, jnp.asarray(values), 1)
    assert int(lattice.count) < size
    np.testing.assert_allclose(permutohedral.apply(lattice, values), expected, rtol=1e-5)
    spread = jax.jit(permutohedral.build)(features * 1e3)  # hardly a vertex is shared: the largest size is needed
    assert int(spread.count) > size / 4
    np.testing.assert_allclose(
        permutohedral.apply(spread, values),
        spread.scale * (np.stack(spread.weights) ** 2).sum((0, 1))[:, None] * values,
        rtol=1e-4,
    )


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_form_for_other_platforms_is_the_same_filter(case, platform):
    """One scatter and one gather in place of chunks; for TPUs, vertices numbered by sorting."""
    features, values, here = case
    with tracing_for(platform):
        there = jax.jit(permutohedral.build)(features)
        out = jax.jit(permutohedral.apply)(there, values)
        loops = str(jax.make_jaxpr(permutohedral.apply)(there, values)).count("while[")
        state = permutohedral.start(there, 4, 1)
        _, alone = jax.jit(permutohedral.advance)(there, state, values, np.ones((1500, 1), np.float32), 1)
    assert loops == 0
    assert int(there.count) == int(here.count) == _distinct_vertices(features)
    pairs = np.c_[np.stack(here.vertices).ravel(), np.stack(there.vertices).ravel()]
    assert len(np.unique(pairs, axis=0)) == int(here.count)  # the same vertices by other numbers
    np.testing.assert_allclose(out, permutohedral.apply(here, values), rtol=1e-4)
    one = permutohedral.Lattice(
        tuple(v[1:] for v in here.vertices), tuple(w[1:] for w in here.weights), here.count, here.scale
    )
    np.testing.assert_allclose(
        alone, permutohedral.LATTICES * permutohedral._splat_and_slice(one, jnp.asarray(values), 1), rtol=1e-4
    )


@pytest.mark.parametrize(("platform", "gathers", "scatters"), [("gpu", 90, 40), ("tpu", 10, 10)])
def test_mean_field_gathers_and_scatters_little_on_other_platforms(platform, gathers, scatters):
    """In the traced program; the CPU's, in chunks and by hash tables, has 360 and 78."""
    params, image = CRFParams(4.0, 8.0, 20.0, 3.0, 2.0), np.zeros((8, 9, 3), np.float32)
    with tracing_for(platform):
        program = jax.jit(lambda unary: mean_field(unary, image, params, 10, bilateral="permutohedral"))
        text = program.lower(jax.ShapeDtypeStruct((8, 9, 4), jnp.float32)).as_text()
    assert 0 < text.count('"stablehlo.gather"') <= gathers
    assert 0 < text.count('"stablehlo.scatter"') <= scatters


def test_chunks_do_not_overlap(monkeypatch):
    """Points just beyond a chunk: none counts twice."""
    monkeypatch.setattr(permutohedral, "CHUNK", 64)
    points = permutohedral._chunk(10**6, 1) + 5
    assert points == 69
    lattice = jax.jit(permutohedral.build)(jnp.zeros((points, 2)))
    out = np.asarray(jax.jit(lambda ones: permutohedral.apply(lattice, ones))(jnp.ones((points, 1))))
    alone = (np.stack(lattice.weights)[..., 0] ** 2).sum()
    np.testing.assert_allclose(out / float(lattice.scale), points * alone, rtol=1e-4)


@pytest.mark.long
def test_vmap_is_the_loop():
    rng = np.random.default_rng(3)
    features = rng.uniform(0, 5, (2, 60, 2)).astype(np.float32)
    values = rng.uniform(size=(2, 60, 3)).astype(np.float32)
    together, one = jax.jit(jax.vmap(filtered))(features, values), jax.jit(filtered)
    for n in range(2):
        np.testing.assert_allclose(together[n], one(features[n], values[n]), rtol=1e-5)


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
    own = float(lattice.scale) * (np.stack(lattice.weights) ** 2).sum((0, 1)).mean()
    assert 0.8 < own < 0.9
