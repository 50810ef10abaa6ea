"""Gaussian filtering of scattered points on shifted permutohedral lattices (Adams, Baek and Davis 2010), without blur.

Adams et al. splat each point onto the D + 1 vertices of the lattice simplex around it, blur along the D + 1 lattice
axes, and slice with the weights of the splat. Splat and slice alone already smooth: on a lattice coarse enough for
their variance (two times 1/12 of a squared cell) to be that of the kernel, there is nothing left to blur. The lattice
then has a fifth of the vertices, no neighbors need to be found, and no value is lost on the way through vertices that
do not exist, as happens where points are sparse. How the result depends on where a point lies in its simplex is
averaged over `LATTICES` lattices, shifted against each other. The filter is K = scale sum_l S_l S_l^T / L: linear,
symmetric, positive semi-definite, and its own transpose.

Scale: for densely spread points filter(1) tends to that of the definition with (2 pi)^(D/2) / (volume of a cell).
Photographs fill their feature space thinly; `THIN` and `OCCUPIED` correct for that, so that the median over pixels of
filter(1) / exact filter(1) is within 2 % with the published widths (67, 3) and (121, 5). A lonely point gets 0.86 of
its own value on average (the definition: 1; Adams et al.'s lattice with the usual blur: about 0.5).
"""

import functools
import math
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LATTICES = 2
# The factor on the scale for dense points, fitted on photographs: it falls with vertices per point and lattice.
THIN, OCCUPIED = 1.138, -0.139
CAPACITIES = (1 / 32, 1 / 16, 1 / 4, 1)  # of (D + 1) * L * N vertices, the most there can be
BLOCK = 6  # channels filtered at once: wider rows are added up several times slower (XLA on CPU)
CHUNK = 2048  # points splatted at once
_EMPTY = np.int32(2**31 - 1)


@flax.struct.dataclass
class Lattice:
    """Which vertices each point touches, and how much.

    Attributes:
      vertices: int32 [N, L * (D + 1)], numbered from 0 in order of first use.
      weights: [N, L * (D + 1)], barycentric; each lattice's sum to 1.
      count: int32 [], the vertices in use.
      scale: [], the factor of the filter.
    """

    vertices: jax.Array
    weights: jax.Array
    count: jax.Array
    scale: jax.Array


def build(features: jax.Array) -> Lattice:
    """Finds the lattices' vertices around features [N, D], already divided by their standard deviations.

    Works inside jit; memory is linear in N. Gradients do not reach the features. Keys are compared exactly, so distinct
    vertices are never taken for one, whatever the range of the features (as far as float32 tells points apart).
    """
    features = lax.stop_gradient(features)
    features = features - features.min(axis=0)
    points, dimensions = features.shape
    parts = [_simplex(features, shift) for shift in range(LATTICES)]
    base, rank, weights = lax.optimization_barrier(tuple(zip(*parts, strict=True)))
    vertices, count = _distinct(base, rank)
    scale = (2 * math.pi) ** (dimensions / 2) / _cell_volume(dimensions) / LATTICES
    scale = scale * (THIN + OCCUPIED * count / (points * LATTICES))
    weights = jnp.stack([w for part in weights for w in part], axis=1)
    return Lattice(vertices, weights, count, scale.astype(features.dtype))


@jax.custom_vjp
def apply(structure: Lattice, values: jax.Array) -> jax.Array:
    """Filters values [N, C]; returns [N, C]. Cost follows the vertices in use (one of `CAPACITIES`)."""
    points, per_point = structure.vertices.shape
    most = points * per_point
    sizes = sorted({math.ceil(most * part / 64) * 64 for part in CAPACITIES if part < 1} | {most})
    sizes = [size for size in sizes if size <= most]
    branch = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), structure.count)

    def filtered(size: int, values: jax.Array) -> jax.Array:
        blocks = [values[:, c : c + BLOCK] for c in range(0, values.shape[1], BLOCK)]
        return jnp.concatenate([_splat_and_slice(structure, block, size) for block in blocks], axis=1)

    out = lax.switch(branch, [lambda v, s=size: filtered(s, v) for size in sizes], values)
    return structure.scale * out


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


