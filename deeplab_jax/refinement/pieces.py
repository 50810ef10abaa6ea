"""The CRF alone, for a photograph of any size: in one piece if it fits, in overlapping pieces above a given size."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deeplab_jax.crf import CRFParams, Setting, mean_field
from deeplab_jax.errors import UserError
from deeplab_jax.limits import CUT_ABOVE
from deeplab_jax.refinement.rough import Rough, Slices

# A piece sees this many standard deviations of the widest kernel beyond the part that it labels.
MARGIN_STDS = 2.0

# Pixels x labels x iterations of marginals in memory at once if those of every iteration are requested.
_HELD_VALUES = 1_000_000_000


class Piece(NamedTuple):
    """A piece of a photograph: `window` is the CRF's input, `core` the part of the photograph that it labels."""

    window: Slices
    core: Slices

    @property
    def inside(self) -> Slices:
        """The core in coordinates of the window."""
        y, x = (slice(c.start - w.start, c.stop - w.start) for c, w in zip(self.core, self.window))
        return y, x


def pieces(size: tuple[int, int], cut_above: int, margin: int, align: int = 1) -> list[Piece]:
    """Cuts [H, W] into cores of at most `cut_above` pixels, each seen in a window with `margin` pixels around it.

    All windows have one shape, so that one compiled program serves them; at the borders a window is moved inwards.
    Of the grids that are fine enough, the one with the fewest pixels in its windows is chosen. With `align`, windows
    start at its multiples and are up to `align` - 1 pixels longer.

    >>> [len(pieces((3000, 4000), pixels, 134)) for pixels in (12_000_000, 4_000_000, 500_000)]
    [1, 3, 25]
    """
    height, width = size
    if height * width <= cut_above:
        whole = (slice(0, height), slice(0, width))
        return [Piece(whole, whole)]

    def grid(rows: int) -> tuple[int, tuple[int, int], tuple[int, int]]:
        core_h = math.ceil(height / rows)
        core_w = math.ceil(width / math.ceil(width / max(cut_above // core_h, 1)))
        window = min(height, core_h + 2 * margin), min(width, core_w + 2 * margin)
        cost = math.ceil(height / core_h) * math.ceil(width / core_w) * window[0] * window[1]
        return cost, (core_h, core_w), window

    enough = min(height, 2 * math.ceil(height * width / cut_above))
    _, core, window = min(grid(rows) for rows in range(1, enough + 1) if math.ceil(height / rows) <= cut_above)
    return [
        Piece((_window(y, core[0], window[0], height, align), _window(x, core[1], window[1], width, align)), (y, x))
        for y in _cuts(height, core[0])
        for x in _cuts(width, core[1])
    ]


def _cuts(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _window(core: slice, step: int, window: int, length: int, align: int) -> slice:
    start = min(max(core.start - (window - step) // 2, 0), length - window)
    return slice(start // align * align, start + window)


def margin_of(params: CRFParams) -> int:
    """Returns the margin in pixels that a piece needs with these parameters."""
    return math.ceil(MARGIN_STDS * max(float(np.max(params.bilateral_xy_std)), float(np.max(params.gaussian_xy_std))))


def marginals_by_piece(
    rough: Rough,
    image: np.ndarray,
    setting: Setting,
    cut_above: int = CUT_ABOVE,
    return_all: bool = False,
) -> Iterator[tuple[Slices, np.ndarray]]:
    """Runs the CRF on each piece of a photograph and yields (core, marginals of the core).

    Args:
      rough: provides -log P of a window; called once per piece, so a memory-mapped file is read piece by piece.
      image: RGB, uint8 [H, W, 3].
      setting: of the CRF.
      cut_above: a photograph of more pixels is cut into cores of at most this size. The labels differ from those of the
        whole by less than 0.5 % of the pixels (see tests/test_refine.py).
      return_all: yields marginals [iterations + 1, h, w, C], after 0 to `iterations` iterations.

    Raises:
      UserError: the parameters do not match the labels, or the marginals are not finite.

    Yields:
      (core, q): its place in the photograph, and float32 [h, w, C] marginals (sum 1 over C).
    """
    for piece in pieces(image.shape[:2], cut_above, margin_of(setting.params)):
        try:
            q = mean_field(
                rough.unary(piece.window),
                image[piece.window],
                setting.params,
                **setting.options,
                return_all=return_all,
                prune=True,
            )
        except ValueError as e:  # such as weights for another number of classes
            raise UserError(str(e)) from e
        y, x = piece.inside
        inside = np.asarray(q[..., y, x, :])
        if not np.isfinite(inside.min()):  # NumPy's minimum propagates NaN, whose label would be 0
            raise UserError("the CRF's marginals are not finite; give smaller weights, or wider kernels")
        yield piece.core, inside


def refine(rough: Rough, image: np.ndarray, setting: Setting, cut_above: int = CUT_ABOVE) -> np.ndarray:
    """Returns the most probable class id of every pixel, uint8 [H, W]; the lowest of equals.

    The arguments are those of `marginals_by_piece`.
    """
    labels = np.zeros(image.shape[:2], np.uint8)
    for core, q in marginals_by_piece(rough, image, setting, cut_above):
        labels[core] = rough.ids[q.argmax(-1)]
    return labels


def refine_frames(
    rough: Rough,
    image: np.ndarray,
    setting: Setting,
    cut_above: int = CUT_ABOVE,
    *,
    frame_width: int = 320,
) -> tuple[np.ndarray, np.ndarray]:
    """Like `refine`, and also returns the marginals after every iteration, sampled to a width for a picture.

    Pieces are smaller if the marginals of all iterations would not fit in memory.

    Returns:
      (labels uint8 [H, W], frames float16 [iterations + 1, h, w, C]), w at most `frame_width`.
    """
    height, width = image.shape[:2]
    count, steps = len(rough.ids), setting.iterations + 1
    cut_above = min(cut_above, max(_HELD_VALUES // (steps * count), 1))
    step = math.ceil(max(height, width) / frame_width)
    labels = np.zeros((height, width), np.uint8)
    frames = np.zeros((steps, math.ceil(height / step), math.ceil(width / step), count), np.float16)
    for (y, x), q in marginals_by_piece(rough, image, setting, cut_above, return_all=True):
        labels[y, x] = rough.ids[q[-1].argmax(-1)]
        rows, cols = -y.start % step, -x.start % step  # the first sampled row and column of this core
        sampled = q[:, rows::step, cols::step]
        top, left = (y.start + rows) // step, (x.start + cols) // step
        frames[:, top : top + sampled.shape[1], left : left + sampled.shape[2]] = sampled
    return labels, frames
