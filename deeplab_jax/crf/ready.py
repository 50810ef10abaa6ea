"""Mean field in one small program for photographs of many sizes, which a plain call on the CPU runs.

Lattices are built on the host (`host_lattice`). Points and vertices are in buffers of few sizes, each four times the
previous one, and loops cover those in use in blocks, so that a half-empty buffer costs no time. Rows, columns,
iterations, weights and widths are arguments of the program, not constants in it.

An iteration splats the marginals onto one lattice, filters between its vertices, and slices; the lattices alternate,
and the last iteration averages all of them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import cast

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.crf import host_lattice, lattice_design
from deeplab_jax.crf.buffers import POINTS, Points, padded, room, stacked, zeros

TAPS = 14  # taps of the smoothness kernel on each side that are added at once: enough for a width of 3


@flax.struct.dataclass
class LatticeKernel:
    """A kernel on L lattices around N points (padded), with M vertices each (padded); the last vertex is always 0.

    Attributes:
      vertices: int32 [L, D + 1, N].
      weights: float32 [L, D + 1, N].
      neighbors: int32 [L, 2 (D + 1), M]; [L, 0, M] when dense.
      matrix: float32 [M, M] or None.
      counts: int32 [L], vertices in use.
      before: float32 [L + 1, N]: for each lattice, and for all together; 0 where there is no point.
      after: float32 [L + 1, N], the filter's scale included.
      weight: float32 [C] or [C, C].
      form: of `lattice_design`.
    """

    vertices: jax.Array
    weights: jax.Array
    neighbors: jax.Array
    matrix: jax.Array | None
    counts: jax.Array
    before: jax.Array
    after: jax.Array
    weight: jax.Array
    form: str = flax.struct.field(pytree_node=False)


@flax.struct.dataclass
class SpatialKernel:
    """The smoothness kernel on a grid.

    Attributes:
      columns: taps along x at distances 0, 1, ... float32 [R + 1].
      rows: taps along y, likewise.
      groups: int32 [], groups of `TAPS` taps in use.
      width: int32 [], columns of the grid.
      x: int32 [N], the column of each point.
      before: float32 [N].
      after: float32 [N].
      weight: float32 [C] or [C, C].
      margin: rows of padding before and after the points, at least R * width + R.
    """

    columns: jax.Array
    rows: jax.Array
    groups: jax.Array
    width: jax.Array
    x: jax.Array
    before: jax.Array
    after: jax.Array
    weight: jax.Array
    margin: int = flax.struct.field(pytree_node=False)


def _argument(value: np.ndarray | np.generic) -> jax.Array:
    """A host array as an argument of the compiled program, which transfers it to the device."""
    return cast(jax.Array, value)


def normalizers(sums: np.ndarray, valid: np.ndarray, normalization: str) -> tuple[np.ndarray, np.ndarray]:
    """The factors for values before and after filtering; see `kernels.build_kernel`."""
    scale = 1 / np.maximum(np.where(valid > 0, sums, 1), 1e-6)
    root = np.sqrt(scale)
    before = {"before": scale, "symmetric": root}.get(normalization, 1) * valid
    after = {"after": scale, "symmetric": root}.get(normalization, 1) * valid
    return before.astype(np.float32), after.astype(np.float32)


def lattice_kernel(
    features: np.ndarray, weight: np.ndarray, valid: np.ndarray | None, normalization: str, points: Points
) -> LatticeKernel:
    """Builds a kernel over features [N, D].

    Raises:
      host_lattice.TooWide: the features span too many cells.
    """
    form, lattices = host_lattice.build(features, points=None if valid is None else int(valid.sum()))
    dimensions = features.shape[1]
    most = max(lattice.count for lattice in lattices) + 1
    size = math.ceil(most / 1024) * 1024 if form == "dense" else max(min(points.room, 128 * POINTS), room(most))
    factor = np.float32(lattice_design.scale(form, dimensions))
    sums = [host_lattice.sums(lattice, form, valid) for lattice in lattices]
    ones = np.ones(points.count, np.float32) if valid is None else valid
    pairs = [normalizers(s, ones, normalization) for s in [*sums, functools.reduce(np.add, sums) / len(sums)]]
    neighbors = zeros((len(lattices), len(lattices[0].neighbors), size), np.int32)
    for to, lattice in zip(neighbors, lattices, strict=True):
        part = to[:, : lattice.count]
        np.copyto(part, lattice.neighbors)
        part[part == lattice.count] = size - 1
        to[:, lattice.count : lattice.count + POINTS] = size - 1  # up to the end of the last block in use
        to[:, -1] = size - 1
    matrix = None
    if form == "dense":
        matrix = zeros((size, size), np.float32)
        matrix[: lattices[0].count, : lattices[0].count] = lattices[0].matrix
    return LatticeKernel(
        _argument(stacked([lattice.vertices for lattice in lattices], points)),
        _argument(stacked([lattice.weights for lattice in lattices], points)),
        _argument(neighbors),
        None if matrix is None else _argument(matrix),
        _argument(np.array([lattice.count for lattice in lattices], np.int32)),
        _argument(stacked([before for before, _ in pairs], points)),
        _argument(stacked([after * factor for _, after in pairs], points)),
        _argument(weight),
        form,
    )


def spatial_kernel(
    size: tuple[int, int],
    std: Sequence[float],
    radius: tuple[int, int],
    weight: np.ndarray,
    valid: np.ndarray | None,
    normalization: str,
    points: Points,
) -> SpatialKernel:
    """Builds the smoothness kernel of an image of `size` (H, W) with standard deviations (x, y), cut at `radius`."""
    height, width = size
    radius = (min(radius[0], width - 1), min(radius[1], height - 1))
    groups = math.ceil(max(*radius, 1) / TAPS)
    reach = room(groups, 1) * TAPS
    distance = np.arange(reach + 1)
    taps = [np.exp(-0.5 * (distance / s) ** 2) * (distance <= r) for s, r in zip(std, radius, strict=True)]
    margin = room(reach * (width + 1), points.room // 8)
    whole = np.ones(size, np.float64) if valid is None else valid.reshape(size).astype(np.float64)
    sums = _along(_along(whole, taps[0], radius[0]).T, taps[1], radius[1]).T.astype(np.float32).ravel()
    ones = np.ones(points.count, np.float32) if valid is None else valid
    before, after = normalizers(sums, ones, normalization)
    return SpatialKernel(
        _argument(taps[0].astype(np.float32)),
        _argument(taps[1].astype(np.float32)),
        _argument(np.int32(groups)),
        _argument(np.int32(width)),
        _argument(padded(np.tile(np.arange(width, dtype=np.int32), height), points)),
        _argument(padded(before, points)),
        _argument(padded(after, points)),
        _argument(weight),
        margin,
    )


def _along(values: np.ndarray, taps: np.ndarray, radius: int) -> np.ndarray:
    """Filters the last axis of [H, W]."""
    total = taps[0] * values
    for k in range(1, radius + 1):
        total[:, k:] += taps[k] * values[:, :-k]
        total[:, :-k] += taps[k] * values[:, k:]
    return total


@jax.jit
def run(
    negative_unary: jax.Array,
    lattices: list[LatticeKernel],
    spatial: SpatialKernel | None,
    count: jax.Array,
    iterations: jax.Array,
) -> jax.Array:
    """The marginals [N, C] after `iterations` >= 1 updates.

    Args:
      negative_unary: [N, C] log P; C as of `lanes`; labels that do not exist are at
        -1e30.
      lattices: kernels over the points.
      spatial: the smoothness kernel of an image, or None.
      count: int32 [], the number of points in use, which come first.
      iterations: int32 [].
    """
    rows, labels = negative_unary.shape
    margin = 0 if spatial is None else spatial.margin
    most = max((k.counts.shape[0] for k in lattices), default=1)
    blocks = (count + POINTS - 1) // POINTS
    q0 = jnp.zeros((rows, labels))
    smooth0 = None if spatial is None else jnp.zeros((rows + 2 * margin, labels))  # what points send, 0 in the margins
    grids = []
    for kernel in lattices:
        buffers = 1 if kernel.matrix is not None else 2
        grids.append(tuple(jnp.zeros((kernel.neighbors.shape[2], labels)) for _ in range(buffers)))

    def one_pass(n: jax.Array, state: tuple) -> tuple:
        q, smooth, logits, grids = state
        turn = n % most
        final = n >= iterations - 1
        first = (n < iterations) | (most == 1)
        # Which of a kernel's normalizations: that of one lattice, or that of all together.
        which = [jnp.where(final, k.counts.shape[0], turn % k.counts.shape[0]) for k in lattices]
        turns = [turn % k.counts.shape[0] for k in lattices]
        share = jnp.where(final, 1 / most, 1)
        grids = [(_cleared(g[0], k, t), *g[1:]) for g, k, t in zip(grids, lattices, turns, strict=True)]

        def send(b: jax.Array, state: tuple) -> tuple:
            q, smooth, grids = state
            at = b * POINTS
            now = lax.cond(first, lambda: jax.nn.softmax(_rows(logits, at), axis=-1), lambda: _rows(q, at))
            q = lax.dynamic_update_slice_in_dim(q, now, at, 0)
            if spatial is not None:
                sent = now * _rows(spatial.before, at)[:, None]
                smooth = lax.dynamic_update_slice_in_dim(smooth, sent, margin + at, 0)
            after = []
            for grid, kernel, t, w in zip(grids, lattices, turns, which, strict=True):
                sent = now * _of(kernel.before, w, at)[:, None]
                vertices, weights = _of(kernel.vertices, t, at), _of(kernel.weights, t, at)
                added = (weights[:, :, None] * sent).reshape(-1, labels)
                after.append((grid[0].at[vertices.reshape(-1)].add(added, mode="promise_in_bounds"), *grid[1:]))
            return q, smooth, after

        q, smooth, grids = lax.fori_loop(0, blocks, send, (q, smooth, grids))
        grids = [_between(g, k, t) for g, k, t in zip(grids, lattices, turns, strict=True)]

        def receive(b: jax.Array, logits: jax.Array) -> jax.Array:
            at = b * POINTS

            def begin() -> jax.Array:
                start = _rows(negative_unary, at)
                return start if spatial is None else start + _smoothed(spatial, smooth, at)

            total = lax.cond(first, begin, lambda: _rows(logits, at))
            for grid, kernel, t, w in zip(grids, lattices, turns, which, strict=True):
                vertices, weights = _of(kernel.vertices, t, at), _of(kernel.weights, t, at)
                result = grid[_result(kernel)]
                heard = sum(
                    result.at[v].get(mode="promise_in_bounds") * x[:, None]
                    for v, x in zip(vertices, weights, strict=True)
                )
                heard = heard * (share * _of(kernel.after, w, at))[:, None]
                total += _weighted(kernel.weight, heard)
            return lax.dynamic_update_slice_in_dim(logits, total, at, 0)

        return q, smooth, lax.fori_loop(0, blocks, receive, logits), grids

    start = (q0, smooth0, negative_unary, grids)
    _, _, logits, _ = lax.fori_loop(0, iterations - 1 + most, one_pass, start)

    def finish(b: jax.Array, logits: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(
            logits, jax.nn.softmax(_rows(logits, b * POINTS), axis=-1), b * POINTS, 0
        )

    return lax.fori_loop(0, blocks, finish, logits)


def _rows(values: jax.Array, at: jax.Array | int, size: int = POINTS) -> jax.Array:
    return lax.dynamic_slice_in_dim(values, at, size)


def _of(values: jax.Array, n: jax.Array, at: jax.Array) -> jax.Array:
    """values [L, ..., N] of lattice n and the block of points from `at`."""
    start: list[jax.Array | int] = [n, *(0 for _ in values.shape[1:-1]), at]
    return lax.dynamic_slice(values, start, (1, *values.shape[1:-1], POINTS))[0]


def _weighted(weight: jax.Array, values: jax.Array) -> jax.Array:
    return values * weight if weight.ndim == 1 else jnp.matmul(values, weight.T, precision=lax.Precision.HIGHEST)


def _cleared(grid: jax.Array, kernel: LatticeKernel, turn: jax.Array) -> jax.Array:
    if kernel.matrix is not None:
        return jnp.zeros_like(grid)
    size = min(POINTS, grid.shape[0])
    zeros = jnp.zeros((size, grid.shape[1]), grid.dtype)
    blocks = (kernel.counts[turn] + size - 1) // size
    return lax.fori_loop(0, blocks, lambda b, g: lax.dynamic_update_slice_in_dim(g, zeros, b * size, 0), grid)


def _result(kernel: LatticeKernel) -> int:
    """Which buffer holds what `_between` computes. Buffers never trade places: XLA would copy them in each pass."""
    if kernel.matrix is not None:
        return 0
    return 1 if kernel.form == "direct" else kernel.vertices.shape[1] % 2


def _between(grids: tuple, kernel: LatticeKernel, turn: jax.Array) -> tuple:
    """Applies the operator between the vertices; the result is in the buffer `_result`."""
    if kernel.matrix is not None:  # the form "dense"
        return (jnp.matmul(kernel.matrix, grids[0], precision=lax.Precision.HIGHEST),)
    order = kernel.vertices.shape[1]
    side = lattice_design.constants(kernel.form, order - 1)[1]
    blocks = (kernel.counts[turn] + POINTS - 1) // POINTS

    def step(to: jax.Array, source: jax.Array, axes: slice, own: float | jax.Array, side: float | jax.Array):
        def block(b: jax.Array, to: jax.Array) -> jax.Array:
            near = lax.dynamic_slice(
                kernel.neighbors, (turn, axes.start, b * POINTS), (1, axes.stop - axes.start, POINTS)
            )[0]
            total = sum(source.at[n].get(mode="promise_in_bounds") for n in near)
            return lax.dynamic_update_slice_in_dim(to, own * _rows(source, b * POINTS) + side * total, b * POINTS, 0)

        return lax.fori_loop(0, blocks, block, to)

    both = list(grids)
    if kernel.form == "direct":
        both[1] = step(both[1], both[0], slice(0, 2 * order), 1.0, side)
    else:
        for j in range(order):
            there, here = (j + 1) % 2, j % 2
            both[there] = step(both[there], both[here], slice(2 * j, 2 * j + 2), 1 - 2 * side, side)
    return tuple(both)


def _smoothed(spatial: SpatialKernel, sent: jax.Array, at: jax.Array) -> jax.Array:
    """The weighted message of the smoothness kernel to the block of points from `at`; `sent` has margins of zeros."""
    reach = spatial.rows.shape[0] - 1
    tall = POINTS + 2 * reach
    start = spatial.margin + at - reach

    def all_taps(one_tap: Callable[[jax.Array | int, jax.Array], jax.Array], total: jax.Array) -> jax.Array:
        """Adds one_tap(k, total) for k = 1, 2, ...; where one group is all there is, k is a constant."""

        def group(first: jax.Array | int, total: jax.Array) -> jax.Array:
            for n in range(1, TAPS + 1):
                total = one_tap(first + n, total)
            return total

        if reach == TAPS:
            return group(0, total)
        return lax.fori_loop(0, spatial.groups, lambda g, t: group(g * TAPS, t), total)

    def down(k: jax.Array | int, total: jax.Array) -> jax.Array:
        shift = k * spatial.width
        return total + spatial.rows[k] * (_rows(sent, start + shift, tall) + _rows(sent, start - shift, tall))

    columns = all_taps(down, spatial.rows[0] * _rows(sent, start, tall))
    x = _rows(spatial.x, at)

    def across(k: jax.Array | int, total: jax.Array) -> jax.Array:
        ahead = jnp.where(x + k < spatial.width, spatial.columns[k], 0)[:, None] * _rows(columns, reach + k)
        behind = jnp.where(x >= k, spatial.columns[k], 0)[:, None] * _rows(columns, reach - k)
        return total + ahead + behind

    total = all_taps(across, spatial.columns[0] * _rows(columns, reach))
    return _weighted(spatial.weight, total * _rows(spatial.after, at)[:, None])
