"""Host arrays that are arguments of the plain call's program: of few sizes, and where XLA takes them without a copy."""

import dataclasses
import math

import numpy as np

POINTS = 2048  # points, and vertices, that are processed at once; this many stay in the cache
LANES = 4  # labels are padded to multiples of this
PRUNED = 8  # and those that pruning leaves to multiples of this, whose number depends on the photograph
_ALIGNMENT = 64  # bytes; XLA's CPU client copies an array that begins elsewhere


@dataclasses.dataclass(frozen=True)
class Points:
    """Where N points are in a buffer: row by row, with unused places after each row.

    Attributes:
      rows: of a grid; 1 for points without one.
      width: points in a row.
      gap: unused places after each row.
    """

    rows: int
    width: int
    gap: int = 0

    @property
    def pitch(self) -> int:
        """Places from the beginning of a row to that of the next."""
        return self.width + self.gap

    @property
    def count(self) -> int:
        """Places in use, gaps included; they come first."""
        return self.rows * self.pitch

    @property
    def room(self) -> int:
        """Places in the buffer."""
        return room(self.count)

    def within(self, buffer: np.ndarray) -> np.ndarray:
        """The points [rows, width, ...] within a buffer [room, ...]: a view."""
        return buffer[: self.count].reshape(self.rows, self.pitch, *buffer.shape[1:])[:, : self.width]


def room(count: int, least: int = 8 * POINTS) -> int:
    """The size of the buffer for `count` points or vertices: `least` times a power of four, in finer steps for large
    counts.

    >>> [room(count) for count in (100, 30_000, 187_500, 5_000_000)]
    [16384, 65536, 262144, 5242880]
    """
    if count <= 16 * least:
        return least << 2 * max(0, math.ceil(math.log2(max(count, 1) / least) / 2))
    step = 1 << (count.bit_length() - 4)
    return -(-count // step) * step


def lanes(labels: int, multiple: int = LANES) -> int:
    """Labels in a buffer.

    >>> lanes(11), lanes(11, PRUNED)
    (12, 16)
    """
    return -(-labels // multiple) * multiple


def zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Zeros that a compiled program on the CPU reads where they are. Pages that nobody writes take no time.

    >>> zeros((3, 5), np.float32).ctypes.data % 64
    0
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def padded(values: np.ndarray, points: Points) -> np.ndarray:
    """Values [N, ...] in a buffer [room, ...], zeros elsewhere."""
    out = zeros((points.room, *values.shape[1:]), values.dtype.type)
    put(values, out, points)
    return out


def put(values: np.ndarray, buffer: np.ndarray, points: Points) -> None:
    """Copies values [N, ...] to their places in a buffer [room, ...]."""
    np.copyto(points.within(buffer), values.reshape(points.rows, points.width, *values.shape[1:]))
