import numpy as np
import pytest

from deeplab_jax.metrics import confusion


def slow_mean_iou(truths, predictions, num_classes):
    """Straight from the definition, pixel sets instead of a matrix."""
    values = []
    for c in range(num_classes):
        intersection = union = 0
        for t, p in zip(truths, predictions, strict=True):
            valid = t != 255
            intersection += np.sum((t == c) & (p == c) & valid)
            union += np.sum(((t == c) | (p == c)) & valid)
        if union:
            values.append(intersection / union)
    return sum(values) / len(values)


def labels(seed=0, size=(40, 50), num_classes=6):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, num_classes - 1, size).astype(np.uint8)
    truth[rng.random(size) < 0.1] = 255
    prediction = np.where(rng.random(size) < 0.6, truth, rng.integers(0, num_classes - 1, size)).astype(np.uint8)
    prediction[prediction == 255] = 0
    return truth, prediction


def test_counts_by_hand():
    truth = np.array([[0, 0, 1], [1, 255, 2]], np.uint8)
    prediction = np.array([[0, 1, 1], [1, 0, 0]], np.uint8)
    (matrix,) = confusion.confusion_matrix(truth, prediction, 4)
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(confusion.class_iou(matrix), [1 / 3, 2 / 3, 0, np.nan])
    assert confusion.mean_iou(matrix) == pytest.approx(1 / 3)  # the class that occurs nowhere does not count
    assert confusion.pixel_accuracy(matrix) == pytest.approx(3 / 5)
    assert confusion.mean_accuracy(matrix) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert confusion.frequency_weighted_iou(matrix) == pytest.approx((2 / 3 + 2 * 2 / 3 + 0) / 5)


def test_equals_slow_mean_iou_over_a_set():
    pairs = [labels(seed, (20 + seed, 31)) for seed in range(4)]
    total = sum(confusion.confusion_matrix(t, p, 6)[0] for t, p in pairs)
    expected = slow_mean_iou(*zip(*pairs, strict=True), 6)
    assert confusion.mean_iou(total) == pytest.approx(expected, abs=1e-12)


@pytest.fixture
def real(test_data):
    """True labels of CamVid, predictions that are often wrong, and the matrix over both."""
    from PIL import Image

    truths = [np.asarray(Image.open(p)) for p in sorted((test_data / "camvid" / "valannot").iterdir())[:2]]
    truths = [np.where(t == 11, 255, t).astype(np.uint8) for t in truths]
    predictions = [np.where(t == 255, 3, np.roll(t, 7, axis=1)).astype(np.uint8) for t in truths]
    predictions = [np.where(p == 255, 0, p).astype(np.uint8) for p in predictions]
    total = sum(confusion.confusion_matrix(t, p, 11)[0] for t, p in zip(truths, predictions, strict=True))
    return truths, predictions, total


def test_equals_slow_mean_iou_on_real_labels(real):
    truths, predictions, total = real
    assert confusion.mean_iou(total) == pytest.approx(slow_mean_iou(truths, predictions, 11), abs=1e-12)


def test_equals_scikit_learn_on_real_labels(real):
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    truths, predictions, total = real
    t = np.concatenate([x.ravel() for x in truths])
    p = np.concatenate([x.ravel() for x in predictions])[t != 255]
    t = t[t != 255]
    expected = metrics.jaccard_score(t, p, labels=range(11), average=None, zero_division=0)
    np.testing.assert_allclose(np.nan_to_num(confusion.class_iou(total)), expected, atol=1e-12)
    np.testing.assert_array_equal(total, metrics.confusion_matrix(t, p, labels=range(11)))


def test_groups_sum_to_the_whole():
    truth, prediction = labels()
    group = np.random.default_rng(3).integers(0, 3, truth.shape)
    grouped = confusion.confusion_matrix(truth, prediction, 6, group, 3)
    assert grouped.shape == (3, 6, 6) and grouped.dtype == np.int64
    np.testing.assert_array_equal(grouped.sum(0), confusion.confusion_matrix(truth, prediction, 6)[0])
    only = np.where(group == 1, truth, 255)
    np.testing.assert_array_equal(grouped[1], confusion.confusion_matrix(only, prediction, 6)[0])


def test_nothing_valid_is_nan_not_an_error():
    (matrix,) = confusion.confusion_matrix(np.full((3, 3), 255, np.uint8), np.zeros((3, 3), np.uint8), 2)
    assert np.isnan(confusion.mean_iou(matrix)) and np.isnan(confusion.pixel_accuracy(matrix))
    assert np.isnan(confusion.mean_accuracy(matrix)) and np.isnan(confusion.frequency_weighted_iou(matrix))


def test_refuses_ids_outside_the_classes():
    with pytest.raises(ValueError, match="class id 7, but there are 6"):
        confusion.confusion_matrix(np.full((2, 2), 7, np.uint8), np.zeros((2, 2), np.uint8), 6)
    with pytest.raises(ValueError, match=r"must be equal"):
        confusion.confusion_matrix(np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8), 6)


def test_ids_outside_the_matrix_are_refused():
    zeros = np.zeros((2, 2), np.uint8)
    for arguments, sentence in (
        ((np.full((2, 2), -1), zeros, 2), "the label holds class id -1, but there are 2 classes"),
        ((zeros, zeros, 2, np.full((2, 2), 3), 2), r"the group holds an id outside 0\.\.1"),
        ((zeros, zeros, 2, np.full((2, 2), -1), 2), r"the group holds an id outside 0\.\.1"),
        ((zeros, zeros, 2, np.zeros(3, int), 2), r"truth is \(2, 2\) and the group is \(3,\)"),
        ((zeros, np.full((2, 2), 0.9), 2), "the prediction must consist of integers, not float64"),
    ):
        with pytest.raises(ValueError, match=sentence):
            confusion.confusion_matrix(*arguments)
