from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.crf import CRFParams, Setting, mean_field
from deeplab_jax.crf.mean_field import _mean_field
from deeplab_jax.errors import UserError
from deeplab_jax.inference import tiling
from deeplab_jax.inference.from_config import create_segmenter
from deeplab_jax.inference.segment import Segment
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.inference.views import LOG_FLOOR, network_scores
from deeplab_jax.models import create_model
from deeplab_jax.models.summary import describe
from tests.evaluation.fakes import PALETTE, ColorNetwork, config, network_variables, scene
from tests.models import thin

PARAMS = CRFParams(3.0, 20.0, 10.0, 2.0, 2.0)
NAMES = ("sky", "tree", "road", "car")


def segmenter(network=None, bilateral="exact", **options) -> Segmenter:
    network = network or ColorNetwork()
    return Segmenter(network, network_variables(), Setting(PARAMS, bilateral=bilateral), NAMES, PALETTE, **options)


def stretched(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W, C] resized to `size`, linear between, corners kept."""
    for axis, length in enumerate(size):
        at = np.linspace(0, array.shape[axis] - 1, length)
        array = np.apply_along_axis(lambda line, at=at: np.interp(at, np.arange(len(line)), line), axis, array)
    return array


def by_hand(image: np.ndarray, reach: int = 4, scale: float = 1.0) -> np.ndarray:
    """Log-probabilities of the color network in NumPy: box mean, every 8th pixel, linear between, softmax.

    At another scale the whole image is resized first; its sides must then need no padding.
    """
    height, width = image.shape[:2]
    tall, wide = (max(1, -(-(n - 1) // 32)) * 32 + 1 for n in (height, width))
    canvas = np.zeros((tall, wide, 3))
    canvas[:height, :width] = image.astype(float) - 128
    if scale != 1:
        assert (tall, wide) == (height, width)
        canvas = stretched(canvas, tuple(round((n - 1) * scale) + 1 for n in (tall, wide)))
    x = np.pad(canvas, [(reach, reach), (reach, reach), (0, 0)])
    side = 2 * reach + 1
    rows, columns = range(0, canvas.shape[0], 8), range(0, canvas.shape[1], 8)
    scores = np.array([[x[r : r + side, c : c + side].mean((0, 1)) for c in columns] for r in rows])
    full = stretched(scores @ network_variables()["params"]["weights"], (tall, wide))[:height, :width]
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


def test_planned_sizes_share_few_shapes_and_their_inside_stays_the_same():
    """Away from the padding, whose amount differs, and with the CRF's filter by the shape that is compiled."""
    network = ColorNetwork(reach=1)
    sizes = [(34 + 6 * i, 60 - 2 * i) for i in range(10)]
    planned = segmenter(network, "auto")
    planned.plan(sizes)
    images = [scene(size).image for size in sizes]
    found = planned.scores(images)
    assert {kind[:4] for kind in planned.programs} == {("network", 1, 65, 65), ("network", 1, 97, 65)}
    alone = segmenter(network)
    for image, scores in zip(images[::5], found[::5]):
        inside = slice(0, image.shape[0] // 8 * 8 - 8), slice(0, image.shape[1] // 8 * 8 - 8)
        np.testing.assert_allclose(scores[inside], alone.scores([image])[0][inside], atol=1e-5)
    assert planned.padded_shape((130, 40)) == (161, 65)  # larger than planned
    assert planned.filter_used((34, 60)) == planned.filter_used((100, 100))
    planned.plan([])
    assert planned.padded_shape((34, 60)) == (65, 65)


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


def test_each_scale_sees_the_whole_image_and_the_mean_is_of_probabilities():
    image = scene((65, 97)).image
    image[20:40, 30:70] = 255 - image[20:40, 30:70]  # edges inside, not the scene's smooth colors alone
    views = [by_hand(image, scale=s) for s in (0.5, 1.0, 1.5)]
    assert np.abs(np.exp(views[0]) - np.exp(views[1])).max() > 0.05  # the scales disagree
    (found,) = segmenter(scales=(0.5, 1.0, 1.5)).scores([image])
    np.testing.assert_allclose(np.exp(found), np.mean(np.exp(views), axis=0), atol=5e-4)


@dataclass(frozen=True)
class SideNetwork:
    """Class 1 on the left of any image, class 2 on the right, like a person's arms."""

    def apply(self, variables, images, train=False, valid=None):
        columns = (images.shape[2] - 1) // 8 + 1
        side = jnp.linspace(4.0, -4.0, columns)
        scores = jnp.stack([0 * side, side, -side, 0 * side], axis=-1)
        return jnp.broadcast_to(scores, (images.shape[0], (images.shape[1] - 1) // 8 + 1, columns, 4)), {}


def test_padding_has_the_border_s_color_in_every_view():
    """Left black, right white: where the mirrored image ends, resizing to a scale must not blend white into black."""
    seen = []

    class Spy:
        def apply(self, variables, images, train=False, valid=None):
            seen.append((images, valid))
            return images[:, ::8, ::8], {}

    width, padded = 22, np.zeros((33, 33, 3), np.uint8)
    padded[:, 10:] = 255
    sizes = jnp.asarray([[33, width]], jnp.int32)
    network_scores.__wrapped__(Spy(), {}, jnp.asarray(padded)[None], sizes, scales=(0.75,), mirror=True)
    ((images, valid),) = seen
    plain, mirrored = (np.asarray(images)[n, 0, np.asarray(valid)[n, 0], 0] for n in (0, 1))
    assert plain[0] == 0 and plain[-1] == 255 and mirrored[0] == 255 and mirrored[-1] == 0


def test_left_and_right_trade_places_in_the_mirrored_view():
    image = np.zeros((33, 65, 3), np.uint8)
    plain = segmenter(SideNetwork()).scores([image])[0]
    assert plain[16, 4].argmax() == 1 and plain[16, 60].argmax() == 2
    swapped = segmenter(SideNetwork(), mirror=True, mirror_swaps=((1, 2),)).scores([image])[0]
    np.testing.assert_allclose(np.exp(swapped), np.exp(plain), atol=1e-5)
    blurred = segmenter(SideNetwork(), mirror=True).scores([image])[0]
    np.testing.assert_allclose(np.exp(blurred[..., 1]), np.exp(blurred[..., 2]), atol=1e-5)  # prevented by swapping


def test_the_config_says_which_classes_are_left_and_right():
    settings = config(mirror=True)
    settings.data.mirror_swaps = [[1, 2]]  # as JSON gives it back
    assert create_segmenter(settings, {"params": {}}, NAMES, PALETTE).mirror_swaps == ((1, 2),)
    for wrong, sentence in ((((1, 4),), "must name classes between 0 and 3"), ((1, 2), "must be pairs of class ids")):
        settings.data.mirror_swaps = wrong
        with pytest.raises(UserError, match=rf"config.data.mirror_swaps=.*{sentence}"):
            create_segmenter(settings, {"params": {}}, NAMES, PALETTE)
    settings.eval.mirror = False  # then nothing is swapped, and the run can be used
    assert create_segmenter(settings, {"params": {}}, NAMES, PALETTE).mirror_swaps == ()
    with pytest.raises(UserError, match=r"config.data.mirror_swaps="):
        create_segmenter(settings, {"params": {}}, NAMES, PALETTE, mirror=True)


@pytest.mark.parametrize("preprocessing", ["torch_rgb", "own_rgb"])
def test_tiles_of_a_real_network_equal_the_whole_image_away_from_their_borders(preprocessing):
    settings = load_config("camvid", ("model.output_stride=8", f"model.preprocessing={preprocessing}"))
    settings.model.update(widths=(4, 4, 6, 6), blocks=(1, 1, 1, 1), head_width=4, head_rates=(1, 2), fine_branch=4)
    model = create_model(settings.model, 4)
    weights = thin.variables(model)
    # A pixel depends on half the receptive field, plus the factor by which scores are enlarged.
    reach = describe(settings, 4)["receptive_field"] // 2 + 8
    height, width, side = 97, 1121, 641  # no padding anywhere: all are 32 k + 1, and two tiles fill the width
    options = {"size_extra": model.architecture.size_extra}
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    image[:, :400] //= 3  # a tile's own light is not the photograph's
    one, cut = (
        Segmenter(model, weights, Setting(PARAMS, bilateral="exact"), NAMES, PALETTE, tile=tile, **options)
        for tile in (0, side)
    )
    whole, tiled = (np.exp(s.scores([image])[0]) for s in (one, cut))
    assert {kind[:4] for kind in cut.programs} == {("network", 1, height, side)}
    spans = tiling.spans(width, side, tiling.default_overlap(side))
    same = np.ones(width, bool)
    for span in spans:  # a tile agrees where it contains everything that a pixel depends on, or has no weight
        inside = np.zeros(width, bool)
        inside[0 if span.start == 0 else span.start + reach : width if span.stop == width else span.stop - reach] = True
        weight = np.zeros(width)
        weight[span.start : span.stop] = tiling.blend_weights(span, width, tiling.default_overlap(side))
        same &= inside | (weight == 0)
    assert len(spans) == 2 and width // 2 < same.sum() < width
    assert whole.std(axis=(0, 1)).min() > 1e-3  # the scores have structure
    np.testing.assert_allclose(tiled[:, same], whole[:, same], atol=1e-5 if preprocessing == "torch_rgb" else 1e-4)


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


@pytest.mark.long
def test_tiles_of_a_cityscapes_image_equal_the_whole_image():
    """2048 x 1024 in the tiles of the shipped config, seams and the places where four meet included."""
    image = scene((1024, 2048)).image
    tile = load_config("cityscapes_aspp_l").eval.tile
    whole = segmenter(ColorNetwork(reach=2)).scores([image])[0]
    tiled = segmenter(ColorNetwork(reach=2), tile=tile, batch_size=3)
    found = tiled.scores([image])[0]
    assert {kind[:4] for kind in tiled.programs} == {("network", 3, tile, tile)}
    assert [len(tiling.spans(n, tile, tiling.default_overlap(tile))) for n in (1024, 2048)] == [3, 5]
    inside = slice(8, -8), slice(8, -8)
    assert np.exp(whole[inside]).std(axis=(0, 1)).min() > 0.01  # the scores have structure
    np.testing.assert_allclose(np.exp(found[inside]), np.exp(whole[inside]), atol=1e-5)


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
    found = Segment(segment)(image, iterations=3)
    assert found.class_names == NAMES and found.palette is PALETTE
    np.testing.assert_allclose(found.marginals, expected[3], atol=1e-4)
    np.testing.assert_array_equal(found.labels, found.marginals.argmax(-1))
    q = found.marginals.astype(np.float64)
    np.testing.assert_allclose(found.entropy, -(q * np.log(np.maximum(q, 1e-12))).sum(-1), atol=1e-4)
    assert found.entropy.max() <= np.log(4) + 1e-4


def test_size_multiple_must_fit_the_stride():
    with pytest.raises(ValueError, match="size_multiple=20"):
        segmenter(size_multiple=20)


@pytest.mark.parametrize("views", [{"scales": (1.0,), "mirror": False}, {"scales": (0.75, 1.0), "mirror": True}])
def test_nan_of_a_network_reaches_the_scores_and_is_refused_when_a_segmenter_is_made(views):
    broken = {"params": {"weights": np.array(network_variables()["params"]["weights"]).copy()}}
    broken["params"]["weights"][0, 1] = np.nan
    images, sizes = jnp.asarray(scene((17, 17)).image)[None], jnp.array([[17, 17]])
    assert np.isnan(network_scores(ColorNetwork(), broken, images, sizes, **views)[0]).all()
    with pytest.raises(UserError, match="the network's 'params/weights' holds values that are not finite"):
        create_segmenter(load_config("camvid"), broken, NAMES, PALETTE)


@pytest.mark.parametrize("iterations", [0, 2])
def test_scores_that_are_not_finite_are_an_error(monkeypatch, iterations):
    """Otherwise every pixel would be class 0."""
    one, image = segmenter(), scene((20, 30)).image
    broken = np.full((*one.padded_shape((20, 30)), len(NAMES)), -1.0, np.float32)
    broken[3, 4, 1] = np.nan
    monkeypatch.setattr(one, "_padded_scores", lambda images, device, light: [jnp.asarray(broken)])
    with pytest.raises(UserError, match=r"the marginals are not finite|unary holds NaN"):
        one.labels([image], (iterations,))
    with pytest.raises(UserError, match=r"the marginals are not finite|unary holds NaN"):
        one.refine(one.scores([image])[0], image, iterations)
