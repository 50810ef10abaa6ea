"""Gaussian filtering summed over all pairs of points, in tiles: what the other filters are tested against.

`apply` computes out_i = sum_j exp(-|f_i - f_j|^2 / 2) v_j, i = j included, for features already divided by their
standard deviations (Kraehenbuhl and Koltun 2011, Eq. 3). Nothing of size N x N is stored, forward or backward.
"""

import dataclasses
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.target import platform

# Points per tile. On a CPU a 512 x 512 float32 block of the kernel is 1 MiB and stays in a core's L2 cache. On a GPU
# each pair of tiles takes several launches: a 500 x 375 image makes 37 x 37 pairs there instead of 367 x 367.
TILES = {"cpu": 512, "gpu": 5120}


@flax.struct.dataclass
class Structure:
    """Points in tiles.

    Attributes:
      features: [tiles, T, D], centred; padding repeats a point and always carries zero values.
      order: [tiles * T], the padded point in each place, or None for the caller's order.
      step: [] for features of thousands of standard deviations (see `_kernel`), or None.
      points: N, before padding.
      reach: squared distance beyond which pairs of tiles are skipped; None = nothing is skipped.
    """

    features: jax.Array
    order: jax.Array | np.ndarray | None
    step: jax.Array | None
    points: int = flax.struct.field(pytree_node=False)
    reach: float | None = flax.struct.field(pytree_node=False)


def build(features: jax.Array, *, cutoff: float | None = None, tile: int | None = None, far: bool = True) -> Structure:
    """Groups points into tiles.

    Args:
      features: [N, D], divided by their standard deviations; any D >= 1.
      cutoff: None computes the definition. A number in (0, 1) orders the points by recursive median splits, so that
        tiles are compact in feature space, and skips pairs of tiles between which no kernel value can reach it; every
        pair with a kernel value of at least `cutoff` is still counted.
      tile: maximum number of points per tile; None = the platform's value in `TILES`.
      far: whether features may lie more than a hundred standard deviations apart in each dimension, which takes a third
        more time. Where False, an exponent is off by 1e-7 of their squared distance from the center.

    Returns:
      The structure for `apply`, differentiable in `features`.
    """
    points = features.shape[0]
    tile = TILES.get(platform(), TILES["cpu"]) if tile is None else tile
    # |a|^2 + |b|^2 - 2ab cancels: without centring, float32 moves single marginals by several percent.
    features = features - lax.stop_gradient(features.mean(0))
    tiles = math.ceil(points / tile)
    if cutoff is not None:
        tiles = 2 ** math.ceil(math.log2(tiles))
    size = math.ceil(points / tiles)
    features = jnp.pad(features, ((0, tiles * size - points), (0, 0)), mode="edge")
    order = None if cutoff is None else _median_splits(lax.stop_gradient(features), tiles)
    if order is not None:
        features = features[order]
    reach = None if cutoff is None else -2 * math.log(cutoff)
    step = None
    if far:
        step = jnp.maximum(jnp.abs(lax.stop_gradient(features)).max() / 1024, jnp.finfo(features.dtype).tiny)
    return Structure(features.reshape(tiles, size, -1), order, step, points, reach)


@jax.custom_vjp
def apply(structure: Structure, values: jax.Array) -> jax.Array:
    """Filters `values` [N, C]; returns [N, C]. Differentiable in the values and, through `build`, in the features."""
    tiled = _into_tiles(structure, values)

    def tile(a: jax.Array, b: jax.Array, _: jax.Array, v: jax.Array) -> jax.Array:
        return _product(_kernel(structure, a, b), v)

    return _out_of_tiles(structure, _over_pairs(structure, tiled, tile, values.shape[1]))


def transpose(structure: Structure, values: jax.Array) -> jax.Array:
    """The transposed filter, which is the filter itself: the kernel is symmetric."""
    return apply(structure, values)


def _forward(structure: Structure, values: jax.Array) -> tuple[jax.Array, tuple[Structure, jax.Array]]:
    return apply(structure, values), (structure, values)


