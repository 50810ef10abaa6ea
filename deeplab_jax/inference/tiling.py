"""Overlapping tiles: windows that share one static shape, and the weights with which they are blended."""

import math
from typing import Literal, NamedTuple

import numpy as np

STRIDE = 8  # windows start at multiples of this, so that their score grids are parts of the whole image's


class Span(NamedTuple):
    """One window along one axis, [start, stop)."""

    start: int
    stop: int


def padded_size(size: int, multiple: int, extra: int = 1) -> int:
    """The smallest `multiple * k + extra >= size` with k >= 1: sizes that suit align-corners upsampling.

    Args:
      size: length of an axis.
      multiple: a multiple of the output stride.
      extra: the network's `Architecture.size_extra`.
    """
    return max(1, math.ceil((size - extra) / multiple)) * multiple + extra


def spans(size: int, side: int, overlap: int) -> list[Span]:
    """Cuts an axis into windows that overlap by at least `overlap` and together cover it.

    Args:
      size: length of the axis.
      side: length of a window; an axis no longer than this is one window.
      overlap: pixels shared by neighbours, below `side`.

    Raises:
      ValueError: `overlap` leaves no step.
    """
    if size <= side:
        return [Span(0, size)]
    step = (side - overlap) // STRIDE * STRIDE
    if step <= 0 or overlap < 0:
        raise ValueError(f"tiles of {side} pixels cannot overlap by {overlap}; the overlap must be smaller")
    starts = [0]
    while starts[-1] + side < size:
        starts.append(starts[-1] + step)
    return [Span(s, min(s + side, size)) for s in starts]


def blend_weights(span: Span, size: int, overlap: int) -> np.ndarray:
    """Weight of every pixel of a window along one axis, [stop - start] float32.

    Zero in the outer quarter of the overlap, where the window's border affects the scores, then rising to one over its
    middle half; one where the window ends with the image.
    """
    at = np.arange(span.start, span.stop, dtype=np.float32) + 0.5
    weight = np.ones(span.stop - span.start, np.float32)
    if overlap:
        if span.start > 0:
            weight = np.minimum(weight, (at - span.start - overlap / 4) / (overlap / 2))
        if span.stop < size:
            weight = np.minimum(weight, (span.stop - at - overlap / 4) / (overlap / 2))
    return np.clip(weight, 0, 1)


def default_overlap(side: int) -> int:
    """A quarter of the side, as a multiple of `STRIDE`."""
    return max(side // 4 // STRIDE, 1) * STRIDE


def pad(array: np.ndarray, shape: tuple[int, int], mode: Literal["constant", "edge"] = "constant") -> np.ndarray:
    """Pads [H, W, D] at the bottom and right to `shape`."""
    return np.pad(array, [(0, shape[0] - array.shape[0]), (0, shape[1] - array.shape[1]), (0, 0)], mode=mode)
