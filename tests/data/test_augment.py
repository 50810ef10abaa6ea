import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.data.augment import (
    EVEN_DEVIATION,
    EVEN_MEAN,
    MEAN_COLOR,
    Augmentation,
    augment,
    blur,
    even_light,
    jitter,
    relight,
    resize_label_window,
    resize_window,
    scaled_size,
)
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.mirror import checked_swaps
from deeplab_jax.models.deeplab import OWN_DEVIATION, OWN_MEAN, preprocess


def _slow_resize(image, size):
    """Bilinear with aligned corners, from the definition."""
    h, w = image.shape[:2]
    out = np.zeros((*size, 3))
    for y in range(size[0]):
        for x in range(size[1]):
            sy = y * (h - 1) / (size[0] - 1) if size[0] > 1 else 0
            sx = x * (w - 1) / (size[1] - 1) if size[1] > 1 else 0
            y0, x0 = int(sy), int(sx)
            y1, x1 = min(y0 + 1, h - 1), min(x0 + 1, w - 1)
            a, b = sy - y0, sx - x0
            top = image[y0, x0] * (1 - b) + image[y0, x1] * b
            bottom = image[y1, x0] * (1 - b) + image[y1, x1] * b
            out[y, x] = top * (1 - a) + bottom * a
    return out


def _random(h, w, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (h, w, 3), np.uint8), rng.integers(0, 5, (h, w), np.uint8)


def test_scaled_size_follows_caffe():
    # Shrinking by s gives (n - 1) / s + 1, zooming by z gives n + (n - 1) (z - 1).
    assert scaled_size(321, 0.5) == 161
    assert scaled_size(321, 0.75) == 241
    assert scaled_size(321, 1.25) == 401
    assert scaled_size(321, 1.5) == 481
    assert scaled_size(1, 0.5) == 1


def test_golden_values_of_the_resize():
    image = np.repeat(np.array([[0, 100, 200], [100, 200, 40]], np.uint8)[..., None], 3, axis=2)
    out = resize_window(image, (3, 5), (0, 0, 3, 5))[..., 0]
    np.testing.assert_array_equal(out, [[0, 50, 100, 150, 200], [50, 100, 150, 135, 120], [100, 150, 200, 120, 40]])


@pytest.mark.parametrize("size", [(9, 14), (40, 33), (17, 23), (1, 5)])
def test_resize_is_bilinear_with_aligned_corners(size):
    image, _ = _random(17, 23)
    expected = _slow_resize(image, size)
    out = resize_window(image, size, (0, 0, *size))
    assert np.abs(out - expected).max() <= 0.501


def test_half_is_every_second_pixel():
    image, label = _random(33, 49)
    np.testing.assert_array_equal(resize_window(image, (17, 25), (0, 0, 17, 25)), image[::2, ::2])
    np.testing.assert_array_equal(resize_label_window(label, (17, 25), (0, 0, 17, 25)), label[::2, ::2])


def test_a_window_is_cut_from_the_whole():
    image, label = _random(37, 41)
    size, window = (55, 62), (11, 7, 30, 44)
    part = (slice(11, 41), slice(7, 51))
    np.testing.assert_array_equal(resize_window(image, size, window), resize_window(image, size, (0, 0, *size))[part])
    whole = resize_label_window(label, size, (0, 0, *size))
    np.testing.assert_array_equal(resize_label_window(label, size, window), whole[part])


def test_labels_never_blend():
    label = np.where(np.random.default_rng(0).random((40, 50)) < 0.5, 255, 2).astype(np.uint8)
    for scale in (0.5, 0.61, 1.37):
        size = scaled_size(40, scale), scaled_size(50, scale)
        assert set(np.unique(resize_label_window(label, size, (0, 0, *size)))) <= {2, 255}


def test_padding_is_mean_color_void_and_invalid():
    image, label = _random(20, 24)
    out, out_label, valid = augment(image, label, Augmentation(crop=(33, 41)), np.random.default_rng(0))
    np.testing.assert_array_equal(out[:20, :24], image)
    np.testing.assert_array_equal(out_label[:20, :24], label)
    assert valid[:20, :24].all() and valid.sum() == 20 * 24
    assert (out[~valid] == MEAN_COLOR).all() and (out_label[~valid] == 255).all()


def test_crops_cover_all_positions_and_mirror_half_of_the_time():
    image = np.zeros((6, 8, 3), np.uint8)
    image[..., 0], image[..., 1] = np.arange(6)[:, None], np.arange(8)
    label = image[..., 0]
    spec = Augmentation(crop=(4, 5), mirror=True)
    seen, mirrored = set(), 0
    for i in range(400):
        out, out_label, valid = augment(image, label, spec, np.random.default_rng(i))
        np.testing.assert_array_equal(out[..., 0], out_label)
        flipped = out[0, 0, 1] > out[0, 1, 1]
        mirrored += flipped
        seen.add((int(out[0, 0, 0]), int(out[0, -1 if flipped else 0, 1])))
        assert valid.all()
    assert seen == {(y, x) for y in range(3) for x in range(4)}
    assert 150 < mirrored < 250


def test_discrete_scales_are_drawn_equally():
    image, label = _random(21, 21)
    scales = (0.5, 1.0, 1.5)
    spec = Augmentation(crop=(41, 41), scales=scales)
    sizes = [int(augment(image, label, spec, np.random.default_rng(i))[2][:, 0].sum()) for i in range(300)]
    assert {s: sizes.count(s) > 70 for s in set(sizes)} == {11: True, 21: True, 31: True}


