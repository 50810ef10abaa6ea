"""CVAT's XML for images, version 1.1: areas are drawn in the order of z_order, then of the file."""

from pathlib import Path
from xml.etree import ElementTree

import numpy as np

from deeplab_jax.data.annotations.drawing import (
    Annotated,
    Area,
    Part,
    box,
    checked_size,
    ellipse,
    polygon,
    progress,
    runs,
)
from deeplab_jax.errors import UserError


def seems(path: Path) -> bool:
    """Whether a file begins like CVAT's."""
    with path.open("rb") as file:
        return b"<annotations" in file.read(2000)


def read(path: Path) -> Part | None:
    """The images of one file, with the names and colors of the task's labels; None if it is not CVAT's."""
    try:
        root = ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as e:
        raise UserError(f"{path}: is not valid XML ({e}); export it again from CVAT") from e
    if root.tag != "annotations":
        return None
    if root.find("track") is not None:
        raise UserError(f"{path}: is CVAT's XML for videos; export the task as 'CVAT for images 1.1'")
    labels = {label.findtext("name"): _color(label.findtext("color")) for label in root.iter("label")}
    images = [_image(path, element) for element in progress(root.findall("image"))]
    for image in images:
        for area in image.areas:
            labels.setdefault(area.label, None)
    return Part([(0, name, color) for name, color in labels.items() if name], images)


def _image(path: Path, element: ElementTree.Element) -> Annotated:
    name = element.get("name") or ""
    where = f"{path}: image '{name}'"
    if not name:
        raise UserError(f"{path}: holds an image without a name; export it again")
    size = checked_size(where, element.get("height"), element.get("width"))
    found, left_out, without_class = [], 0, 0
    for shape in element:
        if shape.tag == "tag":
            continue
        try:
            area = _area(shape, size)
            if area is None:
                left_out += 1
            elif not area.label:
                without_class += 1
            else:
                found.append((int(shape.get("z_order") or 0), area))
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as e:
            raise UserError(f"{where}: has a {shape.tag} that cannot be read ({e}); export it again") from e
    found.sort(key=lambda f: f[0])
    return Annotated(name, size, [area for _, area in found], left_out, without_class)


def _area(shape: ElementTree.Element, size: tuple[int, int]) -> Area | None:
    label = shape.attrib.get("label")
    number = lambda key: float(shape.attrib.get(key) or 0)  # noqa: E731
    if shape.tag == "polygon":
        ring = [[float(n) for n in point.split(",")] for point in shape.attrib["points"].split(";")]
        return Area.of(label, polygon([ring], size))
    if shape.tag == "box":
        x, y, w, h = number("xtl"), number("ytl"), number("xbr") - number("xtl"), number("ybr") - number("ytl")
        corners = np.array(box(-w / 2, -h / 2, w, h))
        turn = np.deg2rad(number("rotation"))  # about the center
        turned = corners @ np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        return Area.of(label, polygon([turned + np.array([x + w / 2, y + h / 2])], size))
    if shape.tag == "ellipse":
        round_one = ellipse(number("cx"), number("cy"), number("rx"), number("ry"), number("rotation"))
        return Area.of(label, polygon([round_one], size))
    if shape.tag == "mask":
        counts = [int(n) for n in shape.attrib["rle"].split(",")]
        width, height = int(shape.attrib["width"]), int(shape.attrib["height"])
        if width > size[1] or height > size[0]:
            raise ValueError(f"a mask of {width}x{height} pixels")
        pixels = runs(counts, height, width, by_column=False)
        return Area.of(label, pixels, round(number("top")), round(number("left")))
    return None


def _color(text: str | None) -> tuple[int, int, int] | None:
    try:
        r, g, b = bytes.fromhex((text or "").lstrip("#"))
    except ValueError:
        return None
    return r, g, b
