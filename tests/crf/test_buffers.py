"""Where points are in the plain call's buffers."""

import numpy as np

from deeplab_jax.crf import buffers


def test_rows_have_gaps_of_zeros_between_them():
    points = buffers.Points(rows=3, width=4, gap=2)
    assert (points.pitch, points.count) == (6, 18)
    values = np.arange(1, 25, dtype=np.float32).reshape(12, 2)
    out = buffers.padded(values, points)
    assert out.shape == (points.room, 2)
    np.testing.assert_array_equal(points.within(out).reshape(12, 2), values)
    row = out[6:12]  # the second
    np.testing.assert_array_equal(row, [*values[4:8], [0, 0], [0, 0]])
    assert out.sum() == values.sum()


def test_points_without_a_grid_are_one_row():
    points = buffers.Points(1, 5)
    out = buffers.padded(np.arange(5), points)
    np.testing.assert_array_equal(out[:6], [0, 1, 2, 3, 4, 0])
    buffers.put(np.full(5, 7), out, points)
    np.testing.assert_array_equal(out[:6], [7, 7, 7, 7, 7, 0])
