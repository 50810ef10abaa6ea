"""Sums as products with ones, against plain ones in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models.cpu import sums


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    return rng.normal(2, 3, (2, 7, 9, 5)), rng.normal(size=(2, 7, 9, 5)), rng.normal(size=5), rng.normal(size=5)


def test_moments_and_their_gradient(maps):
    x, _, a, b = maps
    mean, square = sums.moments(jnp.float32(x))
    np.testing.assert_allclose(mean, x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(square, (x * x).mean((0, 1, 2)), rtol=1e-5)
    _, pull = jax.vjp(sums.moments, jnp.float32(x))
    (gradient,) = pull((jnp.float32(a), jnp.float32(b)))
    np.testing.assert_allclose(gradient, (a + 2 * b * x) / (2 * 7 * 9), rtol=1e-4, atol=1e-6)


def test_affine_and_its_gradients(maps):
    x, dy, factor, offset = maps
    y, pull = jax.vjp(sums.affine, *map(jnp.float32, (x, factor, offset)))
    np.testing.assert_allclose(y, x * factor + offset, rtol=1e-5, atol=1e-5)
    dx, dfactor, doffset = pull(jnp.float32(dy))
    np.testing.assert_allclose(dx, dy * factor, rtol=1e-5)
    np.testing.assert_allclose(dfactor, (dy * x).sum((0, 1, 2)), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(doffset, dy.sum((0, 1, 2)), rtol=1e-4, atol=1e-4)


def test_the_sum_is_a_product_on_cpu_and_equals_the_sum(maps):
    x = jnp.float32(maps[0])
    np.testing.assert_allclose(sums.over_positions(x), x.sum((0, 1, 2)), rtol=1e-5)
    assert ("dot_general" in str(jax.make_jaxpr(sums.over_positions)(x))) == (jax.default_backend() == "cpu")
