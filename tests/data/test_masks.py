"""The meaning of a mask's pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import read_label

COLORS = np.array([[200, 0, 0], [0, 0, 200]], np.uint8)
VOID = np.array([[0, 0, 0], [255, 255, 255], [224, 224, 192]], np.uint8)


def encoded(rgb: np.ndarray, kind: str, **options) -> bytes:
    out = io.BytesIO()
    Image.fromarray(rgb.astype(np.uint8)).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("void", range(len(VOID)))
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_void_colors_are_void_in_pngs_and_jpegs(void, kind):
    ids = np.zeros((48, 48), np.uint8)
    ids[:, 16:32], ids[:, 32:] = 1, 2
    options = {"quality": 90, "subsampling": 0} if kind == "JPEG" else {}
    found = read_label(encoded(np.concatenate([COLORS, VOID[void : void + 1]])[ids], kind, **options), colors=COLORS)
    expected = np.array([0, 1, 255], np.uint8)[ids]
    np.testing.assert_array_equal(found, expected)


def test_a_jpeg_takes_the_nearest_of_classes_and_void():
    near = np.array([[190, 9, 4], [8, 3, 188], [20, 20, 20], [240, 250, 249], [215, 220, 200]], np.uint8)
    for color, expected in zip(near, (0, 1, 255, 255, 255), strict=True):
        rgb = np.tile(color, (8, 8, 1))  # a flat block keeps its color
        assert (read_label(encoded(rgb, "JPEG", quality=100, subsampling=0), colors=COLORS) == expected).all(), color
    with pytest.raises(UserError, match=r"mask.png: holds the color \(20, 20, 20\), which no class has"):
        read_label(encoded(np.tile(near[2], (8, 8, 1)), "PNG"), "mask.png", COLORS)


def test_a_class_of_a_void_color_is_a_class():
    colors = np.concatenate([VOID[:1], COLORS])
    for kind in ("PNG", "JPEG"):
        assert (read_label(encoded(np.zeros((8, 8, 3)), kind), colors=colors) == 0).all()
