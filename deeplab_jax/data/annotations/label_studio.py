"""Label Studio's JSON: polygons, boxes and ellipses in percent, brushes; later areas are drawn over earlier ones.

A result holds an area with its class (`polygonlabels`), or, where the project has a control for each, one result holds
the area (`polygon`) and another one of the same id the class (`labels`).
"""

import glob
import re
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from deeplab_jax.data.annotations.drawing import Annotated, Area, Part, box, checked_size, ellipse, polygon, progress
from deeplab_jax.errors import UserError

_UPLOADED = re.compile(r"[0-9a-f]{8}-(?=.)")  # what Label Studio puts before the name of an upload
_KINDS = ("polygon", "rectangle", "ellipse", "brush")


def fits(content: object) -> bool:
    """Whether a JSON file is Label Studio's export (not its short form)."""
    return (
        isinstance(content, list) and bool(content) and all(isinstance(t, dict) and "annotations" in t for t in content)
    )


def read(path: Path, content: list) -> Part:
    """The labelled tasks of one file; of several annotations of a task the first that was not cancelled."""
    images = []
    for number, task in enumerate(progress(content), 1):
        try:
            image = _task(path, task)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, OverflowError) as e:
            raise UserError(f"{path}: task {number} cannot be read ({type(e).__name__}: {e}); export it again") from e
        if image is not None:
            images.append(image)
    names = {a.label for image in images for a in image.areas if a.label}
    return Part([(name, name, None) for name in names], images, len(content) - len(images))


def _task(path: Path, task: dict) -> Annotated | None:
    done = [a for a in task["annotations"] if not a.get("was_cancelled")]
    results = done[0]["result"] if done else []
    shapes = [r for r in results if "original_width" in r]
    if not shapes:
        return None
    url = str(task["data"].get("image") or next((v for v in task["data"].values() if isinstance(v, str)), ""))
    name = _name(path.parent, url)
    size = checked_size(f"{path}: {name}", shapes[0]["original_height"], shapes[0]["original_width"])
    labelled = [r for r in results if r.get("id") is not None and r.get("value", {}).get("labels")]
    classes = {r["id"]: r["value"]["labels"] for r in labelled}
    drawn = {result.get("id") for result in results if _kind(result)} - {None}
    areas, left_out, without_class = [], 0, 0
    for result in results:
        kind, key = _kind(result), result.get("id")
        if kind is None:
            left_out += key not in drawn  # others say more about an area that is drawn
            continue
        labels = result["value"].get(f"{kind}labels") or classes.get(key)
        label = str(labels[0]) if labels else ""
        if label:
            areas.append(Area.of(label, _pixels(kind, result["value"], size)))
        else:
            without_class += 1
    return Annotated(name, size, areas, left_out, without_class)


def _name(folder: Path, url: str) -> str:
    """A photograph's name; of an upload its own one, unless one with Label Studio's name for it is in the folder."""
    split = urlsplit(url)
    name = Path(unquote(parse_qs(split.query).get("d", [split.path])[0])).name
    if "/upload/" in split.path and not any(folder.rglob(glob.escape(name))):
        return name[begin.end() :] if (begin := _UPLOADED.match(name)) else name
    return name


def _kind(result: dict) -> str | None:
    """The kind of area that a result holds; None if it holds none, or only more about one."""
    of = result.get("type"), *result.get("value", {})
    return next((kind for kind in _KINDS if kind in of or f"{kind}labels" in of), None)


def _pixels(kind: str, value: dict, size: tuple[int, int]) -> np.ndarray:
    height, width = size
    if kind == "brush":
        return brush(value["rle"], size)
    sx, sy = width / 100, height / 100
    if kind == "polygon":
        return polygon([[(float(x) * sx, float(y) * sy) for x, y in value["points"]]], size)
    x, y, turn = float(value["x"]) * sx, float(value["y"]) * sy, float(value.get("rotation") or 0)
    if kind == "rectangle":
        return polygon([box(x, y, float(value["width"]) * sx, float(value["height"]) * sy, turn)], size)
    return polygon([ellipse(x, y, float(value["radiusX"]) * sx, float(value["radiusY"]) * sy, turn)], size)


def brush(rle: list[int], size: tuple[int, int]) -> np.ndarray:
    """Label Studio's packed RGBA of a brush, bool `[H, W]`: where it is not transparent.

    The bits: 32 for the number of bytes, 5 for the bits of a byte less one, 4 x 4 for the widths of lengths less one;
    then runs: 1 bit whether one byte is repeated, 2 for the choice of width, the length less one, and the byte or
    bytes.

    Raises:
      ValueError: the bits are of another size, or end too early.
    """
    bits = np.unpackbits(np.asarray(rle, np.uint8))
    position = 0

    def take(count: int) -> int:
        nonlocal position
        part = bits[position : position + count]
        if len(part) < count:
            raise ValueError("a brush that ends too early")
        position += count
        return int("".join(map(str, part.tolist())) or "0", 2)

    total, word = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    if total != size[0] * size[1] * 4:
        raise ValueError(f"a brush of {total // 4} pixels for an image of {size[0] * size[1]}")
    values = np.zeros(total, np.uint8)
    at = 0
    while at < total:
        repeated = take(1)
        end = at + 1 + take(widths[take(2)])
        if end > total:
            raise ValueError("a brush that is too long")
        if repeated:
            values[at:end] = take(word)
        else:
            values[at:end] = [take(word) for _ in range(end - at)]
        at = end
    return values.reshape(*size, 4)[..., 3] > 0
