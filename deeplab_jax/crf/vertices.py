"""Numbers the vertices of one permutohedral lattice in compiled programs, and finds their neighbors.

A vertex's key is linear in its coordinates, so that a step along an axis adds the same to the key of every vertex. It
is exact as long as the lattice's extent fits into two words of 32 bits, a mixed radix; a lattice with more cells than
that has hashes of 64 bits for keys. A hash table decides only where to look: keys are compared whole.
"""

import math
from collections.abc import Sequence
from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

EMPTY = np.int32(2**31 - 1)
NONE = np.int32(-1)
_CLAIMED = 2**30  # slots with this number or more belong to a vertex that is being added
_MARGIN = 4  # cells around those of the points: room for neighbors of neighbors
_MIXERS = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)

Words = tuple[jax.Array, jax.Array]


@flax.struct.dataclass
class Table:
    """Vertices, numbered from 0.

    Attributes:
      slots: int32 [S], a vertex's number or `EMPTY`.
      keys: two words uint32 [M], of the vertices in use.
      count: int32 [], how many.
    """

    slots: jax.Array
    keys: Words
    count: jax.Array


def empty(room: int) -> Table:
    """A table for fewer than `room` vertices."""
    keys = jnp.zeros(room, jnp.uint32), jnp.zeros(room, jnp.uint32)
    return Table(jnp.full(1 << math.ceil(math.log2(1.5 * room)), EMPTY), keys, jnp.int32(0))