def _splat_and_slice(structure: Lattice, values: jax.Array, size: int) -> jax.Array:
    points, per_point = structure.vertices.shape
    chunk = min(CHUNK, points)

    def splat(n: jax.Array, grid: jax.Array) -> jax.Array:
        # The last chunk is moved back to end with the points; what the one before it has done is not done again.
        start = jnp.minimum(n * chunk, points - chunk)
        part = [lax.dynamic_slice_in_dim(x, start, chunk) for x in (structure.vertices, structure.weights, values)]
        fresh = (start + jnp.arange(chunk) >= n * chunk)[:, None]
        added = (jnp.where(fresh, part[2], 0)[:, None] * part[1][..., None]).reshape(chunk * per_point, -1)
        return grid.at[part[0].reshape(-1)].add(added, mode="promise_in_bounds")

    # In chunks, so that the products are still in the cache when they are added up: three times as fast.
    grid = jnp.zeros((size, values.shape[1]), values.dtype)
    grid = lax.fori_loop(0, -(-points // chunk), splat, grid)
    # One vertex of each point at a time: nothing of size [N, D + 1, C] is stored.
    return sum(
        grid.at[structure.vertices[:, k]].get(mode="promise_in_bounds") * structure.weights[:, k, None]
        for k in range(per_point)
    )


def _cell_volume(dimensions: int) -> float:
    """Volume per vertex in feature space: that of (D + 1) A*_D over the D-th power of the scale in `_simplex`."""
    return (dimensions + 1) ** -0.5 * 6 ** (dimensions / 2)


def _simplex(features: jax.Array, shift: int) -> tuple[list[jax.Array], ...]:
    """The simplex around each point (Adams et al., section 3.1) of one lattice, as lists of D + 1 arrays [N].

    Returns:
      base: int32, the remainder-0 vertex divided by D + 1.
      rank: int32, 0 for the coordinate that is furthest above the base.
      weights: of the vertex with remainder k = 0, ..., D.
    """
    dimensions = features.shape[1]
    order = dimensions + 1
    # A lattice vertex per 6 ** (D / 2) / sqrt(D + 1): splat and slice then have the variance 1 of the kernel.
    axis = np.arange(1, order)
    rotation = np.zeros((order, dimensions))
    for j in axis:
        rotation[:j, j - 1] = 1
        rotation[j, j - 1] = -j
    rotation *= order / np.sqrt(6) / np.sqrt(axis * (axis + 1))
    # A full shift is to the deepest hole of the lattice: the middle of a simplex.
    hole = (dimensions / 2 - np.arange(order)) * 2 * shift / LATTICES
    elevated = [
        sum(float(rotation[i, j]) * features[:, j] for j in range(max(i - 1, 0), dimensions)) + float(hole[i])
        for i in range(order)
    ]
    # Each barrier keeps XLA from computing what is before it anew for everything after it.
    elevated = lax.optimization_barrier(elevated)
    nearest = [jnp.round(e / order) for e in elevated]
    above = lax.optimization_barrier([e - n * order for e, n in zip(elevated, nearest, strict=True)])
    total = sum(n.astype(jnp.int32) for n in nearest)
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


def _distinct(base: Sequence[Sequence[jax.Array]], rank: Sequence[Sequence[jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Numbers the distinct vertices of simplices given by base and rank, [L][D + 1] arrays [N].

    Returns:
      vertices: int32 [N, L * (D + 1)].
      count: int32 [].
    """
    lattices, order = len(base), len(base[0])
    dimensions = order - 1
    points = base[0][0].shape[0]
    # Vertex k's coordinate i is (D + 1) (base_i - [rank_i > D - k]) + k; the last coordinate follows from the others.
    lowest = [functools.reduce(jnp.minimum, (b[i].min() for b in base)) for i in range(dimensions)]
    highest = [functools.reduce(jnp.maximum, (b[i].max() for b in base)) for i in range(dimensions)]
    bits = [32 - lax.clz(high - low + 1) for low, high in zip(lowest, highest, strict=True)]
    tag_bits = max(1, math.ceil(math.log2(order * lattices)))

    # A key is one field per coordinate, each at its place in one of the key's words. A coordinate may be lowered by one
    # without a borrow, as the smallest base is 1.
    starts, start = [], jnp.int32(tag_bits)
    for width in bits:
        start = jnp.where((start < 32) & (start + width > 32), 32, start)
        starts.append(start)
        start += width

    def unit(place: jax.Array, word: int) -> jax.Array:
        inside = (place >= 32 * word) & (place < 32 * word + 32)
        return jnp.where(inside, jnp.uint32(1) << jnp.clip(place - 32 * word, 0, 31).astype(jnp.uint32), jnp.uint32(0))

    remainder = jnp.arange(order)
    tag = (order * jnp.arange(lattices)[:, None] + remainder).astype(jnp.uint32)
    tag = jnp.broadcast_to(tag, (points, lattices, order))
    base = jnp.stack([jnp.stack([b[i] - lowest[i] + 1 for i in range(dimensions)], axis=1) for b in base], axis=1)
    rank = jnp.stack([jnp.stack(r[:dimensions], axis=1) for r in rank], axis=1)
    base, rank = lax.optimization_barrier((base, rank))

    def coordinate(i: int) -> jax.Array:
        return (base[:, :, None, i] - (rank[:, :, None, i] > dimensions - remainder)).astype(jnp.uint32)

    def packed() -> jax.Array:
        units = [[unit(place, word) for place in starts] for word in range(2)]
        words = [sum(coordinate(i) * unit_of[i] for i in range(dimensions)) for unit_of in units]
        return _first_use([(words[0] + tag).reshape(-1), words[1].reshape(-1)])

    def apart() -> jax.Array:
        return _first_use([tag.reshape(-1), *(coordinate(i).reshape(-1) for i in range(dimensions))])

    owner = lax.cond(start <= 64, packed, apart)
    first = owner == jnp.arange(owner.shape[0], dtype=jnp.int32)
    number = jnp.cumsum(first.astype(jnp.int32)) - 1
    return number[owner].reshape(points, lattices * order), number[-1] + 1


def _first_use(words: Sequence[jax.Array]) -> jax.Array:
    """For each key (one uint32 word [E] or several), the index of the first equal key, by open addressing.

    In each round every key that has no owner yet asks for a slot; the first to ask for an empty one owns it for good,
    and keys equal to the owner's are done. The table has more slots than there are keys, so all get one.
    """
    entries = words[0].shape[0]
    slots = 1 << max(4, math.ceil(math.log2(1.5 * entries)))
    keys = lax.optimization_barrier(jnp.stack(words, axis=1))
    hashed = lax.optimization_barrier(_hash(words))
    index = jnp.arange(entries, dtype=jnp.int32)

    def attempt(table, owner, hashed, keys_here, index):
        """One round for the given entries; `owner` is _EMPTY where there is none yet."""
        free = (owner == _EMPTY) & (table[hashed] == _EMPTY)
        table = table.at[jnp.where(free, hashed, slots)].min(index, mode="drop")
        found = table[hashed]
        equal = (keys[found] == keys_here).all(axis=1)
        return table, jnp.where((owner == _EMPTY) & equal, found, owner)

    table = jnp.full(slots, _EMPTY)
    table = table.at[hashed].min(index, mode="promise_in_bounds")
    found = table[hashed]
    owner = jnp.where((keys[found] == keys).all(axis=1), found, _EMPTY)

    # Few keys are left after the first round: the next rounds go over these alone, so many at a time.
    room = max(64, entries // 8)

    def left(state):
        return (state[1] == _EMPTY).any()

    def some(state):
        table, owner = state
        chosen = jnp.nonzero(owner == _EMPTY, size=room, fill_value=entries)[0].astype(jnp.int32)
        here = jnp.minimum(chosen, entries - 1)
        part_owner = jnp.where(chosen < entries, _EMPTY, 0)
        slot, keys_here = hashed[here], keys[here]

        def again(inner):
            table, part_owner, slot = inner
            slot = (slot + 1) & (slots - 1)
            table, part_owner = attempt(table, part_owner, slot, keys_here, here)
            return table, part_owner, slot

        table, part_owner, _ = lax.while_loop(lambda s: (s[1] == _EMPTY).any(), again, (table, part_owner, slot))
        return table, owner.at[chosen].set(part_owner, mode="drop")

    return lax.while_loop(left, some, (table, owner))[1]


def _hash(words: Sequence[jax.Array]) -> jax.Array:
    """Slot numbers, int32 [E]."""
    slots = 1 << max(4, math.ceil(math.log2(1.5 * words[0].shape[0])))
    h = jnp.full(words[0].shape, 0x9E3779B9, jnp.uint32)
    for word in words:
        h = (h ^ word) * jnp.uint32(0x85EBCA6B)
        h ^= h >> 15
        h = h * jnp.uint32(0xC2B2AE35)
        h ^= h >> 13
    return (h & jnp.uint32(slots - 1)).astype(jnp.int32)
