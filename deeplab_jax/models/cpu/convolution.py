"""Convolution and max pooling, each in the form that is fastest for its shape, all equal to the plain definition.

On a CPU, XLA's gradients of a convolution with respect to its kernel and of a max pool are several times slower than
the matrix products and shifted additions that they are equivalent to; only there (`target.platform() == "cpu"`) these
functions have gradients of their own. On other platforms they are XLA's plain operations, except for the max pool: GPUs
would scatter its gradient, and with deterministic operations sort first.
"""

import functools
import itertools
import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.models.cpu import winograd
from deeplab_jax.target import ANY, platform

# Kernel gradients are computed tap by tap from this many input channels on; below, products are too thin to be faster.
MIN_TAP_CHANNELS = 48
# Winograd's transforms are faster from this many channels on, in and out, and for maps whose tiles need less memory.
MIN_WINOGRAD_CHANNELS = 96
MAX_TILE_BYTES = 2**27


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
    return _conv(x, kernel, stride, rate, platform())


# A program of its own, so that layers of one shape, such as those of a stage's residual blocks, are traced and
# differentiated once. The compiler inlines it again.
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int, target: str) -> jax.Array:
    """`conv` for a platform."""
    if kernel.shape[:2] == (1, 1):
        if stride > 1:
            x = x[:, ::stride, ::stride]
        return (point_conv if target == "cpu" else plain_point_conv)(x, kernel[0, 0])
    if target in ("cpu", ANY) and _suits_winograd(x, kernel, stride):
        return winograd_conv(x, kernel, rate)
    if target == "cpu" and kernel.shape[2] >= MIN_TAP_CHANNELS:
        return tap_conv(x, kernel, stride, rate)
    return plain_conv(x, kernel, stride, rate)


def plain_point_conv(x: jax.Array, weights: jax.Array) -> jax.Array:
    """[B, H, W, C] times [C, D], a convolution whose kernel is one position."""
    return lax.dot_general(x, weights, (((3,), (0,)), ((), ())))


