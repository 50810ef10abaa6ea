from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import exact


@partial(jax.jit, static_argnames=("cutoff", "tile"))
def filtered(features, values, cutoff=None, tile=32):
    return exact.apply(exact.build(features, cutoff=cutoff, tile=tile), values)


def points(count, dimensions, channels, spread=1.5, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(20, spread, (count, dimensions)).astype(np.float32)
    return features, rng.normal(size=(count, channels)).astype(np.float32)


@pytest.mark.parametrize(("count", "dimensions", "tile"), [(1, 2, 64), (70, 1, 16), (333, 5, 100), (257, 16, 64)])
def test_sums_over_all_pairs(definition, count, dimensions, tile):
    features, values = points(count, dimensions, 3)
    expected = definition.kernel(features) @ values
    structure = exact.build(jnp.asarray(features), tile=tile)
    np.testing.assert_allclose(
        exact.apply(structure, jnp.asarray(values)), expected, atol=2e-5 * np.abs(expected).max()
    )


def test_features_of_thousands_of_standard_deviations():
    """Pairs at a distance of 1, far from each other: their squares leave nothing of the distance in float32."""
    places = np.random.default_rng(0).uniform(-1e4, 1e4, (60, 2)).repeat(2, axis=0)
    places[1::2, 0] += 1
    features = places.astype(np.float32)
    far = features.astype(np.float64)
    expected = np.exp(-0.5 * ((far[:, None] - far[None]) ** 2).sum(-1)).sum(1)
    assert np.abs(expected - 1.6).max() < 0.01
    np.testing.assert_allclose(filtered(features, np.ones((120, 1), np.float32))[:, 0], expected, rtol=0.015)


def test_a_cutoff_keeps_every_pair_at_or_above_it(definition):
    features, values = points(600, 3, 2, spread=6)
    values = np.abs(values)
    kernel = definition.kernel(features)
    out = filtered(features, values, cutoff=1e-2)
    kept = np.where(kernel >= 1e-2, kernel, 0) @ values
    assert (np.asarray(out) >= kept * (1 - 1e-4)).all()
    assert (np.asarray(out) <= kernel @ values * (1 + 1e-4)).all()
    assert (np.asarray(out) < kernel @ values * (1 - 1e-4)).any()  # something was skipped


def test_a_tiny_cutoff_is_the_definition(definition):
    features, values = points(500, 4, 3, spread=4)
    out = filtered(features, values, cutoff=1e-9)
    np.testing.assert_allclose(out, definition.kernel(features) @ values, atol=1e-4)


@pytest.mark.parametrize("cutoff", [None, 1e-9])
def test_gradients_of_values_and_features_match_dense_autodiff(cutoff):
    features, values = (jnp.asarray(x) for x in points(130, 3, 2))
    target = jnp.asarray(points(130, 3, 2, seed=1)[1])

    def tiled(f, v):
        return (filtered(f, v, cutoff) * target).sum()

    def dense(f, v):
        kernel = jnp.exp(-0.5 * ((f[:, None] - f[None]) ** 2).sum(-1))
        return ((kernel @ v) * target).sum()

    gradients = (jax.jit(jax.grad(function, (0, 1)))(features, values) for function in (tiled, dense))
    for got, expected in zip(*gradients):
        np.testing.assert_allclose(got, expected, atol=3e-5 * np.abs(expected).max())


@pytest.mark.parametrize("cutoff", [None, 1e-3])
def test_vmap_equals_a_loop_also_in_gradients(cutoff):
    batch = [points(90, 3, 2, seed=s) for s in range(2)]
    features, values = (jnp.stack([jnp.asarray(b[i]) for b in batch]) for i in range(2))

    def loss(f, v):
        return (filtered(f, v, cutoff) ** 2).sum()

    gradient = jax.grad(loss, (0, 1))
    together = jax.jit(jax.vmap(gradient))(features, values)
    for n in range(2):
        for a, b in zip(together, jax.jit(gradient)(features[n], values[n])):
            np.testing.assert_allclose(a[n], b, rtol=1e-4, atol=1e-4)


def test_memory_of_forward_and_backward_is_linear():
    features, values = (jnp.asarray(x) for x in points(16384, 5, 3))

    def loss(f, v):
        return (exact.apply(exact.build(f), v) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(features, values).compile()
    pairs = 16384**2 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < pairs / 50