def _backward(saved: tuple[Structure, jax.Array], grads: jax.Array) -> tuple[Structure, jax.Array]:
    structure, values = saved
    channels = values.shape[1]
    both = _into_tiles(structure, jnp.concatenate([values, grads], axis=1))

    # With A_ij = k_ij (g_i.v_j + v_i.g_j), the gradient of f_i is sum_j A_ij (f_j - f_i): one more pass over the
    # tiles gives it together with the gradient of the values, sum_j k_ij g_j.
    def tile(a: jax.Array, b: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
        kernel = _kernel(structure, a, b)
        swapped = jnp.concatenate([rows[:, channels:], rows[:, :channels]], axis=1)
        weights = kernel * _product(swapped, columns.T)
        ones = jnp.ones((b.shape[0], 1), b.dtype)
        return jnp.concatenate(
            [_product(kernel, columns[:, channels:]), _product(weights, jnp.concatenate([b, ones], axis=1))], axis=1
        )

    sums = _over_pairs(structure, both, tile, channels + structure.features.shape[-1] + 1)
    moved = sums[..., channels:-1] - sums[..., -1:] * structure.features
    order = None if structure.order is None else np.zeros(structure.order.shape, jax.dtypes.float0)
    step = None if structure.step is None else jnp.zeros_like(structure.step)
    gradient = dataclasses.replace(structure, features=moved.astype(structure.features.dtype), order=order, step=step)
    return gradient, _out_of_tiles(structure, sums[..., :channels]).astype(values.dtype)


apply.defvjp(_forward, _backward)


def _over_pairs(structure: Structure, tiled: jax.Array, tile: Callable[..., jax.Array], width: int) -> jax.Array:
    """Sums `tile(features_i, features_j, values_i, values_j)` over column tiles j, for every row tile i."""
    features = structure.features
    count, size, _ = features.shape
    low, high = features.min(1), features.max(1)

    def row(i: jax.Array) -> jax.Array:
        a, rows = features[i], tiled[i]
        active: int | jax.Array
        if structure.reach is None:
            columns, active = jnp.arange(count), count
        else:
            gap = jnp.maximum(0, jnp.maximum(low - high[i], low[i] - high))
            near = (gap**2).sum(1) <= structure.reach
            columns, active = jnp.nonzero(near, size=count, fill_value=0)[0], near.sum()

        def step(n: jax.Array, total: jax.Array) -> jax.Array:
            j = columns[n]
            return total + tile(a, features[j], rows, tiled[j])

        return lax.fori_loop(0, active, step, jnp.zeros((size, width), tiled.dtype))

    return lax.map(row, jnp.arange(count))


def _kernel(structure: Structure, a: jax.Array, b: jax.Array) -> jax.Array:
    """exp(-|a_i - b_j|^2 / 2) of two tiles [T, D]; [T, T]."""

    def exponent(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> jax.Array:
        """x.y over both sides' (x, y), less half of each side's own."""
        own = [(x * y).sum(1) / 2 for x, y in (one, other)]
        return _product(one[0], other[1].T) - own[0][:, None] - own[1][None]

    if structure.step is None:
        return jnp.exp(jnp.minimum(exponent((a, a), (b, b)), 0))
    step = structure.step

    def parts(f: jax.Array) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
        """f = w + r with w = step * whole: products of whole numbers up to 2^10 are exact, those with r are small."""
        whole = jnp.round(f / step)
        w = whole * step
        return (whole, whole), (jnp.concatenate([w, f - w], 1), jnp.concatenate([f - w, f], 1))

    (coarse_a, fine_a), (coarse_b, fine_b) = parts(a), parts(b)
    return jnp.exp(jnp.minimum(step**2 * exponent(coarse_a, coarse_b) + exponent(fine_a, fine_b), 0))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    # Accelerators would otherwise round to TF32 or bfloat16.
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _into_tiles(structure: Structure, values: jax.Array) -> jax.Array:
    count, size, _ = structure.features.shape
    values = jnp.pad(values, ((0, count * size - structure.points), (0, 0)))
    if structure.order is not None:
        values = values[structure.order]
    return values.reshape(count, size, -1)


def _out_of_tiles(structure: Structure, tiled: jax.Array) -> jax.Array:
    values = tiled.reshape(-1, tiled.shape[-1])
    if structure.order is not None:
        values = jnp.zeros_like(values).at[structure.order].set(values, unique_indices=True)
    return values[: structure.points]


def _median_splits(features: jax.Array, groups: int) -> jax.Array:
    """Orders points [M, D] so that each of `groups` (a power of two) equal runs is a box of a k-d tree; [M] indices."""
    points = features.shape[0]
    places = jnp.arange(points, dtype=jnp.int32)

    def split(level: jax.Array, order: jax.Array) -> jax.Array:
        run = places // (points >> level)
        placed = features[order]
        sides = jax.ops.segment_max(placed, run, groups) - jax.ops.segment_min(placed, run, groups)
        along = jnp.take_along_axis(placed, jnp.argmax(sides, axis=1)[run][:, None], axis=1)[:, 0]
        return lax.sort((run, along, order), num_keys=2)[2]

    return lax.fori_loop(0, groups.bit_length() - 1, split, places)
