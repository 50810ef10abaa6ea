"""The meaning of a mask's pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import read_label
from tests.imaging.writers import gray_and_opacity16_png, rgb16_png, tiff

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


def test_deep_masks_are_read_by_the_values_they_hold():
    ids = np.random.default_rng(0).integers(0, 256, (7, 9)).astype(np.uint16)
    gray = np.repeat(ids[..., None], 3, -1)
    opaque = np.full_like(ids, 65535)
    for name, data in {
        "gray and opacity": gray_and_opacity16_png(np.stack([ids, opaque], -1)),
        "gray in color": rgb16_png(gray),
        "with opacity": rgb16_png(np.concatenate([gray, opaque[..., None]], -1)),
        "white is 65535": rgb16_png(gray * 257),
        "high byte": rgb16_png(gray << 8),
        "TIFF, II": tiff(gray, 16, 2, order=b"II"),
        "TIFF, MM": tiff(gray, 16, 2, order=b"MM"),
    }.items():
        np.testing.assert_array_equal(read_label(data), ids, name)
    with pytest.raises(UserError, match="holds the id 300"):
        read_label(rgb16_png(np.where(gray == gray[0, 0], np.uint16(300), gray)), "a.png")


@pytest.mark.parametrize("scale", (1, 256, 257))
def test_deep_colors_are_looked_up(scale):
    ids = np.random.default_rng(0).integers(0, 2, (7, 9))
    deep = COLORS[ids].astype(np.uint16) * np.uint16(scale)
    np.testing.assert_array_equal(read_label(rgb16_png(deep), colors=COLORS), ids)
