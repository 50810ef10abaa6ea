"""Mean field in one small program for photographs of many sizes, which a plain call on the CPU runs.

Lattices are built on the host (`ready_kernels`). Points and vertices are in buffers of few sizes, each four times the
previous one, and loops cover those in use in blocks, so that a half-empty buffer costs no time. Rows, columns,
iterations, weights and widths are arguments of the program, not constants in it.

An iteration splats the marginals onto one lattice, filters between its vertices, and slices; the lattices alternate,
and the last iteration averages all of them. Sums at vertices are float32; what the filter reads and writes between them
is float16, which takes half the time, since this is bound by memory.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.crf import lattice_design
from deeplab_jax.crf.buffers import POINTS
from deeplab_jax.crf.ready_kernels import TAPS, LatticeKernel, SpatialKernel
from deeplab_jax.crf.vertices import indices

# At level 3 LLVM unrolls the loops over labels before it vectorizes, and they stay scalar: three times the time.
_COMPILER = {"xla_backend_optimization_level": 2}


@functools.partial(jax.jit, compiler_options=_COMPILER)
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
        `params.IMPOSSIBLE`.
      lattices: kernels over the points.
      spatial: the smoothness kernel of an image, or None.
      count: int32 [], the number of places in use, which come first, gaps between rows included.
      iterations: int32 [].
    """
    rows, labels = negative_unary.shape
    margin = 0 if spatial is None else spatial.margin
    most = functools.reduce(jnp.maximum, [k.used for k in lattices], jnp.int32(1))
    size = _at_once(labels)
    blocks = (count + size - 1) // size
    q0 = jnp.zeros((rows, labels), jnp.float32)
    # What points send, 0 in the margins. In one dimension, where shifts by rows and columns are slices.
    smooth0 = None if spatial is None else jnp.zeros((rows + 2 * margin) * labels, jnp.float32)
    grids = []
    for kernel in lattices:
        vertices = kernel.neighbors.shape[2]
        buffers = 1 if kernel.matrix is not None else 2
        results = [jnp.zeros((vertices, labels), jnp.float16 if buffers == 2 else jnp.float32)] * buffers
        grids.append((jnp.zeros((vertices, labels), jnp.float32), *results))

    def one_pass(n: jax.Array, state: tuple) -> tuple:
        q, smooth, logits, grids = state
        turn = n % most
        final = n >= iterations - 1
        first = (n < iterations) | (most == 1)
        turns = [turn % k.used for k in lattices]
        # Which of a kernel's normalizations: that of one lattice, or that of all together.
        which = [jnp.where(final, k.counts.shape[0], t) for k, t in zip(lattices, turns, strict=True)]
        # At last each lattice counts alike, also one that has several turns because another kernel has more lattices.
        uses = [(most - t + k.used - 1) // k.used for k, t in zip(lattices, turns, strict=True)]
        shares = [jnp.where(final, 1 / (k.used * u), 1.0) for k, u in zip(lattices, uses, strict=True)]
        grids = [(_cleared(g[0], k, t), *g[1:]) for g, k, t in zip(grids, lattices, turns, strict=True)]

        def send(b: jax.Array, state: tuple) -> tuple:
            q, smooth, grids = state
            at = b * size
            now = lax.cond(first, lambda: _softmax(_rows(logits, at, size)), lambda: _rows(q, at, size))
            q = lax.dynamic_update_slice_in_dim(q, now, at, 0)
            if spatial is not None:
                sent = now * _rows(spatial.before, at, size)[:, None]
                smooth = lax.dynamic_update_slice_in_dim(smooth, sent.reshape(-1), (margin + at) * labels, 0)
            after = []
            for grid, kernel, t, w in zip(grids, lattices, turns, which, strict=True):
                sent = now * _of(kernel.before, w, at, size)[:, None]
                vertices, weights = _of(kernel.vertices, t, at, size), _of(kernel.weights, t, at, size)
                added = (weights[:, :, None] * sent[:, None, :]).reshape(-1, labels)
                after.append((grid[0].at[vertices.reshape(-1)].add(added, mode="promise_in_bounds"), *grid[1:]))
            return q, smooth, after

        q, smooth, grids = lax.fori_loop(0, blocks, send, (q, smooth, grids))
        grids = [_between(g, k, t) for g, k, t in zip(grids, lattices, turns, strict=True)]

        def receive(b: jax.Array, logits: jax.Array) -> jax.Array:
            at = b * size

            def begin() -> jax.Array:
                start = _rows(negative_unary, at, size)
                return start if spatial is None else start + _smoothed(spatial, smooth, at, size)

            total = lax.cond(first, begin, lambda: _rows(logits, at, size))
            for grid, kernel, t, w, share in zip(grids, lattices, turns, which, shares, strict=True):
                vertices, weights = _of(kernel.vertices, t, at, size), _of(kernel.weights, t, at, size)
                result = grid[_result(kernel)]
                heard = sum(
                    result.at[vertices[:, k]].get(mode="promise_in_bounds") * weights[:, k, None]
                    for k in range(vertices.shape[1])
                )
                heard = heard * (share * _of(kernel.after, w, at, size))[:, None]
                total += _weighted(kernel.weight, heard)
            return lax.dynamic_update_slice_in_dim(logits, total, at, 0)

        return q, smooth, lax.fori_loop(0, blocks, receive, logits), grids

    start = (q0, smooth0, negative_unary, grids)
    _, _, logits, _ = lax.fori_loop(0, iterations - 1 + most, one_pass, start)

    def finish(b: jax.Array, logits: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(logits, _softmax(_rows(logits, b * size, size)), b * size, 0)

    return lax.fori_loop(0, blocks, finish, logits)


def _at_once(labels: int) -> int:
    """Points in a block: a power of two, so that their values and what is made from them stay in the cache."""
    return max(256, min(POINTS, 1 << (8 * POINTS // labels).bit_length() - 1))


def _softmax(x: jax.Array) -> jax.Array:
    """Over the last axis. XLA's reductions over so few values take longer than one column after another."""
    if x.shape[1] > 8:
        return jax.nn.softmax(x, axis=-1)
    columns = [x[:, k, None] for k in range(x.shape[1])]
    e = jnp.exp(x - functools.reduce(jnp.maximum, columns))
    return e / sum(e[:, k, None] for k in range(x.shape[1]))


def _rows(values: jax.Array, at: jax.Array | int, size: int = POINTS) -> jax.Array:
    return lax.dynamic_slice_in_dim(values, at, size)


def _of(values: jax.Array, n: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """values [L, N, ...] of lattice n and the block of points from `at`."""
    start = indices(n, at, *(0 for _ in values.shape[2:]))
    return lax.dynamic_slice(values, start, (1, size, *values.shape[2:]))[0]


def _weighted(weight: jax.Array, values: jax.Array) -> jax.Array:
    return values * weight if weight.ndim == 1 else jnp.matmul(values, weight.T, precision=lax.Precision.HIGHEST)


def _cleared(grid: jax.Array, kernel: LatticeKernel, turn: jax.Array) -> jax.Array:
    if kernel.matrix is not None:
        return jnp.zeros_like(grid)
    size = min(POINTS, grid.shape[0])
    zeros = jnp.zeros((size, grid.shape[1]), grid.dtype)
    blocks = kernel.counts[turn] // size + 1  # also the vertex after those in use
    return lax.fori_loop(0, blocks, lambda b, g: lax.dynamic_update_slice_in_dim(g, zeros, b * size, 0), grid)


def _result(kernel: LatticeKernel) -> int:
    """Which buffer holds what `_between` computes. Buffers never trade places: XLA would copy them in each pass."""
    if kernel.matrix is not None:
        return 1
    return 2 if kernel.form == "direct" else 1 + kernel.vertices.shape[2] % 2


def _between(grids: tuple, kernel: LatticeKernel, turn: jax.Array) -> tuple:
    """Applies the operator between the vertices to the first buffer; the result is in the buffer `_result`."""
    sums, *both = grids
    if kernel.matrix is not None:  # the form "dense"
        return sums, jnp.matmul(kernel.matrix, sums, precision=lax.Precision.HIGHEST)
    order = kernel.vertices.shape[2]
    side = lattice_design.constants(kernel.form, order - 1)[1]
    blocks = kernel.counts[turn] // POINTS + 1

    def halved(b: jax.Array, half: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(half, _half(_rows(sums, b * POINTS)), b * POINTS, 0)

    both[0] = lax.fori_loop(0, blocks, halved, both[0])

    def step(to: jax.Array, source: jax.Array, axes: slice, own: float | jax.Array, side: float | jax.Array):
        def block(b: jax.Array, to: jax.Array) -> jax.Array:
            near = lax.dynamic_slice(
                kernel.neighbors, indices(turn, axes.start, b * POINTS), (1, axes.stop - axes.start, POINTS)
            )[0]
            total = sum(source.at[n].get(mode="promise_in_bounds").astype(jnp.float32) for n in near)
            total = own * _rows(source, b * POINTS).astype(jnp.float32) + side * total
            return lax.dynamic_update_slice_in_dim(to, _half(total), b * POINTS, 0)

        return lax.fori_loop(0, blocks, block, to)

    if kernel.form == "direct":
        both[1] = step(both[1], both[0], slice(0, 2 * order), 1.0, side)
    else:
        for j in range(order):
            there, here = (j + 1) % 2, j % 2
            both[there] = step(both[there], both[here], slice(2 * j, 2 * j + 2), 1 - 2 * side, side)
    return sums, *both


def _half(values: jax.Array) -> jax.Array:
    """Values >= 0 in float16, those below its normal numbers as 0: processors take many times as long for such."""
    return jnp.where(values < jnp.finfo(jnp.float16).smallest_normal, 0, values).astype(jnp.float16)


def _smoothed(spatial: SpatialKernel, sent: jax.Array, at: jax.Array, size: int) -> jax.Array:
    """The weighted message of the smoothness kernel to the block of points from `at`.

    Args:
      spatial: the kernel.
      sent: [(N + 2 margin) C], 0 in the margins and in the gaps between rows.
      at: the first point.
      size: points in the block.
    """
    labels = spatial.weight.shape[0]
    reach = spatial.rows.shape[0] - 1
    tall = (size + 2 * reach) * labels
    start = (spatial.margin + at - reach) * labels

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
        shift = k * spatial.pitch * labels
        return total + spatial.rows[k] * (_rows(sent, start + shift, tall) + _rows(sent, start - shift, tall))

    columns = all_taps(down, spatial.rows[0] * _rows(sent, start, tall))

    def across(k: jax.Array | int, total: jax.Array) -> jax.Array:
        both = _rows(columns, (reach + k) * labels, size * labels) + _rows(columns, (reach - k) * labels, size * labels)
        return total + spatial.columns[k] * both

    total = all_taps(across, spatial.columns[0] * _rows(columns, reach * labels, size * labels))
    return _weighted(spatial.weight, total.reshape(size, labels) * _rows(spatial.after, at, size)[:, None])
