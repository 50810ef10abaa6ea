"""Few padded shapes for photographs of many sizes."""

import numpy as np
import pytest

from deeplab_jax.inference import buckets

STREET = [(375, 500)] * 9 + [(333, 500), (500, 375)]


def grown(sizes, shapes) -> float:
    """The factor by which padding enlarges the photographs."""
    padded = [buckets.smallest_holding(size, shapes) for size in sizes]
    return sum(h * w for h, w in padded) / sum(h * w for h, w in sizes)


def test_few_sizes_keep_their_own_shapes():
    assert buckets.choose(STREET, 32) == [(353, 513), (385, 513), (513, 385)]
    assert buckets.choose([(306, 306)], 32, extra=2) == [(322, 322)]


@pytest.mark.parametrize("seed", range(5))
def test_twenty_mixed_sizes_need_at_most_three_shapes_that_hold_them(seed):
    rng = np.random.default_rng(seed)
    sizes = [tuple(map(int, size)) for size in rng.integers((60, 80), (376, 501), (20, 2))]
    shapes = buckets.choose(sizes, 32)
    assert 1 <= len(shapes) <= 3
    assert all(buckets.smallest_holding(size, shapes) for size in sizes)
    assert all((side - 1) % 128 == 0 for shape in shapes for side in shape)


def test_where_padding_would_cost_more_than_a_program_there_is_one_more():
    large, small = [(1500, 2000)] * 20, [(100, 100 + 30 * n) for n in range(12)]
    shapes = buckets.choose(large + small, 32)
    assert len(shapes) == 2 and shapes[1] == (1537, 2049)
    assert shapes[0][0] == 129 and shapes[0][1] >= 430
    assert grown(large + small, shapes) < 1.2


def test_the_padding_is_bounded():
    rng = np.random.default_rng(3)
    sizes = [tuple(map(int, size)) for size in rng.integers(200, 1800, (60, 2))]
    shapes = buckets.choose(sizes, 32)
    assert len(shapes) <= 6 and grown(sizes, shapes) <= buckets.MOST_GROWTH * 1.2


def test_the_smallest_shape_that_holds_a_photograph():
    shapes = [(129, 129), (129, 513), (513, 513)]
    assert buckets.smallest_holding((100, 300), shapes) == (129, 513)
    assert buckets.smallest_holding((514, 1), shapes) is None
