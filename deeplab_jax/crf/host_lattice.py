"""Builds lattices on the host, in NumPy, for concrete features: nothing is compiled for their size."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from deeplab_jax.crf import lattice_design

BLOCK = 16384  # points whose simplices are found at once; this many stay in the cache
# All pairs of so few vertices cost less than blurs along the axes. Timed on two CPU cores, like the limits of
# `lattice_design` and the next one.
DENSE_UP_TO = 1024
THIRD = 0.5  # vertices per point up to which more than SMALL points have a third lattice: each takes less time
_FARTHEST = 2.0**30  # lattice coordinates: there float32 no longer tells cells apart
_ODD = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


@dataclasses.dataclass(frozen=True)
class HostLattice:
    """One lattice around N points.

    Attributes:
      vertices: int32 [N, D + 1], numbered from 0.
      weights: float32 [N, D + 1], barycentric.
      neighbors: int32 [2 (D + 1), M], next and previous along each axis, M if it does not exist; [0, M] when dense.
      matrix: float32 [M, M] between vertices when dense, else None.
      count: M.
    """

    vertices: np.ndarray
    weights: np.ndarray
    neighbors: np.ndarray
    matrix: np.ndarray | None
    count: int


class TooWide(ValueError):
    """The features span too many cells for 63-bit keys."""


def build(features: np.ndarray, form: str = "auto", points: int | None = None) -> tuple[str, list[HostLattice]]:
    """Finds the form that suits the points and its lattices.

    Args:
      features: float32 [N, D], already divided by their standard deviations.
      form: one of `lattice_design`'s, or "auto" by the number of vertices.
      points: how many of the N count for that choice; None = all. Masked points, which coincide with another, do not
        count, so that padding does not influence the form.

    Raises:
      TooWide: there is no exact key for so many cells.
    """
    features = np.ascontiguousarray(features.T, np.float32)  # [D, N]: smallest and largest are found ten times as fast
    features = features - features.min(1, keepdims=True)
    points = features.shape[1] if points is None else points
    if form == "auto":
        form = _few(features)
    if form == "dense":
        return form, [_one(features, form, 0)]
    count = lattice_design.lattices(points)
    with ThreadPoolExecutor(2) as pool:
        begun = [] if form == "axes" else [pool.submit(_embedded, features, "direct", n) for n in range(2)]
        if form == "auto":  # decided by the direct form's vertices, which are usually needed
            form = "direct" if begun[0].result()[2].size > lattice_design.few(points) else "axes"
        if form == "axes":
            begun = []  # and its memory
        started = [pool.submit(_one, features, form, n, *(e.result() for e in begun[n : n + 1])) for n in range(count)]
        if points > lattice_design.SMALL and started[0].result().count < THIRD * points:
            started.append(pool.submit(_one, features, form, count))
        return form, [one.result() for one in started]


def _few(features: np.ndarray) -> str:
    """ "dense" where the vertices are few enough, else "auto"; a sample tells most cases apart."""
    sample = features[:, :: max(1, features.shape[1] // (2 * DENSE_UP_TO))]
    if _embedded(sample, "dense", 0)[2].size > DENSE_UP_TO:
        return "auto"
    return "dense" if _embedded(features, "dense", 0)[2].size <= DENSE_UP_TO else "auto"


def _one(features: np.ndarray, form: str, lattice: int, embedded: tuple | None = None) -> HostLattice:
    found = _joined(embedded or _embedded(features, form, lattice), form)
    if form == "axes" and lattice % 2:
        backwards = found.neighbors.reshape(-1, 2, found.count)[::-1].reshape(-1, found.count)
        return dataclasses.replace(found, neighbors=backwards)
    return found


def _embedded(features: np.ndarray, form: str, lattice: int) -> tuple:
    """Of features [D, N]: vertices and weights [N, D + 1], the vertices' keys [M], the axes' key steps [D + 1]."""
    dimensions, points = features.shape
    matrix, shift, units, first = _frame(features, form, lattice)
    vertices = np.empty((points, dimensions + 1), np.int32)
    weights = np.empty((points, dimensions + 1), np.float32)
    found = []
    # Numbered block by block first: neighboring points share vertices, and a block's table stays in the cache.
    for at in range(0, points, BLOCK):
        part = slice(at, at + BLOCK)
        keys, weights[part].T[:] = _simplices(features[:, part], matrix, shift, units, first)
        numbers, distinct = _numbered(np.ascontiguousarray(keys.T).reshape(-1))
        vertices[part] = numbers.reshape(-1, dimensions + 1)
        found.append(distinct)
    numbers, distinct = _numbered(np.concatenate(found))
    end = np.cumsum([len(own) for own in found])
    for at, own in zip(range(0, points, BLOCK), np.split(numbers, end[:-1]), strict=True):
        vertices[at : at + BLOCK] = own[vertices[at : at + BLOCK]]
    steps = units.sum() - (dimensions + 1) * units
    return vertices, weights, distinct, steps, (units, matrix, first)


def _frame(features: np.ndarray, form: str, lattice: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The embedding of a lattice, matrix and shift, and what makes its keys: units and first cells."""
    dimensions = len(features)
    matrix, shift = lattice_design.embedding(form, dimensions, lattice)
    matrix, shift = matrix.astype(np.float32), shift.astype(np.float32)
    low, high = features.min(1), features.max(1)
    end = np.maximum(matrix * low[:, None], matrix * high[:, None]).sum(0) + shift
    start = np.minimum(matrix * low[:, None], matrix * high[:, None]).sum(0) + shift
    order = dimensions + 1
    if not np.abs([start, end]).max() < _FARTHEST:
        raise TooWide("the features span too many cells of the lattice")
    return matrix, shift, *_units(np.floor(start / order).astype(int) - 4, np.ceil(end / order).astype(int) + 4)


