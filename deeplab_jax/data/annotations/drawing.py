"""Rasterizing the areas of annotation tools: polygons, boxes, ellipses, run lengths."""

import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.palettes import VOID
from deeplab_jax.limits import REFUSE_ABOVE

_T = TypeVar("_T")
_FARTHEST = 1e9  # limit for a corner, in pixels
_ANY_NUMBER = np.errstate(over="ignore", invalid="ignore")  # corners beyond floats: `polygon` refuses them


class Area(NamedTuple):
    """One annotated area: its class (None = void) and its pixels, the upper left of which is at (top, left).

    A set of photographs has many areas, so pixels are held as run lengths, row by row, off first.
    """

    label: str | None
    lengths: np.ndarray
    size: tuple[int, int]
    top: int = 0
    left: int = 0

    @classmethod
    def of(cls, label: str | None, pixels: np.ndarray, top: int = 0, left: int = 0) -> "Area":
        """The area of bool pixels `[h, w]`."""
        on = np.ravel(pixels)
        changes = np.flatnonzero(np.diff(on, prepend=False))
        lengths = np.diff(changes, prepend=0, append=on.size).astype(np.int32)
        return cls(label, lengths, (pixels.shape[0], pixels.shape[1]), top, left)

    def pixels(self) -> np.ndarray:
        """Bool `[h, w]`."""
        return runs(self.lengths, *self.size, by_column=False)


class Annotated(NamedTuple):
    """The annotation of one image: its path in the tool's file, (height, width), and its areas from the bottom up.

    `left_out` counts shapes without an area: points, lines, shapes of unknown kinds; `without_class` areas that the
    tool has given no class.
    """

    image: str
    size: tuple[int, int]
    areas: list[Area]
    left_out: int = 0
    without_class: int = 0


class Part(NamedTuple):
    """The contents of one of a tool's files.

    `classes` has the place of each class among all files', its name and its color, if it has one; `unlabelled` counts
    images without any annotation that the tool lists without their size.
    """

    classes: list[tuple[Any, str, tuple[int, int, int] | None]]
    images: list[Annotated]
    unlabelled: int = 0


class Annotations(NamedTuple):
    """The contents of a tool's files: names of classes without the background, colors (None = none), and images."""

    names: list[str]
    colors: list[tuple[int, int, int]] | None
    images: list[Annotated]
    unlabelled: int = 0


def joined(parts: Sequence[Part]) -> Annotations:
    """The contents of all files of a tool, classes in the order of their places; `TypeError` if these have none."""
    colors: dict[str, tuple[int, int, int] | None] = {}
    for _, name, color in sorted((c for part in parts for c in part.classes), key=lambda c: c[0]):
        colors.setdefault(name, color)
    colors.pop("background", None)
    given = [c for c in colors.values() if c is not None and c != (0, 0, 0)]
    whole = 0 < len(colors) == len(given) == len(set(given))
    images = [image for part in parts for image in part.images]
    return Annotations(list(colors), given if whole else None, images, sum(part.unlabelled for part in parts))


def progress(items: Collection[_T], unit: str = "image") -> Iterable[_T]:
    """The items, with a bar while several are read."""
    return tqdm(items, desc="reading labels", unit=unit, mininterval=0.5, leave=False, disable=len(items) < 2)


def checked_size(where: object, height: object, width: object) -> tuple[int, int]:
    """(height, width) from a file; `UserError` if they cannot be an image's."""
    try:
        h, w = int(height), int(width)  # type: ignore[call-overload]
    except (TypeError, ValueError, OverflowError) as e:
        raise UserError(f"{where}: has no height and width of an image; export it again") from e
    if h < 1 or w < 1 or h * w > REFUSE_ABOVE:
        raise UserError(f"{where}: has an image of {w}x{h} pixels; export it again")
    return h, w


def painted(image: Annotated, ids: dict[str, int]) -> np.ndarray:
    """The class map, uint8 `[H, W]`: 0 outside all areas, later areas over earlier ones; `ids`: each class's id."""
    label = np.zeros(image.size, np.uint8)
    height, width = image.size
    for area in image.areas:
        (h, w), pixels = area.size, area.pixels()
        top, left = max(area.top, 0), max(area.left, 0)
        bottom, right = min(area.top + h, height), min(area.left + w, width)
        if bottom > top and right > left:
            inside = pixels[top - area.top : bottom - area.top, left - area.left : right - area.left]
            label[top:bottom, left:right][inside] = VOID if area.label is None else ids[area.label]
    return label


