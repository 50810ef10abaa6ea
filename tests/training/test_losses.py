"""Losses against loops over positions; void changes nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.data.class_weights import class_weights_from_counts
from deeplab_jax.training import losses


def test_labels_of_321_by_8_are_every_eighth():
    labels = np.random.default_rng(0).integers(0, 256, (2, 321, 321)).astype(np.uint8)
    np.testing.assert_array_equal(losses.subsample_labels(labels, (41, 41)), labels[:, ::8, ::8])
    np.testing.assert_array_equal(losses.subsample_labels(labels, (21, 21)), labels[:, ::16, ::16])


def test_sizes_without_a_stride_are_refused():
    with pytest.raises(ValueError, match="320 x 321 to scores of 41 x 41"):
        losses.subsample_labels(np.zeros((1, 320, 321), np.uint8), (41, 41))


def test_cross_entropy_is_the_loop():
    rng = np.random.default_rng(0)
    log_probs = np.array(jax.nn.log_softmax(rng.normal(size=(2, 3, 4, 5)).astype(np.float32)))
    labels = rng.integers(0, 5, (2, 3, 4)).astype(np.uint8)
    labels[0, :, 0] = 255
    weights = np.array([1.0, 0.5, 2.0, 0.0, 3.0], np.float32)
    expected = sum(
        -weights[labels[i]] * log_probs[(*i, labels[i])] for i in np.ndindex(labels.shape) if labels[i] != 255
    )
    assert float(losses.cross_entropy_sum(log_probs, labels, weights)) == pytest.approx(expected, rel=1e-5)
    assert float(losses.valid_count(labels)) == 21


def test_void_alone_gives_zero_and_no_gradient():
    labels = np.full((1, 4, 4), 255, np.uint8)
    loss, gradient = jax.value_and_grad(lambda x: losses.cross_entropy_sum(jax.nn.log_softmax(x), labels))(
        jnp.ones((1, 4, 4, 3))
    )
    assert float(loss) == 0.0
    assert not np.any(gradient)


def test_four_losses_of_the_multi_scale_network():
    logits = jnp.zeros((1, 41, 41, 3))
    out = {"scales": (logits, logits, jnp.zeros((1, 21, 21, 3)))}
    maps = losses.named_score_maps(logits, out)
    assert list(maps) == ["fused", "scale_0", "scale_1", "scale_2"]
    labels = np.zeros((1, 321, 321), np.uint8)
    sums = losses.loss_sums(maps, labels, "scores")
    per_position = np.log(3.0)
    assert float(sums["fused"]) == pytest.approx(41 * 41 * per_position, rel=1e-5)
    assert float(sums["scale_2"]) == pytest.approx(21 * 21 * per_position, rel=1e-5)


def test_loss_at_pixels_uses_every_label():
    log_probs = jax.nn.log_softmax(jnp.zeros((1, 5, 5, 4)))
    sums = losses.loss_sums({"scores": log_probs}, np.zeros((1, 33, 33), np.uint8), "pixels")
    assert float(sums["scores"]) == pytest.approx(33 * 33 * np.log(4.0), rel=1e-5)


def test_class_weights_have_mean_one_over_pixels():
    counts = [900, 90, 10, 0]
    for rule in ("sqrt", "fourth_root", "median"):
        weights = class_weights_from_counts(counts, rule)
        assert sum(w * c for w, c in zip(weights, counts)) / 1000 == pytest.approx(1.0)
        assert weights[3] == 0.0
    assert weights[0] / weights[1] == pytest.approx(0.1)


@pytest.mark.parametrize("size", [(41, 41), (31, 21)])
def test_half_pixel_labels_are_the_nearest_of_pillow(size):
    from PIL import Image

    label = np.random.default_rng(0).integers(0, 256, (321, 321)).astype(np.uint8)
    wanted = np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(losses.subsample_labels(label[None], size, "half_pixel")[0], wanted)
    # the CRF's map has the positions of the image sampled at its stride, in both conventions
    np.testing.assert_array_equal(
        losses.labels_for("crf", label[None], (41, 41), "scores", "half_pixel")[0], label[::8, ::8]
    )


def test_class_weights_can_spare_the_loss_after_the_crf():
    scores = jax.nn.log_softmax(jnp.arange(3.0) * jnp.ones((1, 1, 2, 3)))
    maps, labels, weights = {"scores": scores, "crf": scores}, np.array([[[0, 2]]], np.uint8), jnp.array([4.0, 1, 1])
    plain = -float(scores[0, 0, 0, 0] + scores[0, 0, 1, 2])
    heavy = -float(4 * scores[0, 0, 0, 0] + scores[0, 0, 1, 2])
    for both, after_crf in ((True, heavy), (False, plain)):
        sums = losses.loss_sums(maps, labels, "scores", weights, both)
        assert float(sums["scores"]) == pytest.approx(heavy) and float(sums["crf"]) == pytest.approx(after_crf)


@pytest.mark.parametrize(("pixels", "stride"), [(322, 8), (300, 8), (321, 8), (128, 4), (127, 4), (66, 16)])
@pytest.mark.parametrize("up", [False, True])
def test_scores_of_any_crop_stand_at_their_own_pixels(pixels, stride, up):
    """A ramp of scores gives each pixel its own place, up to the last position; beyond it the last is repeated."""
    count = (-(-(pixels - 1) // stride) if up else (pixels - 1) // stride) + 1
    ramp = (jnp.arange(count) * float(stride))[None, :, None, None]
    got = np.asarray(losses.at_pixels(ramp, (pixels, 1)))[0, :, 0, 0]
    assert got.shape == (pixels,)
    if (pixels - 1) % stride < 2:  # v1's base pools: the corners coincide
        np.testing.assert_allclose(got, np.linspace(0, float(ramp[0, -1, 0, 0]), pixels), rtol=1e-5)
    else:
        np.testing.assert_allclose(got, np.minimum(np.arange(pixels), (count - 1) * stride), rtol=1e-5)
