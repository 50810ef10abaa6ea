"""3x3 convolutions in fewer multiplications: Winograd's minimal filtering (Lavin and Gray 2016, sections 3 and 4.1).

A tile of m x m results is computed from (m + 2)^2 products instead of 9 m^2, which are summed over channels as
matrix products. An atrous convolution of rate r is r^2 plain ones, one on each of the maps sampled at stride r.

With transforms A, B, G from `matrices`, a tile of the result is A^T [(G g G^T) * (B^T d B)] A for the kernel g and the
(m + 2)^2 inputs d that it reads; here each pair of transforms is one matrix that acts on flattened tiles.
"""

import functools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Where the transforms' polynomials are evaluated, besides infinity; these keep rounding errors small.
_POINTS = (Fraction(0), Fraction(1), Fraction(-1), Fraction(1, 2), Fraction(-2))
TILES = (2, 3, 4)  # sides of a tile of results


@functools.cache
def matrices(m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A^T [m, m + 2], G [m + 2, 3] and B^T [m + 2, m + 2] of F(m, 3), float64, by Cook and Toom's construction.

    y = A^T [(G g) * (B^T d)] is the correlation y_i = sum_k g_k d_(i + k) of m results.
    """
    points = _POINTS[: m + 1]
    a_t, g, b_t = (np.zeros(shape) for shape in ((m, m + 2), (m + 2, 3), (m + 2, m + 2)))
    a_t[m - 1, -1] = g[-1, -1] = 1
    for i, p in enumerate(points):
        others = [q for q in points if q != p]
        size = functools.reduce(lambda product, q: product * (p - q), others, Fraction(1))
        a_t[:, i] = [float(p**k) for k in range(m)]
        g[i] = [float(p**k / size) for k in range(3)]
        b_t[i, : m + 1] = [float(c) for c in _with_roots(others)]
    b_t[-1] = [float(c) for c in _with_roots(points)]
    return a_t, g, b_t


def _with_roots(roots) -> list[Fraction]:
    """Coefficients, lowest order first, of the product of (x - root)."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [*(-root * c for c in coefficients), Fraction(0)]
        coefficients = [s + t for s, t in zip(shifted, scaled)]
    return coefficients


def tile_side(height: int, width: int, rate: int) -> int:
    """The side of a tile, in positions, that needs the fewest multiplications for a map of this size."""
    return min(TILES, key=lambda m: (m + 2) ** 2 * _count(height, m, rate) * _count(width, m, rate))


def conv(x: jax.Array, kernel: jax.Array, rate: int = 1) -> jax.Array:
    """Atrous 3x3 convolution of stride 1 with centered zero padding.

    Rounding errors are about ten times those of the plain sum: 5e-6 of the largest result in float32.

    Args:
      x: [B, H, W, C].
      kernel: [3, 3, C, D].
      rate: step between taps.

    Returns:
      [B, H, W, D].
    """
    batch, height, width, _ = x.shape
    m = tile_side(height, width, rate)
    a_t, g, _ = _pairs(m, x.dtype)
    filters = (g @ kernel.reshape(9, -1)).reshape(-1, *kernel.shape[2:])
    products = lax.dot_general(_inputs(x, m, rate), filters, (((2,), (1,)), ((0,), (0,))))
    tiles = (a_t @ products.reshape(len(products), -1)).reshape(m, m, -1, kernel.shape[3])
    return _assemble(tiles, m, rate, (batch, height, width))


def kernel_gradient(x: jax.Array, dy: jax.Array, rate: int = 1) -> jax.Array:
    """The gradient with respect to the kernel of a convolution of `x` whose result has the gradient `dy`.

    Args:
      x: [B, H, W, C].
      dy: [B, H, W, D].
      rate: step between taps.

    Returns:
      [3, 3, C, D].
    """
    m = tile_side(x.shape[1], x.shape[2], rate)
    a_t, g, _ = _pairs(m, x.dtype)
    tiles = _tiles(dy, m, m, rate, 0)
    products = (a_t.T @ tiles.reshape(m * m, -1)).reshape((m + 2) ** 2, -1, dy.shape[-1])
    filters = lax.dot_general(_inputs(x, m, rate), products, (((1,), (1,)), ((0,), (0,))))
    return (g.T @ filters.reshape(len(filters), -1)).reshape(3, 3, x.shape[-1], dy.shape[-1])


def _pairs(m: int, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The transforms over rows and columns at once: [m^2, a^2], [a^2, 9] and [a^2, a^2], a = m + 2."""
    a_t, g, b_t = (jnp.asarray(np.kron(matrix, matrix), dtype) for matrix in matrices(m))
    return a_t, g, b_t


def _inputs(x: jax.Array, m: int, rate: int) -> jax.Array:
    """B^T d B of every tile, [(m + 2)^2, tiles, C]."""
    tiles = _tiles(x, m + 2, m, rate, rate)
    # Without the barrier the tiles are gathered again inside the product.
    flat = lax.optimization_barrier(tiles).reshape(len(tiles), -1)
    return (_pairs(m, x.dtype)[2] @ flat).reshape(tiles.shape)


def _tiles(x: jax.Array, side: int, step: int, rate: int, before: int) -> jax.Array:
    """Square windows of a map that begins with `before` zeros: positions `rate` apart, neighbors `step` * `rate` apart.

    Rows are cut first and columns after them: each cut is a kernel of its own, which has to be compiled, and these are
    2 `side` instead of `side`^2.

    Returns [side^2, tiles, C], the tiles in the order of (image, row, row's phase, column, column's phase).
    """
    batch, height, width, channels = x.shape
    rows, columns = _count(height, step, rate) // rate, _count(width, step, rate) // rate
    pitch = step * rate
    sides = ((height, rows), (width, columns))
    widths = [(before, rate * (side - 1) + count * pitch - n - before) for n, count in sides]
    x = jnp.pad(x, ((0, 0), *widths, (0, 0)))
    width, lines, count = x.shape[2], batch * rows * rate, batch * rows * rate * columns * rate
    bands, windows = [], []
    for i in range(side):
        band = lax.slice_in_dim(x, rate * i, rate * i + rows * pitch, axis=1)
        band = lax.slice_in_dim(lax.reshape(band, (batch, rows, pitch, width, channels)), 0, rate, axis=2)
        bands.append(lax.reshape(band, (1, lines, width, channels)))
    x = lax.concatenate(bands, 0)
    for j in range(side):
        part = lax.slice_in_dim(x, rate * j, rate * j + columns * pitch, axis=2)
        part = lax.slice_in_dim(lax.reshape(part, (side, lines, columns, pitch, channels)), 0, rate, axis=3)
        windows.append(lax.reshape(part, (side, 1, count, channels)))
    return lax.reshape(lax.concatenate(windows, 1), (side**2, count, channels))


def _assemble(tiles: jax.Array, m: int, rate: int, shape: tuple[int, int, int]) -> jax.Array:
    """Tiles of results [m, m, tiles, D] in the order of `_tiles` -> the map [B, H, W, D]."""
    batch, height, width = shape
    rows, columns = _count(height, m, rate) // rate, _count(width, m, rate) // rate
    tiles = tiles.reshape(m, m, batch, rows, rate, columns, rate, -1)
    whole = tiles.transpose(2, 3, 0, 4, 5, 1, 6, 7).reshape(batch, rows * m * rate, columns * m * rate, -1)
    return whole[:, :height, :width]


def _count(n: int, m: int, rate: int) -> int:
    """Tiles along a side of n positions, of all phases: each phase has as many as the longest needs."""
    return rate * math.ceil(math.ceil(n / rate) / m)