def _units(lowest: np.ndarray, highest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Units u such that sum_i u_i v_i is different for all vertices v in range: v_i = (D + 1) q_i + k.

    The sum is (D + 1) sum_i u_i q_i + k sum_i u_i. The u_i are a mixed radix for the q_i, and sum u = 1 modulo D + 1
    gives k. As the key is linear in v, a step along an axis adds the same to every key.
    """
    order = len(lowest)
    units: list[int] = []
    unit = 1
    for n in range(order - 1):
        if n == order - 2:
            unit += (1 - (sum(units) + unit)) % order
        units.append(unit)
        unit *= int(highest[n] - lowest[n]) + 1
    if unit * order >= 2**62:
        raise TooWide("the features span too many cells of the lattice")
    return np.array([*units, 0], np.int64), lowest


def _simplices(features, matrix, shift, units, first) -> tuple[np.ndarray, np.ndarray]:
    """Keys int64 [D + 1, n] and weights float32 [D + 1, n] of the vertices of the simplices around points [D, n].

    With y / (D + 1) = g + r, g whole and 0 <= r < 1, the simplex of y (section 3.1) has the vertices g with 1 added
    where r is among the k largest, times D + 1 and moved back to the hyperplane of sum 0, for k = 0..D. So sorting r
    gives the vertices and, by differences, the weights.
    """
    order = matrix.shape[1]
    scaled = (matrix.T @ features + shift[:, None]) * np.float32(1 / order)
    whole = np.floor(scaled)
    # r in the high bits, its coordinate in the low ones: integers are sorted, one minimum and maximum at a time.
    bits = (order - 1).bit_length()
    one = 1 << (31 - bits)
    packed = np.minimum((scaled - whole) * np.float32(one), np.float32(one - 64)).astype(np.int32) << bits
    packed |= np.arange(order, dtype=np.int32)[:, None]
    for i, j in _network(order):
        larger = np.maximum(packed[i], packed[j])
        np.minimum(packed[i], packed[j], out=packed[j])
        packed[i] = larger
    place = packed & ((1 << bits) - 1)
    sorted_rest = (packed >> bits) * np.float32(1 / one)
    weights = np.empty_like(sorted_rest)
    weights[0] = 1 - sorted_rest[0] + sorted_rest[-1]
    weights[1:] = sorted_rest[:-1] - sorted_rest[1:]
    whole = whole.astype(np.int64)
    whole -= first[:, None]
    keys = np.empty(place.shape, np.int64)
    keys[0] = order * (units @ whole) - whole.sum(0) * units.sum() - first.sum() * units.sum()
    raised = order * units - units.sum()
    for k in range(1, order):
        np.add(keys[k - 1], raised[place[k - 1]], out=keys[k])
    return keys, weights


@functools.cache
def _network(size: int) -> list[tuple[int, int]]:
    """Pairs (i, j) that, put in order one after another, sort `size` values (Batcher's merge exchange)."""
    pairs, top = [], 1 << ((size - 1).bit_length() - 1 if size > 1 else 0)
    p = top
    while p > 0:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(size - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return pairs


def _slots(keys: np.ndarray, bits: int, turn: int) -> np.ndarray:
    """Where in a table of 2^bits to look for keys; int64, which NumPy need not convert to use as indices."""
    hashed = keys.view(np.uint64) * np.uint64(_ODD[turn % len(_ODD)] + 2 * (turn // len(_ODD)))
    hashed >>= np.uint64(64 - bits)
    return hashed.view(np.int64)


def _numbered(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of each key among the distinct ones, int32 [E], and the distinct keys in order of use.

    A hash decides where to look; all keys are compared, and those that collided look elsewhere.
    """
    entries = np.arange(len(keys), dtype=np.int32)
    owner, left, turn = entries, entries, 0
    while left.size:
        mine = keys if turn == 0 else keys[left]
        bits = max(8, int(np.ceil(np.log2(len(left) + 1))))
        slots = _slots(mine, bits, turn)
        table = np.empty(1 << bits, np.int32)
        table[slots[::-1]] = left[::-1]  # the first of several is kept
        found = table[slots]
        elsewhere = np.flatnonzero(keys[found] != mine)
        if turn == 0:
            owner = found
        else:
            owner[left] = found
        left, turn = left[elsewhere], turn + 1
    first = np.flatnonzero(owner == entries)
    numbers = np.empty(len(keys), np.int32)
    numbers[first] = entries[: first.size]
    return numbers[owner], keys[first]


class _Lookup:
    """Finds the numbers of keys."""

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        self.tables: list[tuple[int, np.ndarray]] = []
        left = np.arange(len(keys), dtype=np.int32)
        while left.size:
            bits = max(8, int(np.ceil(np.log2(4 * len(left)))))
            table = np.full(1 << bits, -1, np.int32)
            slots = _slots(keys[left], bits, len(self.tables))
            table[slots] = left
            self.tables.append((bits, table))
            left = left[np.flatnonzero(table[slots] != left)]

    def __call__(self, wanted: np.ndarray) -> np.ndarray:
        """int32, len(keys) for a key that is absent."""
        absent = np.int32(len(self.keys))
        found, left, mine = np.empty(0, np.int32), None, wanted
        for turn, (bits, table) in enumerate(self.tables):
            at = table[_slots(mine, bits, turn)]
            same = self.keys[at] == mine  # -1 compares with the last key: corrected below
            there = at >= 0
            same &= there
            if left is None:
                found = np.where(same, at, absent)
                left = np.flatnonzero(there & ~same)
            else:
                found[left[same]] = at[same]
                left = left[there & ~same]
            if not left.size:
                break
            mine = wanted[left]
        return found


def _joined(embedded: tuple, form: str) -> HostLattice:
    """Completes the result of `_embedded` with the operator between the vertices."""
    vertices, weights, keys, steps, about = embedded
    if form == "dense":
        matrix = _gaussian_between(keys, *about)
        return HostLattice(vertices, weights, np.zeros((0, len(keys)), np.int32), matrix, len(keys))
    if form == "axes":
        around = np.concatenate([keys, *(keys + s for s in steps), *(keys - s for s in steps)])
        _, keys = _numbered(around)  # vertices in use stay first and keep their numbers
    lookup = _Lookup(keys)
    count = len(keys)
    neighbors = np.full((2 * len(steps), count + 1), count, np.int32)
    index = np.arange(count, dtype=np.int32)
    for n, step in enumerate(steps):
        ahead = lookup(keys + step)
        neighbors[2 * n, :count] = ahead
        neighbors[2 * n + 1, ahead] = index
        neighbors[2 * n + 1, count] = count
    return HostLattice(vertices, weights, neighbors[:, :count], None, count)


def _gaussian_between(keys, units, matrix, first) -> np.ndarray:
    """exp(-|v - w|^2 / 2 var) between vertices, var = 1 - 1 / alpha^2 of the features; [M, M]."""
    order = matrix.shape[1]
    # Decode the keys: the remainder first, then one field after another, highest unit first.
    rest = keys.copy()
    remainder = rest % order  # sum u = 1 modulo D + 1
    rest = (rest - remainder * units.sum()) // order
    coordinates = np.empty((order, len(keys)), np.int64)
    for i in np.argsort(-units[:-1], kind="stable"):
        coordinates[i] = rest // units[i]
        rest = rest - coordinates[i] * units[i]
    coordinates[:-1] = order * (coordinates[:-1] + first[:-1, None]) + remainder
    coordinates[-1] = -coordinates[:-1].sum(0)
    alpha = lattice_design.constants("dense", order - 1)[0]
    unit = order / np.sqrt(6) * alpha  # lattice coordinates per feature
    at = (coordinates - coordinates.mean(1, keepdims=True)) / unit  # in float64: squares of far ones are subtracted
    half = 0.5 * (at**2).sum(0)
    exponent = np.minimum(at.T @ at - half[:, None] - half, 0) / (1 - 1 / alpha**2)
    return np.exp(exponent.astype(np.float32))


def between(lattice: HostLattice, form: str, values: np.ndarray) -> np.ndarray:
    """Applies the operator between the vertices to [M] values."""
    if form == "dense":
        return lattice.matrix @ values
    side = lattice_design.constants(form, lattice.vertices.shape[1] - 1)[1]
    padded = np.append(values, np.float32(0))
    if form == "direct":
        return values + side * sum(np.take(padded, n) for n in lattice.neighbors)
    for j in range(lattice.vertices.shape[1]):
        n, p = lattice.neighbors[2 * j], lattice.neighbors[2 * j + 1]
        padded[:-1] = (1 - 2 * side) * padded[:-1] + side * (np.take(padded, n) + np.take(padded, p))
    return padded[:-1]


def sums(lattice: HostLattice, form: str, valid: np.ndarray | None = None) -> tuple[np.ndarray, float]:
    """filter(1), or filter(valid), of one lattice at each point, float32 [N], and its greatest value at a vertex."""
    weights = lattice.weights if valid is None else lattice.weights * valid[:, None]
    grid = np.bincount(lattice.vertices.ravel(), weights.ravel(), lattice.count).astype(np.float32)
    filtered = between(lattice, form, grid)
    peak = float(max(grid.max(), filtered.max()))
    total = np.einsum("nd,nd->n", np.take(filtered, lattice.vertices), lattice.weights)
    return total * np.float32(lattice_design.scale(form, lattice.vertices.shape[1] - 1)), peak