def test_mirror_swaps_left_and_right():
    image = np.zeros((4, 4, 3), np.uint8)
    label = np.array([[1, 2, 3, 255]] * 4, np.uint8)
    spec = Augmentation(crop=(4, 4), mirror=True, mirror_swaps=((1, 2),))
    rows = {tuple(augment(image, label, spec, np.random.default_rng(i))[1][0].tolist()) for i in range(20)}
    assert rows == {(1, 2, 3, 255), (255, 3, 1, 2)}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((0, 1), "must be pairs of class ids, as in ((3,4),(5,6))"),
        (("01",), "must be pairs of class ids"),
        (((0, 1.0),), "must be pairs of class ids"),
        (((0, 1, 2),), "must be pairs of class ids"),
        (((0, 3),), "must name classes between 0 and 2"),
        (((-1, 0),), "must name classes between 0 and 2"),
        (((0, 1), (1, 2)), "names class 1 more than once; give each class one partner"),
        (((2, 2),), "names class 2 more than once"),
    ],
)
def test_swaps_that_are_no_pairs_of_classes_are_named(given, sentence):
    with pytest.raises(UserError, match=re.escape(f"config.data.mirror_swaps={given}: {sentence}")):
        checked_swaps(given, num_classes=3)


def test_jitter():
    image, _ = _random(10, 12)
    np.testing.assert_array_equal(jitter(image, 1.0, 1.0, 1.0), image)
    np.testing.assert_array_equal(jitter(np.full((2, 2, 3), 100, np.uint8), 1.2, 1.0, 1.0), 120)
    gray = jitter(image, 1.0, 1.0, 0.0)
    assert np.ptp(gray.astype(int), axis=2).max() == 0
    flat = jitter(image, 1.0, 0.0, 1.0)
    assert np.ptp(flat) == 0
    expected = (image @ np.array([0.299, 0.587, 0.114])).mean()
    assert abs(int(flat[0, 0, 0]) - expected) <= 1


def test_relight_is_a_power_and_a_gain():
    image, _ = _random(10, 12)
    np.testing.assert_array_equal(relight(image, 1.0, (1.0, 1.0, 1.0)), image)
    out = relight(np.full((2, 3, 3), 64, np.uint8), 0.5, (1.0, 0.5, 3.0))
    # 255 (64 / 255) ** 0.5 = 127.75; half of it 63.87; three times as much is clipped.
    np.testing.assert_array_equal(out[0, 0], [128, 64, 255])
    assert out.shape == (2, 3, 3)


def test_blur_keeps_the_mean_and_spreads_a_point_by_its_std():
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    np.testing.assert_array_equal(blur(image, 0.0), image)
    line = np.full((41, 41, 3), 0, np.uint8)
    line[:, 20] = 255
    across = blur(line, 2.0)[20, :, 0].astype(float)
    offsets = np.arange(41) - 20
    assert abs(across.sum() - 255) <= 5
    assert abs(np.sqrt((across * offsets**2).sum() / across.sum()) - 2.0) <= 0.15


def test_other_light_leaves_labels_and_the_other_draws_alone():
    image, label = _random(60, 80)
    plain = Augmentation(crop=(33, 41), scales=(0.5, 1.5), continuous_scale=True, mirror=True, brightness=0.2)
    lit = dataclasses.replace(plain, gamma=1.0, color_cast=0.3, blur=1.0)
    changed = 0
    for i in range(20):
        first, first_label, _ = augment(image, label, plain, np.random.default_rng(i))
        second, second_label, valid = augment(image, label, lit, np.random.default_rng(i))
        np.testing.assert_array_equal(first_label, second_label)
        assert (second[~valid] == MEAN_COLOR).all()
        changed += (first != second).mean() > 0.5
    assert changed >= 19


@pytest.mark.parametrize("light, offset", [(0.2, 10), (0.5, 120)])
def test_light_is_evened_alike_in_training_and_in_testing(light, offset):
    """What the network sees of a training example without random choices, and of the photograph in testing."""
    image, label = _random(60, 80)
    image = (image * light + offset).astype(np.uint8)
    spec = Augmentation(crop=(60, 80), even=True)
    even, _, valid = augment(image, label, spec, np.random.default_rng(0))
    assert valid.all()
    assert abs(even.mean() - EVEN_MEAN) < 1 and abs(even.std() - EVEN_DEVIATION) < 1
    assert (EVEN_MEAN, EVEN_DEVIATION) == (OWN_MEAN, OWN_DEVIATION)
    training = preprocess(even[None], "own_rgb", light=jnp.array([[OWN_MEAN, OWN_DEVIATION]]))[0]
    testing = preprocess(image[None], "own_rgb")[0]
    np.testing.assert_allclose(training, testing, atol=0.6 / OWN_DEVIATION)


def test_a_crop_is_evened_by_the_whole_photograph():
    image = np.full((40, 60, 3), 20, np.uint8)
    image[:, 30:] = 60
    image[::2] += 4
    whole = even_light(image)[image]
    window = resize_window(image, (40, 60), (5, 31, 20, 20))
    np.testing.assert_array_equal(even_light(image)[window], whole[5:25, 31:51])
    assert (whole[:, 30:] > EVEN_MEAN).all() and (whole[:, :30] < EVEN_MEAN).all()
    assert (even_light(np.full((9, 9, 3), 80, np.uint8))[80] == 115).all()
