"""Trimaps: the narrow band around object boundaries in which v1 (section 5.2, Figure 5) measures accuracy."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from deeplab_jax.metrics.confusion import VOID

SOURCES = ("boundary", "void")
TABLE_WIDTHS = (1, 2, 3, 5, 10, 20, 40)  # the widths that a table shows if there are many


def boundary(label: np.ndarray) -> np.ndarray:
    """Pixels with a 4-neighbour of another label, void counting as one. label [H, W]; returns [H, W] bool."""
    edge = np.zeros(label.shape, bool)
    rows, columns = label[1:] != label[:-1], label[:, 1:] != label[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    return edge


def distance(label: np.ndarray, source: str = "boundary") -> np.ndarray:
    """Euclidean distance in pixels of every pixel to the nearest boundary pixel.

    Args:
      label: [H, W] uint8, 255 = void.
      source: "boundary" (see `boundary`), or "void", the papers' rule: distance to the void pixels that VOC's
        annotators left along the outlines.

    Returns:
      [H, W] float64, infinite where the image has no such pixel.

    Raises:
      ValueError: another source.
    """
    if source not in SOURCES:
        raise ValueError(f"trimap_source is '{source}'; it must be one of {', '.join(SOURCES)}")
    start = boundary(label) if source == "boundary" else label == VOID
    if not start.any():
        return np.full(label.shape, np.inf)
    return ndimage.distance_transform_edt(~start)


def band(label: np.ndarray, widths: Sequence[int], source: str = "boundary") -> np.ndarray:
    """Index of the narrowest band that contains a pixel; `len(widths)` if none does.

    A pixel is in band w if it is within distance w, inclusive; bands are nested.

    Args:
      label: [H, W] uint8, 255 = void (void pixels get an index too; metrics leave them out).
      widths: ascending, in pixels.
      source: see `distance`.

    Returns:
      [H, W] int64.
    """
    if not len(widths):
        return np.zeros(label.shape, np.int64)
    return np.searchsorted(np.asarray(widths, np.float64), distance(label, source), side="left")


def trimap(label: np.ndarray, width: float, source: str = "boundary") -> np.ndarray:
    """The valid pixels within `width` pixels of a boundary. label [H, W] uint8; returns [H, W] bool."""
    return (distance(label, source) <= width) & (label != VOID)


def shown(widths: Iterable) -> list:
    """If a table has no room for all widths, those in `TABLE_WIDTHS`; otherwise, or if none is among them, all.

    >>> shown(map(str, range(1, 41)))
    ['1', '2', '3', '5', '10', '20', '40']
    """
    widths = list(widths)
    few = [w for w in widths if float(w) in TABLE_WIDTHS]
    return few if few and len(widths) > len(TABLE_WIDTHS) else widths
