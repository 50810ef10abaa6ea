"""labelme: one JSON file for each image; later shapes are drawn over earlier ones."""

import base64
import binascii
import math
from pathlib import Path

from deeplab_jax.data.annotations.drawing import Annotated, Annotations, Area, checked_size, ellipse, polygon
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import masks

_BACKGROUND, _VOID = ("_background_", "background"), ("__ignore__", "_ignore_")


def fits(content: object) -> bool:
    """Whether a JSON file is labelme's."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read(contents: list[tuple[Path, dict]]) -> Annotations:
    """All images; `UserError` names a damaged file."""
    images = [_image(path, content) for path, content in contents]
    names = sorted({a.label for image in images for a in image.areas if a.label} - set(_BACKGROUND))
    return Annotations(names, None, images)


def _image(path: Path, content: dict) -> Annotated:
    size = checked_size(path, content.get("imageHeight"), content.get("imageWidth"))
    areas, left_out, without_class = [], 0, 0
    for number, shape in enumerate(content["shapes"], 1):
        try:
            area = _area(shape, size)
        except (LookupError, TypeError, ValueError, OverflowError, AttributeError, binascii.Error, UserError) as e:
            raise UserError(f"{path}: shape {number} cannot be read ({e}); correct it in labelme") from e
        if area is None:
            left_out += 1
        elif area.label == "":
            without_class += 1
        else:
            areas.append(area)
    name = Path(str(content.get("imagePath") or path.name).replace("\\", "/")).name
    return Annotated(name, size, areas, left_out, without_class)


def _area(shape: dict, size: tuple[int, int]) -> Area | None:
    label, kind, points = str(shape["label"]), shape.get("shape_type") or "polygon", shape["points"]
    named = None if label in _VOID else "background" if label in _BACKGROUND else label
    if kind == "mask":
        pixels = masks.read_label(base64.b64decode(shape["mask"]), "its mask") > 0
        return Area(named, pixels, round(float(points[0][1])), round(float(points[0][0])))
    if kind == "polygon" and len(points) > 2:
        return Area(named, polygon([points], size))
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[-1] if len(points) == 2 else points[2]
        return Area(named, polygon([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)]], size))
    if kind == "circle":
        (x, y), (u, v) = points
        radius = math.hypot(u - x, v - y)
        return Area(named, polygon([ellipse(x, y, radius, radius)], size))
    return None
