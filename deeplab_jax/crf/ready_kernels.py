"""The kernels of the plain call's program, built on the host in buffers of few sizes."""

import functools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import flax.struct
import jax
import numpy as np

from deeplab_jax.crf import host_lattice, lattice_design
from deeplab_jax.crf.buffers import POINTS, Points, padded, put, room, zeros

SHARED = 1 << 20  # points up to which a buffer has room for any number of lattices, so that programs are shared
TAPS = 14  # taps of the smoothness kernel on each side that are added at once: enough for a width of 3


@flax.struct.dataclass
class LatticeKernel:
    """A kernel on at most L lattices around N points (padded), with M vertices each (padded).

    The vertex after those in use is always 0. Buffers for more lattices than are used are never touched and take no
    memory.

    Attributes:
      vertices: int32 [L, N, D + 1]: with a point's together, XLA splats and slices in two thirds of the time.
      weights: float32 [L, N, D + 1].
      neighbors: int32 [L, 2 (D + 1), M], the number of vertices in use where there is none; [L, 0, M] when dense.
      matrix: float32 [M, M] or None.
      counts: int32 [L], vertices in use.
      used: int32 [], lattices in use, which come first.
      before: float32 [L + 1, N]: for each lattice, and last for all together; 0 where there is no point. In a unit in
        which the values of vertices fit into float16.
      after: float32 [L + 1, N], the filter's scale and that unit included.
      weight: float32 [C] or [C, C].
      form: of `lattice_design`.
    """

    vertices: jax.Array
    weights: jax.Array
    neighbors: jax.Array
    matrix: jax.Array | None
    counts: jax.Array
    used: jax.Array
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
      pitch: int32 [], from one row of the grid to the next; the gap between rows is as wide as the kernel reaches.
      before: float32 [N].
      after: float32 [N].
      weight: float32 [C] or [C, C].
      margin: points of padding before and after the grid, at least R * pitch + R.
    """

    columns: jax.Array
    rows: jax.Array
    groups: jax.Array
    pitch: jax.Array
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
    used, order = len(lattices), features.shape[1] + 1
    slots = lattice_design.MOST if points.room <= SHARED else used
    most = max(lattice.count for lattice in lattices) + 1
    size = math.ceil(most / 1024) * 1024 if form == "dense" else max(min(points.room, 128 * POINTS), room(most))
    vertices, weights = (zeros((slots, points.room, order), dtype) for dtype in (np.int32, np.float32))
    neighbors = zeros((slots, len(lattices[0].neighbors), size), np.int32)

    def pack(n: int) -> tuple[np.ndarray, float]:
        lattice = lattices[n]
        put(lattice.vertices, vertices[n], points)
        put(lattice.weights, weights[n], points)
        neighbors[n, :, : lattice.count] = lattice.neighbors
        neighbors[n, :, lattice.count : lattice.count + POINTS] = lattice.count  # up to the end of the last block
        return host_lattice.sums(lattice, form, valid)

    with ThreadPoolExecutor(2) as pool:
        sums, peaks = zip(*pool.map(pack, range(used)), strict=True)
    ones = np.ones(len(features), np.float32) if valid is None else valid
    before, after = zeros((slots + 1, points.room), np.float32), zeros((slots + 1, points.room), np.float32)
    for n, total in zip([*range(used), slots], [*sums, functools.reduce(np.add, sums) / used], strict=True):
        one_before, one_after = normalizers(total, ones, normalization)
        unit = _unit(max(peaks) * float(one_before.max()))
        put(one_before / unit, before[n], points)
        put(one_after * (unit * np.float32(lattice_design.scale(form, order - 1))), after[n], points)
    matrix = None
    if form == "dense":
        matrix = zeros((size, size), np.float32)
        matrix[: lattices[0].count, : lattices[0].count] = lattices[0].matrix
    counts = np.zeros(slots, np.int32)
    counts[:used] = [lattice.count for lattice in lattices]
    return LatticeKernel(
        _argument(vertices),
        _argument(weights),
        _argument(neighbors),
        None if matrix is None else _argument(matrix),
        _argument(counts),
        _argument(np.int32(used)),
        _argument(before),
        _argument(after),
        _argument(weight),
        form,
    )


def _unit(largest: float) -> np.float32:
    """The power of two in which vertex values of at most `largest` are half as large as float16 can hold.

    They keep all of its digits down to a billionth of `largest`.
    """
    return np.float32(2.0 ** (math.ceil(math.log2(max(largest, 1e-30))) - 15))


def spatial_kernel(
    std: Sequence[float],
    radius: tuple[int, int],
    weight: np.ndarray,
    valid: np.ndarray | None,
    normalization: str,
    points: Points,
) -> SpatialKernel:
    """Builds the smoothness kernel of a grid with standard deviations (x, y), cut at `radius`.

    The gap between the rows of `points` must be at least the radius along x.
    """
    size = points.rows, points.width
    radius = min(radius[0], points.width - 1), min(radius[1], points.rows - 1)
    groups = math.ceil(max(*radius, 1) / TAPS)
    reach = room(groups, 1) * TAPS
    distance = np.arange(reach + 1)
    taps = [np.exp(-0.5 * (distance / s) ** 2) * (distance <= r) for s, r in zip(std, radius, strict=True)]
    margin = room(reach * (points.pitch + 1), points.room // 8)
    if valid is None:
        along = [_along(np.ones((1, n)), t, r) for n, t, r in zip(size[::-1], taps, radius, strict=True)]
        sums = along[1].T * along[0]
    else:
        sums = _along(_along(valid.reshape(size).astype(np.float64), taps[0], radius[0]).T, taps[1], radius[1]).T
    sums = sums.astype(np.float32).ravel()
    ones = np.ones(sums.size, np.float32) if valid is None else valid
    before, after = normalizers(sums, ones, normalization)
    return SpatialKernel(
        _argument(taps[0].astype(np.float32)),
        _argument(taps[1].astype(np.float32)),
        _argument(np.int32(groups)),
        _argument(np.int32(points.pitch)),
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
