"""Numbers the distinct vertices that simplices of permutohedral lattices touch.

All keys are compared exactly: a hash decides only where to look first, so distinct vertices are never merged.

A photograph's pixels are in far fewer simplices than there are pixels, and their remainder-0 vertices (bases) are fewer
still. So bases are made unique first, one key per point; then, of the 2^(D+1) vertices around each base, those in use.
If there are too many bases for this to be faster, or too many dimensions, all vertices of all points are made unique.

TPUs scatter and gather slowly, and their compiler takes minutes for loops that do: there, all vertices are sorted.
"""

import functools
import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.target import platform

FEW_BASES = 1 / 8  # bases per point and lattice up to which they are made unique first
FEW_PAIRS = 1 / 4  # pairs of a base and a vertex around it, per point, lattice and vertex of a simplex
_EMPTY = np.int32(2**31 - 1)


def number(base: Sequence[jax.Array], rank: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Numbers the distinct vertices of simplices from 0.

    Vertex k's coordinate i is (D + 1) (base_i - [rank_i > D - k]) + k; the last one follows from the others.

    Args:
      base: D + 1 arrays int32 [L, N], of L lattices.
      rank: likewise, 0..D.

    Returns:
      vertices: int32, D + 1 arrays [L, N].
      count: int32 [].
    """
    if platform() == "tpu":
        return _number_by_sorting(base, rank)
    order = len(base)
    lattices, points = base[0].shape
    keys = _Keys(base)
    # Bit i of a vertex's mask is set if its coordinate i is lowered.
    lowered = ([(r >= order - k).astype(jnp.int32) << i for i, r in enumerate(rank)] for k in range(order))
    masks = [functools.reduce(operator.add, bits).reshape(-1) for bits in lowered]
    masks = lax.optimization_barrier(masks)

    def all_of_all_points() -> tuple[list[jax.Array], jax.Array]:
        lowered = [
            jnp.concatenate([c - (m >> i & 1).astype(jnp.uint32) for m in masks])
            for i, c in enumerate(keys.coordinates)
        ]
        remainder = jnp.concatenate([keys.tag + k for k in range(order)])
        vertices, count = _numbered(_first_use([remainder, *lowered]))
        return list(vertices.reshape(order, -1)), count

    def bases_first() -> tuple[list[jax.Array], jax.Array, jax.Array]:
        return _around_bases(keys, masks, owners, number_of_base)

    if order > 6:
        vertices, count = all_of_all_points()
    else:
        owners = _first_use(keys.words)
        number_of_base, bases = _numbered(owners)
        few = keys.fits & (bases <= _room(points * lattices, FEW_BASES))
        nothing = [jnp.zeros(lattices * points, jnp.int32)] * order, jnp.int32(0), False
        vertices, count, enough = lax.cond(few, bases_first, lambda: nothing)
        vertices, count = lax.cond(enough, lambda: (vertices, count), all_of_all_points)
    return [v.reshape(lattices, points) for v in vertices], count


def _number_by_sorting(base: Sequence[jax.Array], rank: Sequence[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """As `number`: each lattice's vertices of each remainder, which differ from all others, in the order of their keys.

    One sort in a loop over coordinates, the last one first, each keeping the order of equals: one sort of all
    coordinates at once would be faster to run, and takes the compiler several minutes.
    """
    order, (lattices, points) = len(base), base[0].shape
    rows = lattices * order, points
    keys = jnp.stack(
        [
            jnp.concatenate([(b - (r >= order - k)).reshape(-1) for k in range(order)])
            for b, r in zip(base[:-1], rank[:-1], strict=True)
        ]
    )
    places = jnp.arange(keys.shape[1], dtype=jnp.int32).reshape(rows)

    def by_one(n: jax.Array, place: jax.Array) -> jax.Array:
        key = keys[n].at[place.reshape(-1)].get(mode="promise_in_bounds").reshape(rows)
        return lax.sort((key, places, place), dimension=1, num_keys=2)[2]

    place = lax.fori_loop(0, order - 1, by_one, places).reshape(-1)
    ordered = keys.at[:, place].get(mode="promise_in_bounds").reshape(-1, *rows)
    differs = jnp.pad((ordered[..., 1:] != ordered[..., :-1]).any(0), ((0, 0), (1, 0)), constant_values=True)
    within = jnp.cumsum(differs.astype(jnp.int32), axis=1)  # of all rows at once: four times as long to compile
    counts = within[:, -1:]
    numbers = (within - 1 + jnp.cumsum(counts, axis=0) - counts).reshape(-1)
    vertices = jnp.zeros_like(place).at[place].set(numbers, unique_indices=True, mode="promise_in_bounds")
    return list(vertices.reshape(order, lattices, points)), counts.sum()


class _Keys:
    """Bases as keys of two words, one field per coordinate, each field within one of the words.

    Attributes:
      coordinates: D arrays uint32 [L * N], from 1 up, so that lowering one by 1 borrows from no other field.
      words: two arrays uint32 [L * N]; `tag` is in the lowest bits.
      lowering: two arrays uint32 [2^(D+1)]: what is subtracted from a base for the vertex with a given mask.
      tag: uint32 [L * N], (D + 1) times the lattice.
      fits: whether 64 bits suffice.
    """

    def __init__(self, base: Sequence[jax.Array]):
        order, (lattices, points) = len(base), base[0].shape
        base = [b.reshape(-1) for b in base[:-1]]
        lowest, highest = [b.min() for b in base], [b.max() for b in base]
        bits = [32 - lax.clz(high - low + 1) for low, high in zip(lowest, highest, strict=True)]
        places, place = [], jnp.int32(max(1, math.ceil(math.log2(order * lattices))))
        for width in bits:
            place = jnp.where((place < 32) & (place + width > 32), 32, place)
            places.append(place)
            place += width
        self.fits = place <= 64
        self.coordinates = [(b - low + 1).astype(jnp.uint32) for b, low in zip(base, lowest, strict=True)]
        self.tag = lax.broadcasted_iota(jnp.uint32, (lattices, points), 0).reshape(-1) * order
        units = [[_unit(place, word) for place in places] for word in range(2)]
        self.words = [
            sum((c * u for c, u in zip(self.coordinates, of_word, strict=True)), self.tag if n == 0 else jnp.uint32(0))
            for n, of_word in enumerate(units)
        ]
        mask = jnp.arange(1 << min(order, 6), dtype=jnp.uint32)
        self.lowering = [
            functools.reduce(operator.add, ((mask >> i & 1) * u for i, u in enumerate(of_word))) for of_word in units
        ]
        self.lowering[0] -= lax.population_count(mask)  # the remainder of a vertex is the number of lowered coordinates


def _around_bases(keys: _Keys, masks: list, owners: jax.Array, base: jax.Array) -> tuple:
    """Numbers the vertices around bases, as [D + 1, L * N], and whether they fitted."""
    order, entries = len(masks), base.shape[0]
    around = 1 << order
    slots = [base * around + mask for mask in masks]
    used = jnp.zeros(_room(entries, FEW_BASES) * around, jnp.uint8)
    for slot in slots:
        used = used.at[slot].set(1, mode="promise_in_bounds")
    # Which of the vertices around a base are in use, as bits: their numbers are counts of bits.
    half = min(around, 32)
    bits = used.reshape(-1, around // half, half).astype(jnp.uint32) << jnp.arange(half, dtype=jnp.uint32)
    bits = lax.optimization_barrier(tuple(bits.sum(-1, dtype=jnp.uint32).T))
    counts = [lax.population_count(b).astype(jnp.int32) for b in bits]
    total = functools.reduce(operator.add, counts)
    offset = jnp.cumsum(total) - total
    pairs = offset[-1] + total[-1]
    first = [offset, offset + counts[0]][: len(bits)]

    def place(mask: jax.Array) -> jax.Array:
        below = (jnp.uint32(1) << (mask % half).astype(jnp.uint32)) - 1
        at = [
            f[base] + lax.population_count(b[base] & below).astype(jnp.int32) for f, b in zip(first, bits, strict=True)
        ]
        return at[0] if len(at) == 1 else jnp.where(mask < half, at[0], at[1])

    room = _room(entries * order, FEW_PAIRS)
    places = lax.optimization_barrier([place(mask) for mask in masks])
    slot_of = jnp.zeros(room, jnp.int32)
    for at, slot in zip(places, slots, strict=True):
        slot_of = slot_of.at[at].set(slot, mode="drop")
    index = jnp.arange(entries, dtype=jnp.int32)
    point_of = jnp.zeros(_room(entries, FEW_BASES), jnp.int32)
    point_of = point_of.at[jnp.where(owners == index, base, entries)].set(index, mode="drop")
    point, mask = point_of[slot_of // around], slot_of % around
    words = [w[point] - low[mask] for w, low in zip(keys.words, keys.lowering, strict=True)]
    vertex, count = _numbered(_first_use(words, pairs), pairs)
    return [vertex.at[at].get(mode="clip") for at in places], count, pairs <= room


def _room(most: int, part: float) -> int:
    return max(64, math.ceil(most * part))


def _unit(place: jax.Array, word: int) -> jax.Array:
    inside = (place >= 32 * word) & (place < 32 * word + 32)
    return jnp.where(inside, jnp.uint32(1) << jnp.clip(place - 32 * word, 0, 31).astype(jnp.uint32), jnp.uint32(0))


def _numbered(owners: jax.Array, count: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The owners of entries, numbered in order; and how many there are."""
    index = jnp.arange(owners.shape[0], dtype=jnp.int32)
    first = owners == index if count is None else (owners == index) & (index < count)
    numbers = jnp.cumsum(first.astype(jnp.int32)) - 1
    return numbers[owners], numbers[-1] + 1


def _first_use(words: Sequence[jax.Array], count: jax.Array | None = None) -> jax.Array:
    """For each of the first `count` keys (several uint32 words [E]), the index of the first equal key; others get 0.

    Open addressing: in each round every key without an owner requests a slot; the first to request an empty one owns it
    for good, and keys equal to the owner's are done. There are more slots than keys, so all get one.
    """
    entries = words[0].shape[0]
    slots = 1 << max(4, math.ceil(math.log2(1.5 * entries)))
    index = jnp.arange(entries, dtype=jnp.int32)
    hashed = _hash(words, slots)
    if count is not None:
        hashed = jnp.where(index < count, hashed, slots)
    words, hashed = lax.optimization_barrier((list(words), hashed))

    def equal(found: jax.Array, here: jax.Array | None) -> jax.Array:
        at = jnp.minimum(found, entries - 1)
        same = [w[at] == (w if here is None else w[here]) for w in words]
        return functools.reduce(jnp.logical_and, same) & (found != _EMPTY)

    table = jnp.full(slots, _EMPTY).at[hashed].min(index, mode="drop")
    found = table.at[hashed].get(mode="clip")
    owner = jnp.where(equal(found, None), found, _EMPTY)
    if count is not None:
        owner = jnp.where(index < count, owner, 0)

    # Few keys are left after the first round: the next rounds process only these, a fixed number at a time.
    room = max(64, entries // 8)

    def some(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        table, owner = state
        chosen = jnp.nonzero(owner == _EMPTY, size=room, fill_value=entries)[0].astype(jnp.int32)
        here = jnp.minimum(chosen, entries - 1)

        def again(inner: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            table, own, slot = inner
            slot = (slot + 1) & (slots - 1)
            free = (own == _EMPTY) & (table[slot] == _EMPTY)
            table = table.at[jnp.where(free, slot, slots)].min(here, mode="drop")
            found = table[slot]
            return table, jnp.where((own == _EMPTY) & equal(found, here), found, own), slot

        own = jnp.where(chosen < entries, _EMPTY, 0)
        table, own, _ = lax.while_loop(lambda s: (s[1] == _EMPTY).any(), again, (table, own, hashed[here]))
        return table, owner.at[chosen].set(own, mode="drop")

    return lax.while_loop(lambda state: (state[1] == _EMPTY).any(), some, (table, owner))[1]


def _hash(words: Sequence[jax.Array], slots: int) -> jax.Array:
    """Slot numbers, int32 [E]."""
    h = jnp.full(words[0].shape, 0x9E3779B9, jnp.uint32)
    for word in words:
        h = (h ^ word) * jnp.uint32(0x85EBCA6B)
        h ^= h >> 15
        h = h * jnp.uint32(0xC2B2AE35)
        h ^= h >> 13
    return (h & jnp.uint32(slots - 1)).astype(jnp.int32)
