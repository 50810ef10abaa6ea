"""labelme: one JSON file for each image; later shapes are drawn over earlier ones."""

import base64
import binascii
import math
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from deeplab_jax.data.annotations.drawing import Annotated, Area, Part, checked_size, ellipse, polygon
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import masks

_BACKGROUND, _VOID = ("_background_", "background"), ("__ignore__", "_ignore_")


def fits(content: object) -> bool:
    """Whether a JSON file is labelme's."""
    return isinstance(content, dict) and isinstance(content.get("shapes"), list)


def read(path: Path, content: dict) -> Part:
    """The image of one file; `UserError` if it is damaged."""
    image = _image(path, content)
    names = {a.label for a in image.areas if a.label} - set(_BACKGROUND)
    return Part([(name, name, None) for name in names], [image])


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
    return Annotated(_photograph(path, content), size, areas, left_out, without_class)


def below_one_folder(images: Sequence[Annotated]) -> list[Annotated]:
    """Photographs named by their paths below the folder that they share, as a folder of photographs has them."""
    folder = os.path.commonpath([os.path.dirname(image.image) or "." for image in images])
    return [image._replace(image=os.path.relpath(image.image, folder)) for image in images]


def _photograph(path: Path, content: dict) -> str:
    """The photograph's path: imagePath is relative to the file; one from another machine names the file beside it."""
    name = PurePosixPath(str(content.get("imagePath") or path.name).replace("\\", "/"))
    elsewhere = name.is_absolute() or (name.parts[:1] and name.parts[0].endswith(":"))
    return os.path.normpath(path.parent / (name.name if elsewhere else name))


def _area(shape: dict, size: tuple[int, int]) -> Area | None:
    label = "" if shape["label"] is None else str(shape["label"])
    kind, points = shape.get("shape_type") or "polygon", shape["points"]
    named = None if label in _VOID else "background" if label in _BACKGROUND else label
    if kind == "mask":
        pixels = masks.read_label(base64.b64decode(shape["mask"]), "its mask") > 0
        return Area.of(named, pixels, round(float(points[0][1])), round(float(points[0][0])))
    if kind == "polygon" and len(points) > 2:
        return Area.of(named, polygon([points], size))
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points[0], points[-1] if len(points) == 2 else points[2]
        return Area.of(named, polygon([[(x0, y0), (x1, y0), (x1, y1), (x0, y1)]], size))
    if kind == "circle":
        (x, y), (u, v) = points
        radius = math.hypot(u - x, v - y)
        return Area.of(named, polygon([ellipse(x, y, radius, radius)], size))
    return None
