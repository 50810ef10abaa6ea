"""Winograd's convolution and its gradients are the plain ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models.cpu import convolution, winograd


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("m", winograd.TILES)
def test_transforms_give_the_correlation(m):
    a_t, g, b_t = winograd.matrices(m)
    rng = np.random.default_rng(m)
    kernel, row = rng.normal(size=3), rng.normal(size=m + 2)
    np.testing.assert_allclose(a_t @ ((g @ kernel) * (b_t @ row)), np.correlate(row, kernel), atol=1e-12)


def test_the_smallest_transforms_are_the_published_ones():
    """F(2, 3) of Lavin and Gray 2016, section 4.1, up to the sign that goes from one transform to the other."""
    a_t, g, b_t = winograd.matrices(2)
    np.testing.assert_array_equal(np.abs(b_t), [[1, 0, 1, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 1, 0, 1]])
    np.testing.assert_array_equal(np.abs(g), [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, 0.5, 0.5], [0, 0, 1]])
    np.testing.assert_array_equal(np.abs(a_t), [[1, 1, 1, 0], [0, 1, 1, 1]])


@pytest.mark.parametrize(
    ("size", "rate", "m"),
    [
        ((12, 16), 1, 4),
        ((6, 9), 1, 3),
        ((2, 2), 1, 2),
        ((11, 12), 2, 3),
        ((11, 13), 2, 4),
        ((41, 41), 4, 4),
        ((5, 7), 12, 2),
    ],
)
def test_conv_and_its_gradients_are_the_plain_ones(size, rate, m):
    assert winograd.tile_side(*size, rate) == m
    x, w = normal(0, (2, *size, 8)), normal(1, (3, 3, 8, 5))
    dy = normal(2, (2, *size, 5))

    @jax.jit
    def run(x, w, dy):
        plain = jax.vjp(lambda x, w: convolution.plain_conv(x, w, 1, rate), x, w)
        ours = jax.vjp(lambda x, w: convolution.winograd_conv(x, w, rate), x, w)
        return winograd.conv(x, w, rate), *((y, pull(dy)) for y, pull in (plain, ours))

    without_gradient, (expected, wanted), (ours, found) = run(x, w, dy)
    np.testing.assert_allclose(without_gradient, expected, atol=2e-4)
    np.testing.assert_allclose(ours, expected, atol=2e-4)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()) + 1e-4)


def test_rounding_stays_small():
    """256 channels at rate 2 as in ResNet-101, against float64."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(1, 41, 41, 256)), rng.normal(size=(3, 3, 256, 16))
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
    exact = sum(padded[:, 2 * i : 2 * i + 41, 2 * j : 2 * j + 41] @ w[i, j] for i in range(3) for j in range(3))
    ours = jax.jit(lambda x, w: winograd.conv(x, w, 2))(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    assert np.abs(ours - exact).max() < 2e-5 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "dtype", "expected"),
    [
        ((1, 9, 9, 96), (3, 3, 96, 96), 1, "float32", True),
        ((1, 9, 9, 96), (3, 3, 96, 95), 1, "float32", False),  # too few channels
        ((1, 9, 9, 96), (3, 3, 96, 96), 2, "float32", False),
        ((1, 9, 9, 96), (4, 4, 96, 96), 1, "float32", False),
        ((1, 9, 9, 96), (3, 3, 96, 96), 1, "bfloat16", False),  # too little precision
        ((1, 1500, 1500, 96), (3, 3, 96, 96), 1, "float32", False),  # tiles of nearly 2 GB
    ],
)
def test_where_it_is_used(shape, kernel, stride, dtype, expected):
    arguments = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(kernel, dtype)
    traced = jax.make_jaxpr(lambda x, w: convolution.conv(x, w, stride, 1))(*arguments)
    assert ("winograd_conv" in str(traced)) is expected


def test_programs_for_other_platforms_have_the_plain_convolution():
    arguments = jax.ShapeDtypeStruct((1, 9, 9, 96), "float32"), jax.ShapeDtypeStruct((3, 3, 96, 96), "float32")
    programs = {
        platform: jax.export.export(jax.jit(lambda x, w: convolution.conv(x, w)), platforms=[platform])(*arguments)
        for platform in ("cpu", "tpu")
    }
    found = {platform: "stablehlo.convolution" in p.mlir_module() for platform, p in programs.items()}
    assert found == {"cpu": False, "tpu": True}
