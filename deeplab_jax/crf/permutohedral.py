"""Gaussian filtering of scattered points on permutohedral lattices (Adams, Baek and Davis 2010), in compiled programs.

The filter is the mean of several lattices, rotated and shifted relative to each other, each of which sums the values at
the vertices of the simplices around the points (splat), applies an operator between the vertices, and interpolates
(slice). `lattice_design` has the operator's forms and constants, `traced_lattice` builds the lattices.
"""

import functools
import operator
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_batching import sequential_vmap

from deeplab_jax.crf import lattice_design
from deeplab_jax.crf.traced_lattice import Lattice, block_size, build
from deeplab_jax.crf.vertices import at_once, indices
from deeplab_jax.target import platform

__all__ = ["Lattice", "advance", "apply", "build", "start", "transpose"]

LANES = 8  # rows of vertex values are whole multiples of this: others are added up several times slower (XLA on CPU)
CHUNK = 32768  # values splatted at once, of one vertex of each point; this many stay in the cache
GROUP = 8  # channels filtered at once where memory matters more than time
TOLERANCE = 0.002  # change of a value below which `advance` does not splat it again

Number = int | jax.Array


def apply(structure: Lattice, values: jax.Array, turn: Number | None = None) -> jax.Array:
    """Filters values [N, C] on all lattices, or on lattice `turn` alone; returns [N, C].

    The mean of the results of all lattices is the filter. The cost depends on the vertices (see `Lattice.rooms`).
    """
    return _apply(False, structure, values, turn)


def transpose(structure: Lattice, values: jax.Array, turn: Number | None = None) -> jax.Array:
    """The transposed filter: blurs along axes are in reverse order."""
    return _apply(True, structure, values, turn)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _apply(backwards: bool, structure: Lattice, values: jax.Array, turn: Number | None) -> jax.Array:
    @sequential_vmap  # as `traced_lattice.build`
    def run(structure: Lattice, values: jax.Array, turn: Number | None) -> jax.Array:
        def with_room(room: int, values: jax.Array) -> jax.Array:
            def alone(lattice: Number) -> jax.Array:
                return _alone(structure, values, lattice, room, backwards)

            if turn is not None:
                return alone(turn)
            total = lax.fori_loop(0, structure.lattices, lambda n, t: t + alone(n), jnp.zeros_like(values))
            return total / structure.lattices

        return lax.switch(structure.which_room(), [functools.partial(with_room, n) for n in structure.rooms], values)

    return run(structure, values, turn)


def _apply_forward(backwards: bool, structure: Lattice, values: jax.Array, turn: Number | None) -> tuple:
    return _apply(backwards, structure, values, turn), (structure, turn)


def _apply_backward(backwards: bool, kept: tuple, gradient: jax.Array) -> tuple[Lattice, jax.Array, None]:
    structure, turn = kept

    def zero(leaf: jax.Array) -> jax.Array | np.ndarray:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.zeros_like(leaf)
        return np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(zero, structure), _apply(not backwards, structure, gradient, turn), None


_apply.defvjp(_apply_forward, _apply_backward)


@flax.struct.dataclass
class Splatted:
    """The state of `advance` between calls, with room for R vertices of each lattice.

    Attributes:
      grid: [L * R, C'], the sums at the vertices, one lattice after another; C' >= C, see `LANES`.
      buffers: two [R, C'], for what the operator makes of those of one lattice.
      values: [L, N, C], the values in the sums of each lattice; [L, 0, C] where all are splatted each time.
    """

    grid: jax.Array
    buffers: tuple[jax.Array, jax.Array]
    values: jax.Array


def start(structure: Lattice, channels: int, room: int) -> Splatted:
    """The empty state; `room` is one of `Lattice.rooms`."""
    lattices, _, points = structure.vertices.shape
    width, kept = (0, 0) if at_once() else (_width(channels), points)
    grid, one, other = (jnp.zeros((n * room, width), structure.weights.dtype) for n in (lattices, 1, 1))
    return Splatted(grid, (one, other), jnp.zeros((lattices, kept, channels), structure.weights.dtype))


