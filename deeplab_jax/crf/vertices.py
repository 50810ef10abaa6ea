"""Numbers the vertices of one permutohedral lattice in compiled programs, and finds their neighbors.

A vertex's key is linear in its coordinates, so that a step along an axis adds the same to the key of every vertex. It
is exact as long as the lattice's extent fits into two words of 32 bits, a mixed radix; a lattice with more cells than
that has hashes of 64 bits for keys. A hash table decides only where to look: keys are compared whole.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.target import platform

EMPTY = np.int32(2**31 - 1)
NONE = np.int32(-1)
_CLAIMED = 2**30  # slots with this number or more belong to a vertex that is being added
_MARGIN = 4  # cells around those of the points: room for neighbors of neighbors
_MIXERS = np.uint32(0x9E3779B9), np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)

Words = tuple[jax.Array, jax.Array]
State = TypeVar("State")


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
    return Table(jnp.full(1 << math.ceil(math.log2(max(1.5 * room, 1 << 17))), EMPTY), keys, jnp.int32(0))


def at_once() -> bool:
    """Whether whole arrays are processed, not blocks made for a CPU's cache."""
    return platform() in ("gpu", "tpu")


def indices(*several: int | jax.Array) -> list[jax.Array]:
    """Indices of one type, which slices need, also where JAX's integers have 64 bits by default."""
    return [jnp.asarray(index, jnp.int32) for index in several]


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


def with_keys(
    prepare: Callable[[jax.Array, State], tuple[Words, jax.Array]],
    use: Callable[[jax.Array, tuple[Words, jax.Array], State], State],
    times: int | jax.Array,
    state: State,
) -> State:
    """state = use(n, prepare(n, state), state) for n = 0, 1, ...; `prepare` returns keys and which are wanted.

    On a CPU keys are made one step before they are used, since XLA computes what a loop carries once; else it would
    compute each key again in each operation that uses it, and copy the table if the keys come from there.
    """
    if at_once():
        return lax.fori_loop(0, times, lambda n, state: use(n, prepare(n, state), state), state)

    def step(n: jax.Array, carried: tuple) -> tuple:
        keys, state = carried
        state = use(n - 1, keys, state)
        return prepare(n, state), state

    shapes = jax.eval_shape(prepare, jnp.int32(0), state)
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # wanted, in the first step
    return lax.fori_loop(0, times + 1, step, (none, state))[1]


def number(table: Table, keys: Words, wanted: jax.Array, limit: int = 0) -> tuple[Table, jax.Array]:
    """Numbers keys, adding those that are new, up to the last but one place of `limit`.

    Args:
      table: the vertices numbered so far.
      keys: two words uint32 [n].
      wanted: bool [n].
      limit: 0 for the table's room.

    Returns:
      The table, and int32 [n], `NONE` for keys that are not wanted or found no place.
    """
    limit = limit or table.keys[0].shape[0]
    slot = _slot(keys, table.slots.shape[0] - 1)
    if at_once():
        return _settle(table, keys, slot, wanted, limit)
    # All at once first: then few are left, those whose slot has another key.
    return _settle_few(_add(table, keys, slot, wanted, limit), keys, slot, wanted, limit)


def find(table: Table, keys: Words, wanted: jax.Array) -> jax.Array:
    """The numbers of keys [n], int32, `NONE` where a key is not in use or not wanted."""
    settle = _settle if at_once() else _settle_few
    return settle(table, keys, _slot(keys, table.slots.shape[0] - 1), wanted, None)[1]


