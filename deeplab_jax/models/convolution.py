"""Convolution and max pooling, each in the form that is fastest for its shape, all equal to the plain definition."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def conv(x: jax.Array, kernel: jax.Array, stride: int = 1, rate: int = 1) -> jax.Array:
    """Atrous convolution with centered zero padding.

    Args:
      x: [B, H, W, C].
      kernel: [k, k, C, D].
      stride: step between outputs.
      rate: step between taps.

    Returns:
      [B, ceil(H / stride), ceil(W / stride), D].
    """
    if kernel.shape[:2] == (1, 1):
        if stride > 1:
            x = x[:, ::stride, ::stride]
        return lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
    return plain_conv(x, kernel, stride, rate)


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int) -> jax.Array:
    """The definition, by XLA's own convolution."""
    total = (kernel.shape[0] - 1) * rate
    padding = [(total // 2, total - total // 2)] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, rhs_dilation=(rate, rate), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """Maximum over windows of [B, H, W, C]; padding (a negative end crops) is minus infinity."""
    low = np.asarray(-np.inf, x.dtype)[()]
    return lax.reduce_window(
        x, low, lax.max, (1, window, window, 1), (1, stride, stride, 1), [(0, 0), *padding, (0, 0)]
    )


def sum_of_atrous_convs(x: jax.Array, kernels: list[jax.Array], rates: tuple[int, ...]) -> jax.Array:
    """Sum of parallel 3x3 atrous convolutions to few channels, as one matrix product and shifted additions.

    Args:
      x: [B, H, W, C].
      kernels: one [3, 3, C, D] for each rate.
      rates: atrous rates.

    Returns:
      [B, H, W, D].
    """
    batch, height, width, channels = x.shape
    d = kernels[0].shape[-1]
    side = kernels[0].shape[0]
    taps = jnp.concatenate([k.transpose(2, 0, 1, 3).reshape(channels, -1) for k in kernels], -1)
    products = lax.dot_general(x, taps, (((3,), (0,)), ((), ())))
    products = products.reshape(batch, height, width, len(kernels), side, side, d)
    total = jnp.zeros((batch, height, width, d), x.dtype)
    for n, rate in enumerate(rates):
        for i in range(side):
            for j in range(side):
                dy, dx = (i - side // 2) * rate, (j - side // 2) * rate
                if abs(dy) < height and abs(dx) < width:
                    # A negative edge crops, so this shifts and fills with zeros.
                    total += lax.pad(
                        products[:, :, :, n, i, j],
                        np.zeros((), x.dtype)[()],
                        ((0, 0, 0), (-dy, dy, 0), (-dx, dx, 0), (0, 0, 0)),
                    )
    return total
