"""COCO's instances: polygons and run lengths; small objects are drawn over large ones, crowds are void below all."""

from pathlib import Path

import numpy as np

from deeplab_jax.data.annotations.drawing import Annotated, Area, Part, checked_size, polygon, progress, runs
from deeplab_jax.errors import UserError


def fits(content: object) -> bool:
    """Whether a JSON file is COCO's."""
    return isinstance(content, dict) and all(isinstance(content.get(k), list) for k in ("images", "annotations"))


def read(path: Path, content: dict) -> Part:
    """The images of one file, its categories in the order of their ids.

    A file's ids are read by its own categories: several files may give one id to different classes.
    """
    images: list[Annotated] = []
    try:
        categories = {c["id"]: str(c["name"]) for c in content["categories"]}
        listed = {image["id"]: image for image in content["images"]}
        annotations: dict = {i: [] for i in listed}
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
    except (KeyError, TypeError) as e:
        raise UserError(f"{path}: is not complete COCO JSON ({type(e).__name__}: {e}); export it again") from e
    if not all(isinstance(i, int | float) for i in categories):
        raise UserError(f"{path}: the ids of its categories are not numbers; export it again")
    for i, image in progress(listed.items()):
        where = f"{path}: image {i}"
        size = checked_size(where, image.get("height"), image.get("width"))
        try:
            areas, left_out = _areas(annotations[i], categories, size)
            images.append(Annotated(str(image["file_name"]), size, areas, left_out))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
            raise UserError(f"{where}: has an annotation that cannot be read ({e}); export it again") from e
    return Part([(i, name, None) for i, name in categories.items()], images)


def _areas(annotations: list[dict], categories: dict, size: tuple[int, int]) -> tuple[list[Area], int]:
    found, left_out = [], 0
    for annotation in annotations:
        shape = annotation.get("segmentation")
        if not shape:
            left_out += 1  # only a box
            continue
        pixels = mask_of(shape, size)
        crowd = bool(annotation.get("iscrowd"))
        area = Area.of(None if crowd else categories[annotation["category_id"]], pixels)
        found.append((not crowd, -int(pixels.sum()), area))
    found.sort(key=lambda f: f[:2])
    return [area for _, _, area in found], left_out


def mask_of(shape: dict | list, size: tuple[int, int]) -> np.ndarray:
    """A `segmentation`, bool `[H, W]`: run lengths, or the union of polygons; `ValueError` if it is neither."""
    if isinstance(shape, dict):
        return run_lengths(shape, size)
    pixels = np.zeros(size, bool)
    for part in shape:
        if len(part) >= 6 and len(part) % 2 == 0:
            pixels |= polygon([np.asarray(part, float).reshape(-1, 2)], size)
    return pixels


def run_lengths(rle: dict, size: tuple[int, int] | None = None) -> np.ndarray:
    """COCO's run lengths (column by column, off first), as numbers or compressed text: bool `[H, W]`.

    Raises:
      ValueError: they are of another size, or do not fill it.
    """
    height, width = (int(n) for n in rle["size"])
    if size is not None and (height, width) != size:
        raise ValueError(f"run lengths of {width}x{height} pixels")
    counts = rle["counts"]
    if isinstance(counts, str | bytes):
        counts = _uncompress(counts if isinstance(counts, str) else counts.decode("ascii"))
    return runs(counts, height, width, by_column=True)


def _uncompress(text: str) -> list[int]:
    """COCO's text form: 5 bits a character, lowest first, signed; from the fourth on, differences to two before."""
    counts: list[int] = []
    position = 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            code = ord(text[position]) - 48
            value |= (code & 0x1F) << shift
            more = bool(code & 0x20)
            shift += 5
            position += 1
            if not more and code & 0x10:
                value |= -1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
    return counts