@jax.custom_vjp
def point_conv(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`plain_point_conv` whose gradient with respect to the weights transposes the map that has fewer channels."""
    return plain_point_conv(x, weights)


def _point_conv_forward(x, weights):
    return plain_point_conv(x, weights), (x, weights)


def _point_conv_backward(residuals, dy):
    x, weights = residuals
    dx = lax.dot_general(dy, weights, (((3,), (1,)), ((), ())))
    rows, dy_rows = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    over_positions = (((0,), (0,)), ((), ()))
    if weights.shape[0] <= weights.shape[1]:
        return dx, lax.dot_general(rows, dy_rows, over_positions)
    return dx, lax.dot_general(dy_rows, rows, over_positions).T


point_conv.defvjp(_point_conv_forward, _point_conv_backward)


def plain_conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int) -> jax.Array:
    """The definition, by XLA's own convolution."""
    total = (kernel.shape[0] - 1) * rate
    padding = [(total // 2, total - total // 2)] * 2
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, rhs_dilation=(rate, rate), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def _suits_winograd(x: jax.Array, kernel: jax.Array, stride: int) -> bool:
    """Whether the transforms are faster: many channels, a map whose tiles need little memory, float32's precision."""
    tiles = 9 / 4 * x.size / x.shape[-1] * max(kernel.shape[2:]) * x.dtype.itemsize
    return (
        (kernel.shape[:2], stride, x.dtype) == ((3, 3), 1, jnp.float32)
        and min(kernel.shape[2:]) >= MIN_WINOGRAD_CHANNELS
        and tiles <= MAX_TILE_BYTES
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd_conv(x: jax.Array, kernel: jax.Array, rate: int) -> jax.Array:
    """`plain_conv` of a 3x3 kernel in fewer multiplications; plain on the other platforms of an exported program."""
    plain = functools.partial(plain_conv, stride=1, rate=rate)
    return lax.platform_dependent(x, kernel, cpu=functools.partial(winograd.conv, rate=rate), default=plain)


def _winograd_conv_forward(x, kernel, rate):
    return winograd_conv(x, kernel, rate), (x, kernel)


def _winograd_conv_backward(rate, residuals, dy):
    x, kernel = residuals
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    return winograd.conv(dy, turned, rate), winograd.kernel_gradient(x, dy, rate)


winograd_conv.defvjp(_winograd_conv_forward, _winograd_conv_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def tap_conv(x: jax.Array, kernel: jax.Array, stride: int, rate: int) -> jax.Array:
    """`plain_conv` whose gradient with respect to the kernel is one matrix product for each tap."""
    return plain_conv(x, kernel, stride, rate)


def _tap_conv_forward(x, kernel, stride, rate):
    return plain_conv(x, kernel, stride, rate), (x, kernel)


def _tap_conv_backward(stride, rate, residuals, dy):
    x, kernel = residuals
    (dx,) = jax.vjp(lambda x: plain_conv(x, kernel, stride, rate), x)[1](dy)
    (height, width), pad = x.shape[1:3], 2 * (kernel.shape[0] // 2) * rate
    little_padding = (height + pad) * (width + pad) <= 1.25 * height * width
    centered = stride == 1 and kernel.shape[0] % 2
    if centered and 2 * kernel.shape[3] <= kernel.shape[2]:
        products = _narrow_products
    else:
        products = _row_products if centered and little_padding else _window_products

    def add_image(total: jax.Array, pair: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        x, dy = (a[None] for a in pair)
        return total + products(x, dy, kernel.shape[0], stride, rate), None

    # Image by image, so that the shifted copies of a map are still in the cache when they are multiplied: three times
    # as fast as all at once for six maps of 31 x 41 x 128.
    total, _ = lax.scan(add_image, jnp.zeros((kernel.shape[0] ** 2, *kernel.shape[2:]), dy.dtype), (x, dy))
    return dx, total.reshape(kernel.shape)


def _narrow_products(x: jax.Array, dy: jax.Array, side: int, stride: int, rate: int) -> jax.Array:
    """x^T dy for each tap, [taps, C, D]; one product with shifted copies of dy, for a dy with few channels."""
    height, width = x.shape[1:3]
    pad = side // 2 * rate
    padded = jnp.pad(dy, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    reach = range(2 * pad, -1, -rate)
    shifted = jnp.concatenate([padded[:, i : i + height, j : j + width] for i in reach for j in reach], -1)
    # Without the barrier the copies are recomputed inside the product.
    products = lax.dot_general(x, lax.optimization_barrier(shifted), (((0, 1, 2), (0, 1, 2)), ((), ())))
    return products.reshape(x.shape[-1], side**2, -1).swapaxes(0, 1)


def _row_products(x: jax.Array, dy: jax.Array, side: int, stride: int, rate: int) -> jax.Array:
    """x^T dy for each tap, [taps, C, D]; both maps padded equally and flattened: a tap is a run of whole rows."""
    pad = side // 2 * rate
    widths = ((0, 0), (pad, pad), (pad, pad), (0, 0))
    rows, dy_rows = (jnp.pad(a, widths).reshape(-1, a.shape[-1]) for a in (x, dy))
    width = x.shape[2] + 2 * pad
    edge = pad * width + pad  # dy is zero here, and taps reach no further
    inside = dy_rows[edge : len(rows) - edge]
    reach = range(-(side // 2) * rate, side // 2 * rate + 1, rate)
    starts = [edge + i * width + j for i in reach for j in reach]
    return jnp.stack([lax.dot_general(rows[s : s + len(inside)], inside, (((0,), (0,)), ((), ()))) for s in starts])


def _window_products(x: jax.Array, dy: jax.Array, side: int, stride: int, rate: int) -> jax.Array:
    """x^T dy for each tap, [taps, C, D], x sampled at the stride."""
    before = (side - 1) * rate // 2
    after = (side - 1) * rate - before
    padded = jnp.pad(x, ((0, 0), (before, after), (before, after), (0, 0)))
    height, width = [(n - 1) * stride + 1 for n in dy.shape[1:3]]
    taps = []
    for i in range(side):
        for j in range(side):
            shifted = padded[:, i * rate : i * rate + height : stride, j * rate : j * rate + width : stride]
            taps.append(lax.dot_general(shifted, dy, (((0, 1, 2), (0, 1, 2)), ((), ()))))
    return jnp.stack(taps)


tap_conv.defvjp(_tap_conv_forward, _tap_conv_backward)


def max_pool(x: jax.Array, window: int, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]) -> jax.Array:
    """Maximum over windows.

    Args:
      x: [B, H, W, C].
      window: side of the window.
      stride: step between windows.
      padding: positions before and after H and W, which are never the maximum.

    Returns:
      [B, h, w, C]; the gradient goes to the first maximum in row-major order.
    """
    if platform() != "tpu":
        return line_max_pool(x, window, stride, padding)
    return plain_max_pool(x, window, stride, padding)


def plain_max_pool(
    x: jax.Array, window: int, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """The definition, by XLA's window reduction; see `max_pool`."""
    low = np.asarray(-np.inf, x.dtype)[()]
    return lax.reduce_window(
        x, low, lax.max, (1, window, window, 1), (1, stride, stride, 1), [(0, 0), *padding, (0, 0)]
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def line_max_pool(
    x: jax.Array, window: int, stride: int, padding: tuple[tuple[int, int], tuple[int, int]]
) -> jax.Array:
    """`max_pool` whose gradient adds up shifted maps, along rows and then along columns, where XLA's would scatter."""
    return plain_max_pool(x, window, stride, padding)


def _line_max_pool_forward(x, window, stride, padding):
    y, column = _pool_line(x, 2, window, stride, padding[1])
    y, row = _pool_line(y, 1, window, stride, padding[0])
    return y, (column, row, x.shape)


def _line_max_pool_backward(window, stride, padding, residuals, dy):
    column, row, shape = residuals
    dy = _spread_line(dy, row, 1, shape[1], window, stride, padding[0][0])
    return (_spread_line(dy, column, 2, shape[2], window, stride, padding[1][0]),)


line_max_pool.defvjp(_line_max_pool_forward, _line_max_pool_backward)


def _pool_line(
    x: jax.Array, axis: int, window: int, stride: int, padding: tuple[int, int]
) -> tuple[jax.Array, jax.Array]:
    """Maximum along one axis, and the first tap of the window that has it (int8)."""
    widths = [padding if i == axis else (0, 0) for i in range(x.ndim)]
    padded = jnp.pad(x, widths, constant_values=-np.inf)
    count = (padded.shape[axis] - window) // stride + 1
    taps = [lax.slice_in_dim(padded, t, t + (count - 1) * stride + 1, stride, axis) for t in range(window)]
    best, winner = taps[0], jnp.zeros(taps[0].shape, jnp.int8)
    for t, tap in enumerate(taps[1:], 1):
        winner = jnp.where(tap > best, jnp.int8(t), winner)
        best = jnp.maximum(best, tap)
    return best, winner


def _spread_line(
    dy: jax.Array, winner: jax.Array, axis: int, length: int, window: int, stride: int, before: int
) -> jax.Array:
    """Gradient of `_pool_line`: each dy goes to the input position that won, of `length` along the axis."""
    zero = np.zeros((), dy.dtype)[()]
    reach = (dy.shape[axis] - 1) * stride + 1
    parts = []
    for t in range(window):
        # Output i reads tap t at input i * stride + t - before; a negative edge crops.
        start = t - before
        widths = [(start, length - start - reach, stride - 1) if i == axis else (0, 0, 0) for i in range(dy.ndim)]
        parts.append(lax.pad(jnp.where(winner == t, dy, zero), zero, widths))
    return functools.reduce(operator.add, parts)


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
    total, zero = jnp.zeros((batch, height, width, d), x.dtype), np.zeros((), x.dtype)[()]
    for n, (rate, i, j) in enumerate(itertools.product(rates, range(side), range(side))):
        before = (side - 1) * rate // 2  # the padding of `plain_conv`; even sides have no middle
        dy, dx = i * rate - before, j * rate - before
        if abs(dy) < height and abs(dx) < width:
            tap = lax.slice_in_dim(products, n * d, (n + 1) * d, axis=3)
            # A negative edge crops, so this shifts and fills with zeros.
            shifted = lax.pad(tap, zero, ((0, 0, 0), (-dy, dy, 0), (-dx, dx, 0), (0, 0, 0)))
            total = lax.add(total, shifted)
    return total
