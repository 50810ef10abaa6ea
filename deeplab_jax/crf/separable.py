"""A bilateral filter along rows and columns: a coarse approximation made of dense products only.

One pass sums over the pixels of the same row, one over those of the same column, each with the full kernel (position
and colour) of its pair; both orders are averaged. A pair that shares neither row nor column is thus reached through a
corner pixel, and counts only as far as that pixel's colour resembles both. On a 500 x 375 photograph with 21 labels
and published parameters, 4 to 8 % of the labels differ from `exact` after ten iterations, about half of the labels that
the CRF changes; at 125 x 94, 1.5 % differ where the CRF changes 2.1 %: never the default.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax


@flax.struct.dataclass
class Structure:
    """Features [H, W, D] of the pixels, centred."""

    features: jax.Array


def build(features: jax.Array, *, grid: tuple[int, int]) -> Structure:
    """Prepares the filter.

    Args:
      features: [H * W, D], divided by their standard deviations.
      grid: (H, W).
    """
    features = features - lax.stop_gradient(features.mean(0))
    return Structure(features.reshape(*grid, -1))


def apply(structure: Structure, values: jax.Array) -> jax.Array:
    """Filters `values` [H * W, C]; returns [H * W, C]. Differentiable in the values and the features."""
    features = structure.features
    turned = features.swapaxes(0, 1)
    grid = values.reshape(*features.shape[:2], -1)
    rows_first = _along_rows(turned, _along_rows(features, grid).swapaxes(0, 1)).swapaxes(0, 1)
    columns_first = _along_rows(features, _along_rows(turned, grid.swapaxes(0, 1)).swapaxes(0, 1))
    return (0.5 * (rows_first + columns_first)).reshape(values.shape)


def transpose(structure: Structure, values: jax.Array) -> jax.Array:
    """The transposed filter, which is the filter itself: averaging both orders makes it symmetric."""
    return apply(structure, values)


def _along_rows(features: jax.Array, values: jax.Array) -> jax.Array:
    """Sums within each row: features [R, n, D], values [R, n, C]; memory for one row's n x n kernel at a time."""

    @jax.checkpoint
    def row(pair: tuple[jax.Array, jax.Array]) -> jax.Array:
        f, v = pair
        half = 0.5 * (f**2).sum(1)
        kernel = jnp.exp(jnp.minimum(jnp.matmul(f, f.T, precision=lax.Precision.HIGHEST) - half[:, None] - half, 0))
        return jnp.matmul(kernel, v, precision=lax.Precision.HIGHEST)

    return lax.map(row, (features, values), batch_size=min(8, features.shape[0]))
