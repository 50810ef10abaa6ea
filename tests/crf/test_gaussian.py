import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import gaussian
from deeplab_jax.crf.params import truncation_radius


def matrix(length, std):
    at = np.arange(length)
    return np.exp(-0.5 * ((at[:, None] - at[None]) / std) ** 2)


def filtered(values, std, radius="truncated"):
    height, width, _ = values.shape
    reach = truncation_radius(std, gaussian.TRUNCATE) if radius == "truncated" else None
    run = jax.jit(lambda v, s: gaussian.apply(gaussian.build(height, width, s, radius=reach), v))
    return np.asarray(run(values.reshape(height * width, -1), std)).reshape(values.shape)


@pytest.mark.parametrize("std", [0.1, 0.5, 1.0, 3.0, (2.0, 0.7), 9.0])
@pytest.mark.parametrize("shape", [(40, 90, 3), (1, 70, 2), (33, 1, 2)])
def test_sums_over_all_pixels_with_nothing_outside(std, shape):
    values = np.random.default_rng(0).random(shape, np.float32)
    x_std, y_std = np.broadcast_to(std, 2)
    expected = np.einsum("yj,xk,jkc->yxc", matrix(shape[0], y_std), matrix(shape[1], x_std), values)
    # Without truncation the filter is the definition; with it, at most 1.4e-5 of the mass is dropped.
    np.testing.assert_allclose(filtered(values, std, radius=None), expected, rtol=2e-6)
    np.testing.assert_allclose(filtered(values, std), expected, rtol=5e-5)


def test_banded_matrices_equal_shifting_and_adding():
    values = jnp.asarray(np.random.default_rng(0).random((2, 150, 3), np.float32))
    taps = jnp.exp(-0.5 * (jnp.arange(-24, 25) / 6.0) ** 2)
    shifted = jax.jit(lambda v: gaussian._shift_and_add(taps, v, 1))(values)
    np.testing.assert_allclose(jax.jit(gaussian._banded)(taps, values), shifted, rtol=1e-5)


def test_radius_covers_the_stated_truncation():
    assert truncation_radius(3.0, 4.5) == (14, 14)
    assert truncation_radius((1.0, 0.1), 4.5) == (6, 2)
    assert jax.jit(lambda s: jnp.zeros(()) if truncation_radius(s, 4.5) is None else s)(2.0) == 0


def test_the_truncated_filter_is_its_own_transpose_in_gradients():
    rng = np.random.default_rng(1)
    a, b = (jnp.asarray(rng.random((30 * 20, 2), np.float32)) for _ in range(2))
    structure = gaussian.build(30, 20, 1.5, radius=(8, 8))
    gradient = jax.grad(lambda v: (gaussian.apply(structure, v) * b).sum())(a)
    np.testing.assert_allclose(gradient, gaussian.apply(structure, b), rtol=1e-5)


def test_gradient_of_the_width():
    values = jnp.asarray(np.random.default_rng(1).random((8 * 9, 2), np.float32))

    @jax.jit
    @jax.value_and_grad
    def loss(std):
        return (gaussian.apply(gaussian.build(8, 9, std), values) ** 2).mean()

    step = 1e-2
    numeric = (loss(1.3 + step)[0] - loss(1.3 - step)[0]) / (2 * step)
    np.testing.assert_allclose(loss(1.3)[1], numeric, rtol=2e-3)
