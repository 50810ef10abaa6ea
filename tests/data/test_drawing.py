"""The pixels of polygons, run lengths and areas."""

import numpy as np
import pytest
from scipy import ndimage

from deeplab_jax.data.annotations import coco
from deeplab_jax.data.annotations.drawing import Area, polygon
from tests.data.test_convert_labels import LARGE, SMALL, H, W


def test_run_lengths_are_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels = rng.random((H, W)) < rng.random()
        rle = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
        np.testing.assert_array_equal(coco.run_lengths(rle, (H, W)), pixels)
        np.testing.assert_array_equal(coco.run_lengths(rle | {"counts": rle["counts"].decode()}), pixels)


def test_polygons_are_pycocotools_but_for_their_border():
    mask = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.linspace(0, 2 * np.pi, 7, endpoint=False)
        radii = rng.uniform(15, 25, 7)
        corners = np.stack([45 + radii * np.cos(angles), 35 + radii * np.sin(angles)], -1).ravel().tolist()
        theirs = mask.decode(mask.merge(mask.frPyObjects([corners], 70, 90))).astype(bool)
        ours = coco.mask_of([corners], (70, 90))
        inside, around = ndimage.binary_erosion(theirs), ndimage.binary_dilation(theirs)
        assert not (inside & ~ours).any() and not (ours & ~around).any()
        assert abs(int(ours.sum()) - int(theirs.sum())) < 0.1 * (around ^ inside).sum()


def test_a_ring_within_a_ring_is_a_hole():
    pixels = polygon([LARGE, SMALL], (H, W))
    assert pixels.sum() == 18 * 18 - 16 and not pixels[9, 9] and pixels[3, 3] and not pixels[:, 20:].any()


@pytest.mark.parametrize("density", (0.0, 0.02, 0.5, 1.0))
def test_areas_give_their_pixels_back(density):
    pixels = np.random.default_rng(0).random((31, 17)) < density
    area = Area.of("cat", pixels, 3, -2)
    np.testing.assert_array_equal(area.pixels(), pixels)
    assert area.lengths.sum() == pixels.size and (area.label, area.top, area.left) == ("cat", 3, -2)


def test_areas_are_held_by_their_outlines():
    corners = [[900.2, 300.1], [1900.7, 900.4], [200.5, 1400.9]]
    area = Area.of("cat", polygon([corners], (1500, 2000)))
    assert area.lengths.nbytes < 10_000  # the pixels are 3,000,000
    assert area.pixels().sum() == pytest.approx(760_690, abs=500)  # half of |1000.5 x 1100.8 + 699.7 x 600.3|
