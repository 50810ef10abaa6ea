"""Gaussian filtering of scattered points on shifted permutohedral lattices (Adams, Baek and Davis 2010), without blur.

Adams et al. splat each point onto the D + 1 vertices of the lattice simplex around it, blur along the D + 1 lattice
axes, and slice with the weights of the splat. Splat and slice alone already smooth: on a lattice coarse enough for
their variance (two times 1/12 of a squared cell) to be that of the kernel, there is nothing left to blur. The lattice
then has a fifth of the vertices, no neighbors need to be found, and no value is lost on the way through vertices that
do not exist, as happens where points are sparse. How the result depends on where a point lies in its simplex is
averaged over `LATTICES` lattices, shifted relative to each other. The filter is K = scale sum_l S_l S_l^T / L: linear,
symmetric, positive semi-definite, and its own transpose.

Scale: for densely spread points filter(1) tends to that of the definition with (2 pi)^(D/2) / (volume of a cell).
Photographs are thin in a space of position and color; `THIN` and `OCCUPIED` correct for that, from `THIN_FROM`
dimensions on, so that the median over pixels of filter(1) / exact filter(1) is within 2 % with the published widths
(67, 3) and (121, 5). An isolated point gets 0.86 of its own value on average (the definition: 1; Adams et al.'s lattice
with the usual blur: about 0.5).
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.crf.lattice_design import basis
from deeplab_jax.crf.vertices import number
from deeplab_jax.target import platform

LATTICES = 2
# The factor on the scale for dense points, fitted on photographs: it falls with vertices per point and lattice.
THIN, OCCUPIED = 1.138, -0.139
THIN_FROM = 5
CAPACITIES = (1 / 12, 1)  # of (D + 1) * L * N vertices, the maximum possible
LANES = 8  # rows of vertex values are whole multiples of this: others are added up several times slower (XLA on CPU)
CHUNK = 32768  # values splatted at once, of one vertex of each point; this many stay in the cache
TOLERANCE = 0.002  # change of a value below which `advance` does not splat it again


@flax.struct.dataclass
class Lattice:
    """The vertices that each point touches, and their weights.

    Attributes:
      vertices: int32, D + 1 arrays [L, N], numbered from 0.
      weights: D + 1 arrays [L, N], barycentric: their sum is 1. (XLA would compute one large array many times over.)
      count: int32 [], the vertices in use.
      scale: [], the factor of the filter.
    """

    vertices: tuple[jax.Array, ...]
    weights: tuple[jax.Array, ...]
    count: jax.Array
    scale: jax.Array


def build(features: jax.Array) -> Lattice:
    """Finds the lattices' vertices around features [N, D], already divided by their standard deviations.

    Works inside jit; memory is linear in N. Gradients do not reach the features. Keys are compared exactly, so distinct
    vertices are never merged, whatever the range of the features (as far as float32 distinguishes points).
    """
    features = lax.stop_gradient(features)
    features = features - features.min(axis=0)
    points, dimensions = features.shape
    base, rank, weights = lax.optimization_barrier(_simplex(features))
    vertices, count = number(base, rank)
    scale = (2 * math.pi) ** (dimensions / 2) / _cell_volume(dimensions) / LATTICES
    if dimensions >= THIN_FROM:
        scale = scale * (THIN + OCCUPIED * count / (points * LATTICES))
    return Lattice(tuple(vertices), tuple(weights), count, jnp.asarray(scale, features.dtype))


@flax.struct.dataclass
class Splatted:
    """The state of `advance` between calls.

    Attributes:
      grid: [M, C'], the sums at the vertices; C' >= C, see `LANES`.
      values: [L, N, C], the values in the sums of each lattice; [L, 0, C] where all are splatted each time.
    """

    grid: jax.Array
    values: jax.Array


@jax.custom_vjp
def apply(structure: Lattice, values: jax.Array) -> jax.Array:
    """Filters values [N, C]; returns [N, C]. The cost depends on the vertices in use (one of `capacities`)."""
    sizes = capacities()
    branch = sum(((structure.count > size(structure, c)).astype(jnp.int32) for c in sizes[:-1]), jnp.int32(0))
    return lax.switch(branch, [lambda v, c=c: _splat_and_slice(structure, v, c) for c in sizes], values)


def capacities() -> tuple[float, ...]:
    """Those of `CAPACITIES` that a program has a branch for: off CPUs, clearing room that is not used is cheap."""
    return CAPACITIES[-1:] if _at_once() else CAPACITIES


def transpose(structure: Lattice, values: jax.Array) -> jax.Array:
    """The transposed filter, which is the filter itself."""
    return apply(structure, values)


def _apply_forward(structure: Lattice, values: jax.Array) -> tuple[jax.Array, Lattice]:
    return apply(structure, values), structure


def _apply_backward(structure: Lattice, gradient: jax.Array) -> tuple[Lattice, jax.Array]:
    def zero(leaf: jax.Array) -> jax.Array | np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, structure), transpose(structure, gradient)


apply.defvjp(_apply_forward, _apply_backward)


def size(structure: Lattice, capacity: float) -> int:
    """The number of vertices that fit into a capacity."""
    most = len(structure.vertices) * structure.vertices[0].size
    return min(most, math.ceil(most * capacity / 64) * 64)


def start(structure: Lattice, channels: int, capacity: float) -> Splatted:
    """The empty state, with room for `size(structure, capacity)` vertices, which must be at least `structure.count`."""
    dtype = structure.weights[0].dtype
    grid = jnp.zeros((size(structure, capacity), _width(channels)), dtype)
    lattices, points = structure.vertices[0].shape
    return Splatted(grid, jnp.zeros((lattices, 0 if _at_once() else points, channels), dtype))


def advance(
    structure: Lattice, splatted: Splatted, values: jax.Array, factor: jax.Array, lattice: int | jax.Array
) -> tuple[Splatted, jax.Array]:
    """Filters factor * values, [N, 1] and [N, C], on one lattice, splatting only what changed by more than `TOLERANCE`.

    The mean of the results of all lattices is the filter. On GPUs and TPUs everything is splatted: to find what changed
    takes more sequential steps there than it saves.

    Returns:
      The new state, and the filtered values [N, C], of values each at most `TOLERANCE` off. Not differentiable.
    """
    if _at_once():
        near, shares = (jnp.stack([x[lattice] for x in xs]) for xs in (structure.vertices, structure.weights))
        out = _scatter_and_gather(near, shares, jnp.zeros_like(splatted.grid), values * factor)
        return splatted, LATTICES * structure.scale * out
    points = values.shape[0]
    chunk = _chunk(points, values.shape[1])
    before = splatted.values[lattice]
    changed = (jnp.abs(values - before) > TOLERANCE).any(axis=1)
    place = jnp.cumsum(changed.astype(jnp.int32)) - 1
    room = -(-points // chunk) * chunk
    index = jnp.full(room, points, jnp.int32)  # of the points that changed; the rest: a row of zeros at the end
    index = index.at[jnp.where(changed, place, room)].set(jnp.arange(points, dtype=jnp.int32), mode="drop")
    change = (values - before) * factor
    change = jnp.pad(change, ((0, 1), (0, _width(values.shape[1]) - values.shape[1])))

    def splat(n: jax.Array, grid: jax.Array) -> jax.Array:
        at = lax.dynamic_slice_in_dim(index, n * chunk, chunk)
        take = lambda x: x.at[lattice, jnp.minimum(at, points - 1)].get(mode="promise_in_bounds")  # noqa: E731
        return _add(grid, structure, take, change.at[at].get(mode="promise_in_bounds"))

    grid = lax.fori_loop(0, (place[-1] + chunk) // chunk, splat, splatted.grid)
    sent = splatted.values.at[lattice].set(jnp.where(changed[:, None], values, before))
    near, shares = jax.tree.map(lambda x: x[lattice][None], (structure.vertices, structure.weights))
    return Splatted(grid, sent), _slice(near, shares, LATTICES * structure.scale, grid, values.shape[1])


def _splat_and_slice(structure: Lattice, values: jax.Array, capacity: float) -> jax.Array:
    points, channels = values.shape
    if _at_once():
        near, shares = (jnp.stack(xs) for xs in (structure.vertices, structure.weights))
        grid = start(structure, channels, capacity).grid.astype(values.dtype)
        return structure.scale * _scatter_and_gather(near, shares, grid, values)
    chunk = _chunk(points, channels)
    padded = jnp.pad(values, ((0, 0), (0, _width(channels) - channels)))

    def splat(n: jax.Array, grid: jax.Array) -> jax.Array:
        # The last chunk is moved back to end with the points; points done by the previous chunk are not repeated.
        at = jnp.minimum(n * chunk, points - chunk)
        take = lambda x: lax.dynamic_slice_in_dim(x, at, chunk, axis=1)  # noqa: E731
        rows = lax.dynamic_slice_in_dim(padded, at, chunk)
        return _add(grid, structure, take, jnp.where((at + jnp.arange(chunk) >= n * chunk)[:, None], rows, 0))

    # In chunks, so that the products are still in the cache when they are added up: three times as fast.
    grid = lax.fori_loop(0, -(-points // chunk), splat, start(structure, channels, capacity).grid.astype(values.dtype))
    return _slice(structure.vertices, structure.weights, structure.scale, grid, channels)


def _at_once() -> bool:
    """Whether a lattice is filtered by one scatter and one gather, not in chunks made for a CPU's cache."""
    return platform() in ("gpu", "tpu")


def _scatter_and_gather(vertices: jax.Array, weights: jax.Array, grid: jax.Array, values: jax.Array) -> jax.Array:
    """Splats values [N, C] onto an empty grid [M, C] and slices, by vertices and weights [..., N]; [N, C]."""
    shares = weights[..., None]
    at = vertices.reshape(-1)
    grid = grid.at[at].add((shares * values).reshape(-1, values.shape[1]), mode="promise_in_bounds")
    sliced = grid.at[at].get(mode="promise_in_bounds").reshape(*vertices.shape, -1) * shares
    return sliced.sum(tuple(range(vertices.ndim - 1)))


def _add(grid: jax.Array, structure: Lattice, take: Callable[[jax.Array], jax.Array], values: jax.Array) -> jax.Array:
    """Splats values [n, C'] of the points that `take` picks from [L, N], of one lattice [n] or of all [L, n]."""
    vertices, weights = (jnp.stack([take(x) for x in xs]) for xs in (structure.vertices, structure.weights))
    added = (values * weights[..., None]).reshape(-1, grid.shape[1])
    return grid.at[vertices.reshape(-1)].add(added, mode="promise_in_bounds")


def _slice(
    vertices: Sequence[jax.Array], weights: Sequence[jax.Array], scale: jax.Array, grid: jax.Array, channels: int
) -> jax.Array:
    # One vertex of each point at a time: nothing of size [N, D + 1, C] is stored.
    parts = (
        grid.at[v[n]].get(mode="promise_in_bounds") * w[n, :, None]
        for v, w in zip(vertices, weights, strict=True)
        for n in range(v.shape[0])
    )
    total = functools.reduce(operator.add, parts)
    return scale * total[:, :channels]


def _chunk(points: int, channels: int) -> int:
    return min(max(64, CHUNK // _width(channels)), points)


def _width(channels: int) -> int:
    return channels if channels <= 4 or _at_once() else -(-channels // LANES) * LANES


def _cell_volume(dimensions: int) -> float:
    """Volume per vertex in feature space: that of (D + 1) A*_D over the D-th power of the scale in `_simplex`."""
    return (dimensions + 1) ** -0.5 * 6 ** (dimensions / 2)


def _simplex(features: jax.Array) -> tuple[list[jax.Array], ...]:
    """The simplices around each point (Adams et al., section 3.1), as lists of D + 1 arrays [L, N].

    Returns:
      base: int32, the remainder-0 vertex divided by D + 1.
      rank: int32, 0 for the coordinate that is furthest above the base.
      weights: of the vertex with remainder k = 0, ..., D.
    """
    dimensions = features.shape[1]
    order = dimensions + 1
    rotation = basis(dimensions)
    # A full shift is to the deepest hole of the lattice: the middle of a simplex.
    shift = 2 * jnp.arange(LATTICES, dtype=features.dtype)[:, None] / LATTICES
    elevated = [
        sum(float(rotation[i, j]) * features[:, j] for j in range(max(i - 1, 0), dimensions))
        + (dimensions / 2 - i) * shift
        for i in range(order)
    ]
    # Each barrier keeps XLA from recomputing the operations before it for everything after it.
    elevated = lax.optimization_barrier(elevated)
    nearest = [jnp.round(e / order) for e in elevated]
    above = lax.optimization_barrier([e - n * order for e, n in zip(elevated, nearest, strict=True)])
    total = functools.reduce(operator.add, (n.astype(jnp.int32) for n in nearest))
    rank = [total] * order
    for i in range(order):
        for j in range(i):
            j_first = above[j] >= above[i]
            rank[i] += j_first
            rank[j] += ~j_first
    step = [(r < 0).astype(jnp.int32) - (r > dimensions).astype(jnp.int32) for r in rank]
    base = [n.astype(jnp.int32) + s for n, s in zip(nearest, step, strict=True)]
    rank = [r + s * order for r, s in zip(rank, step, strict=True)]
    above = [(a / order - s.astype(a.dtype)) for a, s in zip(above, step, strict=True)]
    base, rank, above = lax.optimization_barrier((base, rank, above))
    by_rank = [sum(jnp.where(rank[i] == r, above[i], 0) for i in range(order)) for r in range(order)]
    by_rank = lax.optimization_barrier(by_rank)
    weights = [1 + by_rank[-1] - by_rank[0]] + [by_rank[-1 - k] - by_rank[order - k] for k in range(1, order)]
    return base, rank, weights