def axis_steps(base: Sequence[jax.Array]) -> tuple[Words, Words]:
    """What makes the keys of a lattice around points in the cells `base`, D + 1 arrays int32 [N].

    Returns:
      units: two words uint32 [D + 1]; the key of coordinates v is sum_i units_i v_i.
      steps: two words uint32 [D + 1]; what v + (1, ..., 1) - (D + 1) e_j adds to the key of v.
    """
    order = len(base)
    lowest = [b.min() for b in base[:-1]]
    sizes = [b.max() - low + 1 + 2 * _MARGIN for b, low in zip(base[:-1], lowest, strict=True)]
    # Of a vertex (D + 1) q_i + k, the first word's units sum to 1 modulo D + 1, which tells k, and are a mixed radix
    # for the q_i. As the sum of all products stays below 2^32, so do differences: no two vertices have equal keys.
    limit = 2.0**31 / order
    unit, word, fits = jnp.int32(1), jnp.int32(0), jnp.bool_(True)
    exact: list[list[jax.Array]] = [[], []]
    for n, size in enumerate(sizes):
        full = unit.astype(jnp.float32) * size > limit
        fits &= ~(full & (word == 1)) & (size < limit)
        unit, word = jnp.where(full, 1, unit), jnp.where(full, 1, word)
        for w in range(2):
            exact[w].append(jnp.where(word == w, unit, 0).astype(jnp.uint32))
        unit = unit * size if n else -(-size // order) * order
    random = np.random.RandomState(1).randint(0, 2**32, (2, order - 1), np.uint32) | np.uint32(1)
    units = [jnp.append(jnp.where(fits, jnp.stack(e), r), jnp.uint32(0)) for e, r in zip(exact, random, strict=True)]
    steps = [u.sum(dtype=jnp.uint32) - order * u for u in units]
    return (units[0], units[1]), (steps[0], steps[1])


def corners(base: Sequence[jax.Array], rank: Sequence[jax.Array], units: Words, steps: Words) -> Words:
    """The keys of the D + 1 vertices of the simplices around points, [(D + 1) n], all of remainder 0 first.

    Args:
      base: D + 1 arrays int32 [n]: the remainder-0 vertex, divided by D + 1.
      rank: likewise, 0..D. The vertex of remainder k is one step further along the axis whose rank is D + 1 - k.
      units: of `axis_steps`.
      steps: likewise.
    """
    order = len(base)
    first, second = (
        _corners(order * sum(b.astype(jnp.uint32) * u for b, u in zip(base[:-1], word, strict=False)), rank, step)
        for word, step in zip(units, steps, strict=True)
    )
    return first, second


def _corners(own: jax.Array, rank: Sequence[jax.Array], steps: jax.Array) -> jax.Array:
    """One word of the keys, from that of the vertices of remainder 0."""
    order = len(rank)
    ways = (sum(jnp.where(r >= order - k, s, 0) for r, s in zip(rank, steps, strict=True)) for k in range(1, order))
    return jnp.concatenate([own, *(own + way for way in ways)])


def number(table: Table, keys: Words, wanted: jax.Array) -> tuple[Table, jax.Array]:
    """Numbers the keys [n] that are wanted, bool [n], adding those that are new; int32 [n], others `NONE`."""
    return _process(table, keys, wanted, add=True)


def find(table: Table, keys: Words, wanted: jax.Array) -> jax.Array:
    """The numbers of keys [n], int32, `NONE` where a key is not in use or not wanted."""
    return _process(table, keys, wanted, add=False)[1]


def _process(table: Table, keys: Words, wanted: jax.Array, add: bool) -> tuple[Table, jax.Array]:
    """Looks at the first slot of each key; the few keys that are not done then go on, a fixed number at a time."""
    entries, last, room = keys[0].shape[0], table.slots.shape[0] - 1, table.keys[0].shape[0]
    first = _slot(keys, last)
    entry, same = _look(table, first, keys)
    found = jnp.where(same & wanted, entry, NONE)
    left = wanted & ~same
    if not add:
        left &= entry != EMPTY
    part = max(64, entries // 8)
    claims = _CLAIMED + jnp.arange(part, dtype=jnp.int32)

    def moved(table: Table, own: Words, slot: jax.Array, left: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The first slot, from `slot` on, that is a key's or empty; its entry, and whether it is the key's."""

        def on(state: tuple) -> tuple:
            slot, entry, same = state
            slot = jnp.where(left & ~same & (entry != EMPTY), (slot + 1) & last, slot)
            return slot, *_look(table, slot, own)

        start = slot, *_look(table, slot, own)
        return lax.while_loop(lambda s: (left & ~s[2] & (s[1] != EMPTY)).any(), on, start)

    def step(own: Words, state: tuple) -> tuple:
        table, slot, found, left = state
        slot, entry, same = moved(table, own, slot, left)
        same &= left
        found, left = jnp.where(same, entry, found), left & ~same
        if not add:
            return table, slot, found, jnp.zeros_like(left)
        # Each claims its slot; the others, of which some have the same key, look again.
        slots = table.slots.at[jnp.where(left, slot, last + 1)].min(claims, mode="drop")
        won = left & (slots[slot] == claims)
        mine = table.count + jnp.cumsum(won.astype(jnp.int32)) - 1
        slots = slots.at[jnp.where(won, slot, last + 1)].set(mine, mode="drop")
        at = jnp.where(won, mine, room)
        added = tuple(k.at[at].set(o, mode="drop") for k, o in zip(table.keys, own, strict=True))
        return Table(slots, added, mine[-1] + 1), slot, jnp.where(won, mine, found), left & ~won

    def some(state: tuple) -> tuple:
        table, found, left = state
        lane = jnp.nonzero(left, size=part, fill_value=entries)[0].astype(jnp.int32)
        here = jnp.minimum(lane, entries - 1)
        own = keys[0][here], keys[1][here]
        start = table, first[here], jnp.full(part, NONE), lane < entries
        table, _, ours, _ = lax.while_loop(lambda s: s[3].any(), partial(step, own), start)
        return table, found.at[lane].set(ours, mode="drop"), left.at[lane].set(False, mode="drop")

    table, found, _ = lax.while_loop(lambda s: s[2].any(), some, (table, found, left))
    return table, found


def _look(table: Table, slot: jax.Array, keys: Words) -> tuple[jax.Array, jax.Array]:
    """The entry at each slot, and whether it is the key's."""
    entry = table.slots.at[slot].get(mode="promise_in_bounds")
    at = jnp.minimum(entry, table.keys[0].shape[0] - 1)
    equal = [k.at[at].get(mode="promise_in_bounds") == own for k, own in zip(table.keys, keys, strict=True)]
    return entry, (entry != EMPTY) & equal[0] & equal[1]


def _slot(keys: Words, last: int) -> jax.Array:
    h = keys[0] * _MIXERS[0] + keys[1] * _MIXERS[1]
    h = (h ^ (h >> 15)) * _MIXERS[2]
    return ((h ^ (h >> 13)) & jnp.uint32(last)).astype(jnp.int32)


def widened(table: Table, steps: Words, block: int, limit: int) -> Table:
    """Adds the axis neighbors of the vertices in use, while there are fewer than `limit` vertices.

    Args:
      table: the vertices in use.
      steps: of `axis_steps`.
      block: vertices processed at once; divides the table's room.
      limit: at most the table's room.
    """
    count, order = table.count, len(steps[0])

    def one(n: jax.Array, table: Table) -> Table:
        b, direction = jnp.divmod(n, 2 * order)
        keys, used = _stepped(table, count, steps, b * block, block, direction)
        used &= table.count + block < limit
        return number(table, keys, used)[0]

    return lax.fori_loop(0, (count + block - 1) // block * 2 * order, one, table)


def join(table: Table, steps: Words, block: int, near: jax.Array, lattice: jax.Array) -> jax.Array:
    """Writes the neighbors of the vertices in use.

    Args:
      table: the vertices.
      steps: of `axis_steps`.
      block: vertices processed at once; divides M.
      near: int32 [L, 2 (D + 1), M].
      lattice: the index of the one whose part of `near` is written.

    Returns:
      `near` with each vertex's next and previous one along each axis; where there is none, the table's count.
    """
    room, count, order = near.shape[2], table.count, len(steps[0])
    blocks = count // block + 1  # also the place after the vertices in use, which stands for none

    def clear(b: jax.Array, near: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(near, jnp.broadcast_to(count, (1, 2 * order, block)), (lattice, 0, b * block))

    def one(n: jax.Array, near: jax.Array) -> jax.Array:
        b, axis = jnp.divmod(n, order)
        keys, used = _stepped(table, count, steps, b * block, block, 2 * axis)
        ahead = find(table, keys, used)
        found = jnp.where(ahead == NONE, count, ahead)
        near = lax.dynamic_update_slice(near, found[None, None], (lattice, 2 * axis, b * block))
        index = b * block + jnp.arange(block, dtype=jnp.int32)
        return near.at[lattice, 2 * axis + 1, jnp.where(ahead == NONE, room, ahead)].set(index, mode="drop")

    return lax.fori_loop(0, blocks * order, one, lax.fori_loop(0, blocks, clear, near))


def _stepped(
    table: Table, count: jax.Array, steps: Words, at: jax.Array, block: int, direction: jax.Array
) -> tuple[Words, jax.Array]:
    """The keys of vertices from `at` after a step along an axis (2 j) or back (2 j + 1); whether they were in use."""
    axis, back = jnp.divmod(direction, 2)
    first, second = (
        lax.dynamic_slice_in_dim(k, at, block) + jnp.where(back == 1, -s[axis], s[axis])
        for k, s in zip(table.keys, steps, strict=True)
    )
    return (first, second), at + jnp.arange(block, dtype=jnp.int32) < count
