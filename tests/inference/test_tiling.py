import itertools

import numpy as np
import pytest

from deeplab_jax.inference import tiling


@pytest.mark.parametrize(("size", "padded"), [(1, 33), (33, 33), (34, 65), (321, 321), (360, 385), (480, 481)])
def test_padded_size(size, padded):
    assert tiling.padded_size(size, 32) == padded


@pytest.mark.parametrize(("size", "padded"), [(1, 10), (10, 10), (306, 306), (307, 314), (514, 514)])
def test_padded_size_of_even_pools(size, padded):
    assert tiling.padded_size(size, 8, 2) == padded


@pytest.mark.parametrize(
    ("size", "side", "overlap"), [(20, 33, 8), (33, 33, 8), (34, 33, 8), (200, 65, 16), (1000, 97, 24)]
)
def test_windows_cover_the_axis_and_overlap(size, side, overlap):
    found = tiling.spans(size, side, overlap)
    assert found[0].start == 0 and found[-1].stop == size
    for a, b in itertools.pairwise(found):
        assert a.start < b.start and a.stop - b.start >= overlap
    for s in found:
        assert s.start % tiling.STRIDE == 0 and 0 < s.stop - s.start <= side


@pytest.mark.parametrize(("size", "side", "overlap"), [(200, 65, 16), (1000, 97, 24), (34, 33, 8)])
def test_weights_cover_every_pixel_and_vanish_at_inner_borders(size, side, overlap):
    total = np.zeros(size)
    for span in tiling.spans(size, side, overlap):
        weight = tiling.blend_weights(span, size, overlap)
        assert weight.min() >= 0 and weight.max() == 1
        quarter = overlap // 4
        assert span.start == 0 or not weight[:quarter].any()
        assert span.stop == size or not weight[-quarter:].any()
        total[span.start : span.stop] += weight
    assert total.min() > 0.5


def test_too_much_overlap_is_refused():
    with pytest.raises(ValueError, match="overlap must be smaller"):
        tiling.spans(100, 33, 33)