def advance(
    structure: Lattice, splatted: Splatted, values: jax.Array, factor: jax.Array, lattice: Number
) -> tuple[Splatted, jax.Array]:
    """Filters factor * values, [N, 1] and [N, C], on one lattice, splatting only what changed by more than `TOLERANCE`.

    The mean of the results of all lattices is the filter. On GPUs and TPUs everything is splatted: to find what changed
    takes more sequential steps there than it saves.

    Returns:
      The new state, and the filtered values [N, C], of values each at most `TOLERANCE` off. Not differentiable.
    """
    room = splatted.buffers[0].shape[0]
    if at_once():
        return splatted, _alone(structure, values * factor, lattice, room)
    points = values.shape[0]
    chunk = _chunk(points, values.shape[1])
    before = splatted.values[lattice]
    changed = (jnp.abs(values - before) > TOLERANCE).any(axis=1)
    place = jnp.cumsum(changed.astype(jnp.int32)) - 1
    most = -(-points // chunk) * chunk
    index = jnp.full(most, points, jnp.int32)  # of the points that changed; the rest: a row of zeros at the end
    index = index.at[jnp.where(changed, place, most)].set(jnp.arange(points, dtype=jnp.int32), mode="drop")
    change = (values - before) * factor
    change = jnp.pad(change, ((0, 1), (0, _width(values.shape[1]) - values.shape[1])))
    first = lattice * room

    def splat(n: jax.Array, grid: jax.Array) -> jax.Array:
        at = lax.dynamic_slice_in_dim(index, n * chunk, chunk)
        take = lambda x: x.at[lattice, :, jnp.minimum(at, points - 1)].get(mode="promise_in_bounds").T  # noqa: E731
        return _add(grid, structure, take, change.at[at].get(mode="promise_in_bounds"), first)

    grid = lax.fori_loop(0, (place[-1] + chunk) // chunk, splat, splatted.grid)
    buffers = _between(structure, grid, lattice, first, splatted.buffers, False)
    sent = splatted.values.at[lattice].set(jnp.where(changed[:, None], values, before))
    return Splatted(grid, buffers, sent), _slice(structure, lattice, buffers[0])[:, : values.shape[1]]


def _alone(structure: Lattice, values: jax.Array, lattice: Number, room: int, backwards: bool = False) -> jax.Array:
    """Filters values [N, C] on one lattice."""
    points, channels = values.shape
    if at_once():
        alone = functools.partial(_alone_at_once, structure, lattice=lattice, room=room, backwards=backwards)
        if room == structure.rooms[0] or channels <= GROUP:
            return alone(values)
        # Hardly a photograph needs the largest room: there, some channels after others, for less memory.
        groups = -(-channels // GROUP)
        padded = jnp.pad(values, ((0, 0), (0, groups * GROUP - channels))).reshape(points, groups, GROUP)
        return lax.map(alone, padded.swapaxes(0, 1)).swapaxes(0, 1).reshape(points, -1)[:, :channels]
    chunk = _chunk(points, channels)
    padded = jnp.pad(values, ((0, 0), (0, _width(channels) - channels)))

    def splat(n: jax.Array, grid: jax.Array) -> jax.Array:
        # The last chunk is moved back to end with the points; points done by the previous chunk are not repeated.
        at = jnp.minimum(n * chunk, points - chunk)
        take = lambda x: lax.dynamic_slice(x, indices(lattice, 0, at), (1, x.shape[1], chunk))[0]  # noqa: E731
        rows = lax.dynamic_slice_in_dim(padded, at, chunk)
        return _add(grid, structure, take, jnp.where((at + jnp.arange(chunk) >= n * chunk)[:, None], rows, 0), 0)

    # In chunks, so that the products are still in the cache when they are added up: three times as fast.
    empty = jnp.zeros((room, _width(channels)), values.dtype)
    grid = lax.fori_loop(0, -(-points // chunk), splat, empty)
    buffers = _between(structure, grid, lattice, 0, (empty, grid), backwards)
    return _slice(structure, lattice, buffers[0])[:, :channels]


def _between(
    structure: Lattice,
    grid: jax.Array,
    lattice: Number,
    first: Number,
    buffers: tuple[jax.Array, jax.Array],
    backwards: bool,
) -> tuple[jax.Array, jax.Array]:
    """Applies the operator to the sums from row `first` of `grid`; the result is in the first buffer.

    The second one may be `grid`, whose sums are then lost.
    """
    order = structure.vertices.shape[1]
    block = block_size(structure.vertices[0].size)
    blocks = structure.counts[lattice] // block + 1  # also the row of zeros after the vertices in use

    def rows(source: jax.Array, first: Number, b: jax.Array) -> jax.Array:
        return lax.dynamic_slice_in_dim(source, first + b * block, block)

    def near(b: jax.Array, first: Number, count: int) -> jax.Array:
        return lax.dynamic_slice(structure.neighbors, indices(lattice, first, b * block), (1, count, block))[0]

    def write(to: jax.Array, one: Callable[[jax.Array], jax.Array], blocks: jax.Array) -> jax.Array:
        return lax.fori_loop(0, blocks, lambda b, t: lax.dynamic_update_slice_in_dim(t, one(b), b * block, 0), to)

    def direct(b: jax.Array) -> jax.Array:
        side = lattice_design.constants("direct", order - 1)[1]
        return rows(grid, first, b) + side * _sum_of(grid, first + near(b, 0, 2 * order))

    # Loops of no steps instead of a branch, which would copy the buffers.
    one, other = buffers
    one = write(one, direct, jnp.where(structure.axes, 0, blocks))
    if one.shape[0] > structure.rooms[0]:  # no lattice of the form "axes" needs that much
        return one, other
    one = write(one, lambda b: rows(grid, first, b), jnp.where(structure.axes, blocks, 0))

    def pair(n: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        one, other = both
        other = along(other, one, 2 * n)
        return along(one, other, 2 * n + 1), other

    def along(to: jax.Array, source: jax.Array, n: jax.Array) -> jax.Array:
        side = jnp.where(n < order, lattice_design.constants("axes", order - 1)[1], 0)  # with an odd number, a copy
        axis = jnp.minimum(n, order - 1)
        axis = jnp.where(_reversed(lattice, backwards), order - 1 - axis, axis)
        both = lambda b: _sum_of(source, near(b, 2 * axis, 2))  # noqa: E731
        return write(to, lambda b: (1 - 2 * side) * rows(source, 0, b) + side * both(b), blocks)

    return lax.fori_loop(0, jnp.where(structure.axes, (order + 1) // 2, 0), pair, (one, other))


def _alone_at_once(structure: Lattice, values: jax.Array, lattice: Number, room: int, backwards: bool) -> jax.Array:
    """As `_alone`, by operations on whole arrays."""
    vertices, weights, near = structure.vertices[lattice], structure.weights[lattice], structure.neighbors[lattice]
    near, order = near[:, :room], len(vertices)
    grid = jnp.zeros((room, values.shape[1]), values.dtype)
    shares = (weights[..., None] * values).reshape(-1, values.shape[1])
    grid = grid.at[vertices.reshape(-1)].add(shares, mode="promise_in_bounds")

    def direct() -> jax.Array:
        return grid + lattice_design.constants("direct", order - 1)[1] * _sum_of(grid, near)

    def axes() -> jax.Array:
        side, mixed = lattice_design.constants("axes", order - 1)[1], grid
        for n in range(order):
            axis = jnp.where(_reversed(lattice, backwards), order - 1 - n, n)
            mixed = (1 - 2 * side) * mixed + side * _sum_of(mixed, lax.dynamic_slice_in_dim(near, 2 * axis, 2))
        return mixed

    mixed = lax.cond(structure.axes, axes, direct) if room == structure.rooms[0] else direct()
    return _slice(structure, lattice, mixed)


def _reversed(lattice: Number, backwards: bool) -> Number:
    """Whether the last axis comes first: for every other lattice, so that their mean is nearly symmetric."""
    return (lattice % 2 == 1) != backwards


def _sum_of(grid: jax.Array, rows: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The sum of rows [k, n] of grid [M, C], weighted by [k, n]; [n, C]. Nothing of size [k, n, C] is stored."""

    def part(k: int | jax.Array) -> jax.Array:
        found = grid.at[rows[k]].get(mode="promise_in_bounds")
        return found if weights is None else found * weights[k][:, None]

    if platform() == "tpu":  # gathers and sums are not fused there
        return lax.fori_loop(
            0, len(rows), lambda k, total: total + part(k), jnp.zeros((rows.shape[1], grid.shape[1]), grid.dtype)
        )
    if at_once():
        found = grid.at[rows].get(mode="promise_in_bounds")
        return (found if weights is None else found * weights[..., None]).sum(0)
    return functools.reduce(operator.add, map(part, range(len(rows))))


def _add(
    grid: jax.Array, structure: Lattice, take: Callable[[jax.Array], jax.Array], values: jax.Array, first: Number
) -> jax.Array:
    """Splats values [n, C'] of the points that `take` picks, as [D + 1, n], onto the lattice from row `first` on."""
    added = (values * take(structure.weights)[..., None]).reshape(-1, grid.shape[1])
    return grid.at[first + take(structure.vertices).reshape(-1)].add(added, mode="promise_in_bounds")


def _slice(structure: Lattice, lattice: Number, sums: jax.Array) -> jax.Array:
    """Interpolates a lattice's sums [M, C] at the points; [N, C]."""
    return structure.scale * _sum_of(sums, structure.vertices[lattice], structure.weights[lattice])


def _chunk(points: int, channels: int) -> int:
    return min(max(64, CHUNK // _width(channels)), points)


def _width(channels: int) -> int:
    return channels if channels <= 4 or at_once() else -(-channels // LANES) * LANES
