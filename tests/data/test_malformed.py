"""500 damaged lists and annotation files: each is read or gives one sentence that names a file."""

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest

from deeplab_jax.data.annotations.opening import open_labels
from deeplab_jax.data.class_files import read_classes
from deeplab_jax.errors import UserError
from tests.data.test_convert_labels import packed_brush

SEED = int(os.environ.get("DEEPLAB_TEST_SEED", "20"))

SQUARE = [[1, 1], [9, 1], [9, 9], [1, 9]]
COCO = {
    "images": [{"id": 1, "file_name": "a.jpg", "height": 12, "width": 16}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
    "annotations": [
        {"image_id": 1, "category_id": 1, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]], "area": 64, "iscrowd": 0},
        {"image_id": 1, "category_id": 2, "segmentation": {"size": [12, 16], "counts": [60, 40, 92]}, "iscrowd": 1},
        {"image_id": 1, "category_id": 2, "segmentation": {"size": [12, 16], "counts": "l1X1l2"}, "iscrowd": 0},
    ],
}
LABELME = {
    "imagePath": "a.jpg", "imageHeight": 12, "imageWidth": 16,
    "shapes": [
        {"label": "cat", "points": SQUARE, "shape_type": "polygon"},
        {"label": "dog", "points": [[2, 2], [5, 6]], "shape_type": "rectangle"},
        {"label": "dog", "points": [[6, 6], [8, 6]], "shape_type": "circle"},
        {"label": "__ignore__", "points": SQUARE, "shape_type": "polygon", "group_id": None, "flags": {}},
    ],
}  # fmt: skip
BRUSH = np.arange(12)[:, None] * np.ones(16) > 6
RESULT = {"original_width": 16, "original_height": 12, "type": "x", "from_name": "label", "to_name": "image"}
STUDIO = [
    {
        "data": {"image": "/data/upload/1/a.jpg"},
        "annotations": [
            {
                "was_cancelled": False,
                "result": [
                    RESULT | {"value": {"points": [[5, 5], [60, 5], [60, 60]], "polygonlabels": ["cat"]}},
                    RESULT | {"value": {"x": 9, "y": 9, "width": 40, "height": 30, "rectanglelabels": ["dog"]}},
                    RESULT | {"value": {"x": 50, "y": 50, "radiusX": 9, "radiusY": 7, "ellipselabels": ["dog"]}},
                    RESULT | {"value": {"rle": packed_brush(BRUSH), "brushlabels": ["cat"]}},
                    RESULT | {"id": "r", "type": "polygon", "value": {"points": SQUARE}},
                    RESULT | {"id": "r", "type": "labels", "value": {"points": SQUARE, "labels": ["dog"]}},
                ],
            }
        ],
    }
]  # fmt: skip
CVAT = """<?xml version="1.0"?><annotations><version>1.1</version><meta><task><labels>
<label><name>cat</name><color>#ff0000</color></label><label><name>dog</name><color>#00ff00</color></label>
</labels></task></meta><image id="0" name="a.jpg" width="16" height="12">
<polygon label="cat" points="1,1;9,1;9,9;1,9" z_order="1"/><box label="dog" xtl="1" ytl="2" xbr="5" ybr="6"/>
<ellipse label="dog" cx="8" cy="6" rx="2" ry="3"/><mask label="cat" rle="1,2,3" left="1" top="2" width="3" height="2"/>
<polyline label="cat" points="1,1;2,2"/></image></annotations>"""
SUPERVISELY = {
    "classes": [{"title": "cat", "shape": "bitmap", "color": "#FF0000"}, {"title": "dog", "color": "#00FF00"}]
}
TEXT = "background 0 0 0\ncat 255 0 0 # soft\ndog 0 255 0\n"
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ncat:255,0,0::\n"

LABELS = {"coco.json": COCO, "a.json": LABELME, "studio.json": STUDIO, "cvat.xml": CVAT}
LISTS = {"classes.txt": TEXT, "labelmap.txt": LABELMAP, "meta.json": SUPERVISELY, "coco.json": COCO["categories"]}
ODD = [None, -1, 0, 1e308, float("nan"), "", "x", "1,2", [], [[]], {}, True, 10**30, [1, 2], {"a": 1}, "\ud83d"]


def encoded(content: object) -> bytes:
    return content.encode() if isinstance(content, str) else json.dumps(content).encode()


def places(content: object) -> list[tuple]:
    """(container, key) of every value in a tree of JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [pair for key, value in items for pair in ((content, key), *places(value))]


def damaged(content: object, rng: np.random.Generator) -> bytes:
    """A value replaced or removed, or bytes changed or cut off."""
    if not isinstance(content, str) and rng.random() < 0.7:
        tree = copy.deepcopy(content)
        of = places(tree)
        container, key = of[int(rng.integers(len(of)))]
        if isinstance(container, dict) and rng.random() < 0.3:
            del container[key]
        else:
            container[key] = ODD[int(rng.integers(len(ODD)))]
        return encoded(tree)
    data = bytearray(encoded(content))
    for _ in range(int(rng.integers(1, 4))):
        data[int(rng.integers(len(data)))] = int(rng.integers(256))
    if rng.random() < 0.3:
        del data[int(rng.integers(len(data))) :]
    return bytes(data)


def read_labels(path: Path) -> None:
    for _, make in open_labels(path).masks:
        label = make()
        assert label.dtype == np.uint8 and label.ndim == 2


@pytest.mark.parametrize("content", LABELS.values(), ids=LABELS)
def test_whole_labels_are_read(content, tmp_path):
    path = tmp_path / ("a.xml" if isinstance(content, str) else "a.json")
    path.write_bytes(encoded(content))
    read_labels(path)


@pytest.mark.parametrize(("read", "whole"), [(read_labels, LABELS), (read_classes, LISTS)], ids=["labels", "classes"])
def test_250_damaged_files_give_a_sentence(read, whole, tmp_path):
    print(f"DEEPLAB_TEST_SEED={SEED}")
    rng = np.random.default_rng([SEED, len(tmp_path.name)])
    refused = 0
    for n in range(250):
        name = list(whole)[n % len(whole)]
        path = tmp_path / name
        path.write_bytes(damaged(whole[name], rng))
        try:
            read(path)
        except UserError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e), path.read_bytes()
        except Exception as e:
            raise AssertionError(path.read_bytes()) from e
    assert refused > 80
