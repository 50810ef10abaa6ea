"""The spatial kernel: a Gaussian over pixel positions, filtered along one axis and then the other.

out(y, x) = sum over all pixels of exp(-(y - y')^2 / (2 s_y^2) - (x - x')^2 / (2 s_x^2)) v(y', x'), i = j included.
As in the definition, nothing outside the image contributes, so sums near a border are smaller.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.crf.params import Value, components
from deeplab_jax.target import ANY, platform

TRUNCATE = 4.5  # standard deviations: dropped kernel values are below 4e-5, 7e-6 of each axis's mass
SHIFTS = 32  # radius up to which shifting and adding is faster than a banded matrix
ROWS = 16  # image rows filtered at once by shifting and adding
DENSE = 512  # off CPUs, an axis up to this length is one matrix, whatever the radius: products are cheap there
BLOCK = 128  # off CPUs, the minimum number of outputs of a banded matrix: the side of a TPU's matrix unit


@flax.struct.dataclass
class Structure:
    """One symmetric matrix or one row of taps per axis.

    Attributes:
      rows: along the vertical axis: taps [2r + 1], or the whole matrix [H, H] (see `DENSE`).
      columns: along the horizontal axis: taps [2r + 1], or the whole matrix [W, W].
      height: H.
      width: W.
    """

    rows: jax.Array
    columns: jax.Array
    height: int = flax.struct.field(pytree_node=False)
    width: int = flax.struct.field(pytree_node=False)


def build(
    height: int, width: int, std: Value, *, radius: tuple[int, int] | None = None, dtype: jnp.dtype = jnp.float32
) -> Structure:
    """Prepares the filter.

    Args:
      height: H.
      width: W.
      std: the standard deviation in pixels, a number or a pair (x, y), from 0.1 up; may be traced.
      radius: (x, y) pixels beyond which the kernel is dropped (`params.truncation_radius`), without gradient in `std`;
        None = nothing is dropped, each axis is a dense matrix and `std` has a gradient.
      dtype: of the computation.
    """
    std_x, std_y = components(std, 2, dtype)

    def axis(length: int, deviation: jax.Array, reach: int | None) -> jax.Array:
        if reach is not None and platform() in ("gpu", "tpu") and length <= DENSE:
            at = jnp.arange(length, dtype=dtype)
            lag = at[:, None] - at[None]
            return jnp.where(jnp.abs(lag) <= reach, _gaussian(lag, lax.stop_gradient(deviation)), 0)
        if reach is not None and reach < length:
            return _gaussian(jnp.arange(-reach, reach + 1, dtype=dtype), lax.stop_gradient(deviation))
        at = jnp.arange(length, dtype=dtype)
        return _gaussian(at[:, None] - at[None], deviation)

    reach_x, reach_y = (None, None) if radius is None else radius
    return Structure(axis(height, std_y, reach_y), axis(width, std_x, reach_x), height, width)


def apply(structure: Structure, values: jax.Array) -> jax.Array:
    """Filters `values` [H * W, C]; returns [H * W, C]."""
    rows, columns = structure.rows, structure.columns
    few = rows.ndim == columns.ndim == 1 and max(rows.size, columns.size) <= 2 * SHIFTS + 1

    def shifted(values: jax.Array) -> jax.Array:
        image = values.reshape(structure.height, structure.width, -1)
        return _shifted(rows, columns, image).reshape(values.shape)

    def products(values: jax.Array) -> jax.Array:
        # The barrier keeps XLA from recomputing the first pass inside the second.
        grid = lax.optimization_barrier(_along(rows, values.reshape(1, structure.height, -1)))
        return _along(columns, grid.reshape(structure.height, structure.width, -1)).reshape(values.shape)

    if few and platform() == ANY:
        return lax.platform_dependent(values, cpu=shifted, default=products)
    return shifted(values) if few and platform() == "cpu" else products(values)


def transpose(structure: Structure, values: jax.Array) -> jax.Array:
    """The transposed filter, which is the filter itself: the kernel is symmetric."""
    return apply(structure, values)


def _gaussian(distance: jax.Array, std: jax.Array) -> jax.Array:
    return jnp.exp(-0.5 * (distance / std) ** 2)


def _along(kernel: jax.Array, values: jax.Array) -> jax.Array:
    """Filters [A, n, M] along its middle axis by taps or by a matrix."""
    if kernel.ndim == 2:
        return jnp.einsum("pn,anm->apm", kernel, values, precision=lax.Precision.HIGHEST)
    return _truncated(kernel, values)


@jax.custom_vjp
def _truncated(taps: jax.Array, values: jax.Array) -> jax.Array:
    if taps.size <= 2 * SHIFTS + 1 and platform() == "cpu":
        return _shift_and_add(taps, values, 1)
    return _banded(taps, values)


def _truncated_forward(taps: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _truncated(taps, values), taps


def _truncated_backward(taps: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return jnp.zeros_like(taps), _truncated(taps, gradient)


_truncated.defvjp(_truncated_forward, _truncated_backward)


@jax.custom_vjp
def _shifted(rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
    """Filters [H, W, C] along both axes, some rows at a time.

    In a loop, a few rows stay in the cache from the first pass to the second; and XLA on CPU cannot fuse the shifts
    into the consumer of the result, which would recompute them for each of its terms and be ten times as slow.
    """
    height, width, channels = values.shape
    radius = rows.size // 2
    block = min(ROWS, height)
    padded = jnp.pad(values.reshape(height, -1), ((radius, radius), (0, 0)))

    def filter_block(n: jax.Array, out: jax.Array) -> jax.Array:
        start = jnp.minimum(n * block, height - block)  # the last block is moved back to end with the image
        window = lax.dynamic_slice_in_dim(padded, start, block + 2 * radius)
        part = _add_shifted(rows, window, 0, block).reshape(block, width, channels)
        return lax.dynamic_update_slice_in_dim(out, _shift_and_add(columns, part, 1), start, 0)

    return lax.fori_loop(0, -(-height // block), filter_block, jnp.zeros_like(values))


def _shifted_forward(rows: jax.Array, columns: jax.Array, values: jax.Array) -> tuple[jax.Array, tuple]:
    return _shifted(rows, columns, values), (rows, columns)


def _shifted_backward(taps: tuple, gradient: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    rows, columns = taps
    return jnp.zeros_like(rows), jnp.zeros_like(columns), _shifted(rows, columns, gradient)


_shifted.defvjp(_shifted_forward, _shifted_backward)


def _shift_and_add(taps: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    radius = taps.size // 2
    padding = [(radius, radius) if n == axis else (0, 0) for n in range(values.ndim)]
    # Without the barrier, XLA pads again for each of the taps.
    return _add_shifted(taps, lax.optimization_barrier(jnp.pad(values, padding)), axis, values.shape[axis])


def _add_shifted(taps: jax.Array, padded: jax.Array, axis: int, length: int) -> jax.Array:
    radius = taps.size // 2
    shifted = lambda k: lax.slice_in_dim(padded, k, k + length, axis=axis)  # noqa: E731
    total = taps[radius] * shifted(radius)
    for k in range(1, radius + 1):
        total += taps[radius + k] * (shifted(radius - k) + shifted(radius + k))
    return total


def _banded(taps: jax.Array, values: jax.Array) -> jax.Array:
    """Blocks of outputs, each a product of one matrix with the inputs that reach it."""
    radius = taps.shape[0] // 2
    length = values.shape[1]
    block = 2 * radius if platform() == "cpu" else max(2 * radius, BLOCK)
    blocks = -(-length // block)
    lag = jnp.arange(block + 2 * radius)[None] - jnp.arange(block)[:, None]
    band = jnp.where((lag >= 0) & (lag <= 2 * radius), taps[jnp.clip(lag, 0, 2 * radius)], 0)
    padded = jnp.pad(values, ((0, 0), (radius, blocks * block - length + radius), (0, 0)))
    pieces = [
        jnp.einsum(
            "pk,akm->apm", band, padded[:, n * block : (n + 1) * block + 2 * radius], precision=lax.Precision.HIGHEST
        )
        for n in range(blocks)
    ]
    return jnp.concatenate(pieces, axis=1)[:, :length]