def _settle_few(
    table: Table, keys: Words, slot: jax.Array, wanted: jax.Array, limit: int | None
) -> tuple[Table, jax.Array]:
    """Like `_settle`, where most keys are in their first slot: the others go on by themselves, some at a time."""
    entries = slot.shape[0]
    entry, same = _look(table, slot, keys)
    part = max(64, entries // 32)

    def some(state: tuple) -> tuple:
        table, found, left = state
        place = _before(left)
        lane = jnp.full(part, entries, jnp.int32)
        lane = lane.at[jnp.where(left, place, part)].set(jnp.arange(entries, dtype=jnp.int32), mode="drop")
        here = jnp.minimum(lane, entries - 1)
        table, ours = _settle(table, (keys[0][here], keys[1][here]), slot[here], lane < entries, limit)
        return table, found.at[lane].set(ours, mode="drop"), left & (place >= part)

    start = table, jnp.where(wanted & same, entry, NONE), wanted & ~same & (entry != EMPTY)
    table, found, _ = lax.while_loop(lambda s: s[2].any(), some, start)
    return table, found


def _settle(
    table: Table, keys: Words, slot: jax.Array, wanted: jax.Array, limit: int | None
) -> tuple[Table, jax.Array]:
    """Each key goes on until it finds itself or an empty slot, to which it is added if there is a `limit`."""

    def on(state: tuple) -> tuple:
        table, slot, found, left = state
        entry, same = _look(table, slot, keys)
        found, left = jnp.where(left & same, entry, found), left & ~same
        full: bool | jax.Array = True
        if limit is not None:
            table = _add(table, keys, slot, left, limit)
            full = table.count == limit - 1
        empty = entry == EMPTY  # then it looks again: another one may have been added there, or itself
        return table, jnp.where(empty, slot, (slot + 1) & (table.slots.shape[0] - 1)), found, left & ~(empty & full)

    start = table, slot, jnp.full(slot.shape, NONE), wanted
    table, _, found, _ = lax.while_loop(lambda s: s[3].any(), on, start)
    return table, found


def _add(table: Table, keys: Words, slot: jax.Array, wanted: jax.Array, limit: int) -> Table:
    """Adds those of the keys that are wanted whose slot is empty, of several the first, while there is room."""
    last, room = table.slots.shape[0] - 1, table.keys[0].shape[0]
    claims = _CLAIMED + jnp.arange(slot.shape[0], dtype=jnp.int32)
    empty = wanted & (table.slots[slot] == EMPTY)
    slots = table.slots.at[jnp.where(empty, slot, last + 1)].min(claims, mode="drop")
    won = empty & (slots[slot] == claims)
    number = table.count + _before(won)
    fits = number < limit - 1
    slots = slots.at[jnp.where(won, slot, last + 1)].set(jnp.where(fits, number, EMPTY), mode="drop")
    at = jnp.where(won & fits, number, room)
    added = tuple(k.at[at].set(own, mode="drop") for k, own in zip(table.keys, keys, strict=True))
    return Table(slots, (added[0], added[1]), jnp.minimum(table.count + won.sum(dtype=jnp.int32), limit - 1))


def _before(chosen: jax.Array) -> jax.Array:
    """The place of each of the chosen, bool [n], among them; int32 [n]."""
    if at_once():
        return jnp.cumsum(chosen.astype(jnp.int32)) - 1
    # Down columns first, another order: XLA's cumulative sums over all values take twice as long on CPUs.
    entries = chosen.shape[0]
    ones = jnp.pad(chosen, (0, -entries % 32)).reshape(32, -1).astype(jnp.int32)
    sums, above = lax.scan(lambda total, row: (total + row, total), jnp.zeros_like(ones[0]), ones)
    return (above + jnp.cumsum(sums) - sums).reshape(-1)[:entries]


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
    """Adds the axis neighbors of the vertices in use, up to the last but one place of `limit`.

    Args:
      table: the vertices in use.
      steps: of `axis_steps`.
      block: vertices processed at once; divides the table's room.
      limit: at most the table's room.
    """
    count = table.count
    both = [jnp.concatenate([step, -step]) for step in steps]

    def around(b: jax.Array, table: Table) -> tuple[Words, jax.Array]:
        return _stepped(table, count, (both[0], both[1]), b * block, block)

    def add(b: jax.Array, keys: tuple[Words, jax.Array], table: Table) -> Table:
        return number(table, *keys, limit)[0]

    return with_keys(around, add, (count + block - 1) // block, table)


def join(table: Table, steps: Words, block: int, near: jax.Array, lattice: jax.Array, wanted: jax.Array) -> jax.Array:
    """Writes the neighbors of the vertices in use, if they are wanted, bool [].

    Args:
      table: the vertices.
      steps: of `axis_steps`.
      block: vertices processed at once; divides M.
      near: int32 [L, 2 (D + 1), M].
      lattice: the index of the one whose part of `near` is written.
      wanted: where False, `near` is returned as it is.

    Returns:
      `near` with each vertex's next and previous one along each axis; where there is none, the table's count.
    """
    room, count, order = near.shape[2], table.count, len(steps[0])
    blocks = jnp.where(wanted, count // block + 1, 0)  # also the place after the vertices in use, which stands for none
    axes = jnp.arange(order)[:, None]

    def clear(b: jax.Array, near: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice(
            near, jnp.broadcast_to(count, (1, 2 * order, block)), indices(lattice, 0, b * block)
        )

    def one(b: jax.Array, near: jax.Array) -> jax.Array:
        ahead = find(table, *_stepped(table, count, steps, b * block, block)).reshape(order, block)
        for axis, found in enumerate(jnp.where(ahead == NONE, count, ahead)):
            near = lax.dynamic_update_slice(near, found[None, None], indices(lattice, 2 * axis, b * block))
        index = b * block + jnp.arange(block, dtype=jnp.int32)
        back = jnp.where(ahead == NONE, room, ahead)
        return near.at[lattice, 2 * axes + 1, back].set(jnp.broadcast_to(index, back.shape), mode="drop")

    return lax.fori_loop(0, blocks, one, lax.fori_loop(0, blocks, clear, near))


def _stepped(table: Table, count: jax.Array, steps: Words, at: jax.Array, block: int) -> tuple[Words, jax.Array]:
    """The keys of `block` vertices from `at` after each step, [steps * block], and which of those were in use."""
    first, second = (
        (lax.dynamic_slice_in_dim(k, at, block) + step[:, None]).reshape(-1)
        for k, step in zip(table.keys, steps, strict=True)
    )
    used = at + jnp.arange(block, dtype=jnp.int32) < count
    return (first, second), jnp.tile(used, len(steps[0]))