def polygon(rings: Sequence[Sequence[Sequence[float]] | np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Pixels whose centers lie inside an odd number of rings: a ring within a ring is a hole.

    Args:
      rings: each a list of corners (x, y), pixel (0, 0) spans 0 to 1.
      size: height, width.

    Returns:
      bool `[H, W]`.

    Raises:
      ValueError: a corner is not a pair of numbers, or beyond any image.
    """
    height, width = size
    edges = [np.zeros((0, 4))]
    for ring in rings:
        corners = np.asarray(ring, np.float64).reshape(len(ring), 2)
        if not (np.abs(corners) < _FARTHEST).all():
            raise ValueError("a corner is not finite, or far outside the image")
        edges.append(np.concatenate([corners, np.roll(corners, -1, axis=0)], 1))
    x0, y0, x1, y1 = np.concatenate(edges).T
    # Each edge crosses the centers of the rows from `begin` to `end`; there, at its columns, inside and outside change.
    begin, end = (np.clip(np.ceil(y - 0.5), 0, height).astype(int) for y in (np.minimum(y0, y1), np.maximum(y0, y1)))
    inside = np.zeros(size, bool)
    edge = np.repeat(np.arange(len(x0)), end - begin)
    if len(edge):
        rows = np.arange(len(edge)) + (end - np.cumsum(end - begin))[edge]
        crossing = x0[edge] + (rows + 0.5 - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
        columns = np.clip(np.ceil(crossing - 0.5), 0, width).astype(int)
        top, left, bottom, right = rows.min(), columns.min(), rows.max() + 1, columns.max() + 1
        flips = np.zeros((bottom - top, right - left), np.uint8)
        np.bitwise_xor.at(flips, (rows - top, columns - left), 1)
        part = inside[top:bottom, left:right]
        part[:] = np.bitwise_xor.accumulate(flips, axis=1)[:, : part.shape[1]]
    return inside


@_ANY_NUMBER
def box(x: float, y: float, width: float, height: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """Corners of a box whose upper left corner is (x, y), rotated about it by `turn` degrees clockwise."""
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    corners = ((0.0, 0.0), (width, 0.0), (width, height), (0.0, height))
    return [(x + dx * cos - dy * sin, y + dx * sin + dy * cos) for dx, dy in corners]


@_ANY_NUMBER
def ellipse(x: float, y: float, rx: float, ry: float, turn: float = 0.0) -> list[tuple[float, float]]:
    """An ellipse about (x, y) as a polygon of 180 corners, rotated by `turn` degrees clockwise."""
    angle = np.linspace(0, 2 * np.pi, 180, endpoint=False)
    cos, sin = np.cos(np.deg2rad(turn)), np.sin(np.deg2rad(turn))
    u, v = rx * np.cos(angle), ry * np.sin(angle)
    return list(zip((x + u * cos - v * sin).tolist(), (y + u * sin + v * cos).tolist()))


def runs(counts: Sequence[int] | np.ndarray, height: int, width: int, by_column: bool) -> np.ndarray:
    """Run lengths, off first, as bool `[height, width]`; `ValueError` if they do not fill it."""
    lengths = np.asarray(counts, np.int64)
    if (lengths < 0).any() or lengths.sum() != height * width:
        raise ValueError(f"run lengths of {lengths.sum()} pixels for {height * width}")
    values = np.repeat(np.arange(len(lengths)) % 2 == 1, lengths)
    return values.reshape(width, height).T if by_column else values.reshape(height, width)


def stem_of(image: str) -> str:
    """The name of an image's mask: its path with slashes, without suffix and parts that lead out of the folder."""
    path = PurePosixPath(os.path.splitext(image.replace("\\", "/"))[0])
    parts = [p for p in path.parts if p not in ("/", ".", "..") and not p.endswith(":")]
    return "/".join(parts)
