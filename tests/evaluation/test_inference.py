import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, mean_field
from deeplab_jax.crf.mean_field import _mean_field
from deeplab_jax.evaluation.inference import LOG_FLOOR, Segmenter, network_scores
from tests.evaluation.fakes import PALETTE, ColorNetwork, network_variables, scene

PARAMS = CRFParams(3.0, 20.0, 10.0, 2.0, 2.0)
NAMES = ("sky", "tree", "road", "car")


def segmenter(network=None, bilateral="exact", **options) -> Segmenter:
    network = network or ColorNetwork()
    return Segmenter(network, network_variables(), PARAMS, "after", bilateral, NAMES, PALETTE, **options)


def by_hand(image: np.ndarray, reach: int = 4) -> np.ndarray:
    """Log-probabilities of the color network in NumPy: box mean, every 8th pixel, linear between, softmax."""
    height, width = image.shape[:2]
    tall, wide = (max(1, -(-(n - 1) // 32)) * 32 + 1 for n in (height, width))
    x = np.zeros((tall + 2 * reach, wide + 2 * reach, 3))
    x[reach : reach + height, reach : reach + width] = image.astype(float) - 128
    side = 2 * reach + 1
    rows, columns = range(0, tall, 8), range(0, wide, 8)
    scores = np.array([[x[r : r + side, c : c + side].mean((0, 1)) for c in columns] for r in rows])
    scores = scores @ network_variables()["params"]["weights"]
    along = np.array(
        [[np.interp(np.arange(tall), rows, scores[:, j, c]) for c in range(4)] for j in range(len(columns))]
    )
    full = np.array([[np.interp(np.arange(wide), columns, along[:, c, y]) for c in range(4)] for y in range(tall)])
    full = full.transpose(0, 2, 1)[:height, :width]
    return full - np.log(np.exp(full).sum(-1, keepdims=True))


@pytest.mark.parametrize("size", [(33, 65), (40, 50), (1, 7)])
def test_scores_are_the_networks_at_the_images_own_size(size):
    image = scene(size).image
    (found,) = segmenter().scores([image])
    assert found.shape == (*size, 4) and found.dtype == np.float32
    np.testing.assert_allclose(found, by_hand(image), atol=2e-4)


def test_batching_changes_nothing_and_keeps_the_order():
    images = [scene((40 + i % 3 * 30, 50), i).image for i in range(5)]
    single = segmenter()
    together = segmenter(batch_size=2).scores(images)
    for image, found in zip(images, together, strict=True):
        assert found.shape[:2] == image.shape[:2]
        np.testing.assert_allclose(found, single.scores([image])[0], atol=1e-5)


def test_many_sizes_need_few_programs():
    before = network_scores._cache_size()
    segment = segmenter(ColorNetwork(reach=1), batch_size=2)
    sizes = [(34 + 6 * i, 60 - 2 * i) for i in range(10)]
    segment.scores([scene(size).image for size in sizes])
    assert len(set(sizes)) == 10
    assert network_scores._cache_size() - before == len(segment.programs) == 2


def test_many_sizes_need_one_crf_program():
    segment = segmenter(bilateral="separable")
    before = _mean_field._cache_size()
    for size in [(1, 33), (20, 30), (33, 5), (8, 8)]:
        image = scene(size).image
        q = segment.refine(np.full((*size, 4), np.log(0.25), np.float32), image, 1)
        np.testing.assert_allclose(q, 0.25, atol=1e-6)
    assert _mean_field._cache_size() - before == 1


def test_mirror_of_a_mirrored_image_is_the_mirror():
    image = scene((40, 50)).image
    segment = segmenter(mirror=True)
    found = segment.scores([image])[0]
    turned = segment.scores([image[:, ::-1]])[0][:, ::-1]
    np.testing.assert_allclose(found, turned, atol=1e-5)
    plain = segmenter()
    pair = np.exp(plain.scores([image])[0]) + np.exp(plain.scores([image[:, ::-1]])[0][:, ::-1])
    np.testing.assert_allclose(np.exp(found), pair / 2, atol=1e-5)


def test_scales_average_probabilities():
    image = np.full((65, 97, 3), (200, 30, 90), np.uint8)  # resizing changes nothing, so every scale must agree inside
    several = segmenter(scales=(0.5, 1.0, 1.25)).scores([image])[0]
    single = segmenter().scores([image])[0]
    np.testing.assert_allclose(np.exp(several).sum(-1), 1, atol=1e-5)
    np.testing.assert_allclose(several[24:40, 24:72], single[24:40, 24:72], atol=1e-4)


@pytest.mark.parametrize("size", [(300, 200), (140, 310)])
def test_tiles_equal_the_whole_image(size):
    """A tile has no weight within 10 pixels of its inner borders; this network and the upsampling see 2 + 7 far."""
    image = scene(size).image
    whole = segmenter(ColorNetwork(reach=2)).scores([image])[0]
    tiled = segmenter(ColorNetwork(reach=2), tile=161, batch_size=2)
    found = tiled.scores([image])[0]
    assert len(tiled.programs) == 1
    inside = slice(0, size[0] // 8 * 8 - 8), slice(0, size[1] // 8 * 8 - 8)  # beyond, the paddings differ
    np.testing.assert_allclose(np.exp(found[inside]), np.exp(whole[inside]), atol=1e-5)
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, atol=1e-5)
    assert found.min() >= LOG_FLOOR


# The CRF's tests share two compiled shapes: the padded one and this image's own.
SIZE = (20, 30)


@pytest.fixture(scope="module")
def refined() -> tuple[Segmenter, np.ndarray, np.ndarray, dict[int, np.ndarray]]:
    """A segmenter, an image, its scores, and marginals after 0, 1 and 3 iterations from one pass."""
    image = scene(SIZE).image
    segment = segmenter()
    (scores,) = segment.scores([image])
    return segment, image, scores, dict(zip((0, 3, 1), segment.refine(scores, image, (0, 3, 1)), strict=True))


def test_the_crf_never_sees_the_padding(refined):
    _, image, scores, found = refined
    expected = mean_field(-scores, image, PARAMS, 3, bilateral="exact", normalization="after", return_all=True)
    for n in (0, 1, 3):
        assert found[n].shape == scores.shape
        np.testing.assert_allclose(found[n], expected[n], atol=1e-4)
    assert np.abs(found[3] - found[0]).max() > 0.1


def test_several_iteration_counts_come_from_one_pass(refined):
    segment, image, scores, found = refined
    np.testing.assert_allclose(found[0], np.exp(scores), atol=1e-5)
    np.testing.assert_allclose(found[3], segment.refine(scores, image, 3), atol=1e-4)
    np.testing.assert_allclose(found[3].sum(-1), 1, atol=1e-4)


def test_labels_are_the_most_probable_classes(refined):
    segment, image, _, found = refined
    ((off, one, three),) = segment.labels([image], (0, 1, 3))
    for labels, q in ((off, found[0]), (one, found[1]), (three, found[3])):
        np.testing.assert_array_equal(labels, q.argmax(-1))
        assert labels.dtype == np.uint8


def test_call_gives_labels_marginals_and_entropy(refined):
    segment, image, _, expected = refined
    found = segment(image, iterations=3)
    assert found.class_names == NAMES and found.palette is PALETTE
    np.testing.assert_allclose(found.marginals, expected[3], atol=1e-4)
    np.testing.assert_array_equal(found.labels, found.marginals.argmax(-1))
    q = found.marginals.astype(np.float64)
    np.testing.assert_allclose(found.entropy, -(q * np.log(np.maximum(q, 1e-12))).sum(-1), atol=1e-4)
    assert found.entropy.max() <= np.log(4) + 1e-4


def test_size_multiple_must_fit_the_stride():
    with pytest.raises(ValueError, match="size_multiple=20"):
        segmenter(size_multiple=20)
