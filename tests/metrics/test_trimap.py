import numpy as np
import pytest

from configs.base import get_config
from deeplab_jax.metrics import trimap


def slow_trimap(label, width, source):
    """All pairs: a valid pixel within `width` of a pixel that has a 4-neighbour of another label (or that is void)."""
    height, columns = label.shape
    start = []
    for y in range(height):
        for x in range(columns):
            if source == "void":
                if label[y, x] == 255:
                    start.append((y, x))
                continue
            near = [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
            near = [(a, b) for a, b in near if 0 <= a < height and 0 <= b < columns]
            if any(label[a, b] != label[y, x] for a, b in near):
                start.append((y, x))
    found = np.zeros(label.shape, bool)
    for y in range(height):
        for x in range(columns):
            close = any((y - a) ** 2 + (x - b) ** 2 <= width**2 for a, b in start)
            found[y, x] = close and label[y, x] != 255
    return found


def label(seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (4, 4))
    found = np.kron(coarse, np.ones((6, 7))).astype(np.uint8)
    found[rng.random(found.shape) < 0.01] = 255
    return found


@pytest.mark.parametrize("source", trimap.SOURCES)
@pytest.mark.parametrize("width", [1, 2, 3, 5])
def test_equals_the_definition(source, width):
    for seed in range(3):
        found = trimap.trimap(label(seed), width, source)
        np.testing.assert_array_equal(found, slow_trimap(label(seed), width, source))


def test_bands_are_the_trimaps_nested():
    widths = (1, 2, 5)
    index = trimap.band(label(), widths)
    for k, width in enumerate(widths):
        np.testing.assert_array_equal((index <= k) & (label() != 255), trimap.trimap(label(), width))
    assert not trimap.band(label(), ()).any()


@pytest.mark.parametrize("source", trimap.SOURCES)
def test_no_boundary_no_band(source):
    flat = np.zeros((5, 6), np.uint8)
    assert not trimap.trimap(flat, 40, source).any()
    assert (trimap.band(flat, (1, 40), source) == 2).all()


def test_unknown_source_is_refused():
    with pytest.raises(ValueError, match="trimap_source is 'edge'"):
        trimap.distance(label(), "edge")


def test_all_widths_are_measured_and_a_few_are_shown():
    widths = tuple(get_config().eval.trimap_widths)
    assert widths == tuple(range(1, 41))
    assert trimap.shown(map(str, widths)) == ["1", "2", "3", "5", "10", "20", "40"]
    assert trimap.shown(["4", "7"]) == ["4", "7"]
    assert trimap.shown([6, 7, 8, 9, 11, 12, 13, 14]) == [6, 7, 8, 9, 11, 12, 13, 14]  # none of the usual ones
    # Each band of many is the trimap of its width.
    index = trimap.band(label(), widths)
    for k, width in enumerate(widths):
        np.testing.assert_array_equal((index <= k) & (label() != 255), trimap.trimap(label(), width))
