import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models.cpu import convolution


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "rate"),
    [
        ((11, 12), 3, 1, 2),
        ((24, 25), 3, 1, 2),
        ((13, 10), 3, 2, 1),
        ((9, 9), 4, 1, 2),
        ((10, 7), 1, 2, 1),
        ((10, 7), 1, 1, 1),
        ((5, 5), 3, 1, 12),
    ],
)
# With few, the maps shifted or transposed are the gradient's.
@pytest.mark.parametrize("channels", [4, pytest.param(40, marks=pytest.mark.long), 80])
def test_conv_and_its_gradients_are_the_plain_ones(size, kernel, stride, rate, channels):
    x, w = normal(0, (2, *size, 64)), normal(1, (kernel, kernel, 64, channels))

    def value_and_grads(conv):
        return jax.jit(jax.value_and_grad(lambda x, w: jnp.sum(jnp.sin(conv(x, w, stride, rate))), (0, 1)))(x, w)

    plain, ours = value_and_grads(convolution.plain_conv), value_and_grads(convolution.conv)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)


def test_taps_are_used_on_cpu():
    w = normal(1, (3, 3, 96, 4))
    assert "custom_vjp" in str(jax.make_jaxpr(convolution.conv)(normal(0, (1, 5, 5, 96)), w))


@pytest.mark.parametrize(
    ("rates", "side"), [((6, 12, 18, 24), 3), ((2, 4, 8, 12), 3), ((12,), 3), ((1, 3), 4), ((2,), 7)]
)
def test_sum_of_atrous_convs_is_the_definition(rates, side):
    x = normal(0, (2, 15, 21, 16))  # rates 18 and 24 reach beyond the map
    kernels = [normal(i, (side, side, 16, 5)) for i in range(len(rates))]

    def plain(x, kernels):
        return sum(convolution.plain_conv(x, k, 1, r) for k, r in zip(kernels, rates))

    def fast(x, kernels):
        return convolution.sum_of_atrous_convs(x, kernels, rates)

    def loss(x, kernels, function):
        out = function(x, kernels)
        return jnp.sum(jnp.sin(out)), out

    grads = jax.jit(jax.grad(loss, (0, 1), has_aux=True), static_argnums=2)
    (expected, of_plain), (ours, of_fast) = grads(x, kernels, plain), grads(x, kernels, fast)
    np.testing.assert_allclose(of_fast, of_plain, atol=2e-4)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(ours), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("window", "stride", "padding"), [(3, 2, ((1, 1), (1, 0))), (2, 2, ((1, 0), (1, 1))), (3, 1, ((1, 1), (1, 1)))]
)
def test_max_pool_and_its_gradient_are_the_plain_ones(window, stride, padding):
    x = jnp.round(normal(0, (2, 11, 14, 3)) * 2)  # many ties: the first maximum receives the gradient

    def run(pool):
        loss = lambda x: jnp.sum(jnp.sin(pool(x, window, stride, padding) * jnp.arange(3.0)))  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(x)

    (value, grad), (plain_value, plain_grad) = run(convolution.max_pool), run(convolution.plain_max_pool)
    np.testing.assert_allclose(value, plain_value, rtol=1e-5)
    np.testing.assert_allclose(grad, plain_grad, atol=1e-5)
