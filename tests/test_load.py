"""`deeplab_jax.load`: a network and its CRF as a function of one photograph."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.crf import CRFParams, Preset
from deeplab_jax.crf.setting import write_preset
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.inference.load import load_weights
from deeplab_jax.runs.checkpoints import load_workdir
from tests.toy_workdir import NAMES, photograph, toy_config, write_weights

SIZE = (24, 30)


def test_load_gives_labels_marginals_entropy_names_palette(segment):
    r = segment(photograph(SIZE))
    assert r.labels.shape == SIZE and r.labels.dtype == np.uint8
    assert r.marginals.shape == (*SIZE, 4) and r.entropy.shape == SIZE
    np.testing.assert_allclose(r.marginals.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(r.labels, r.marginals.argmax(-1))
    np.testing.assert_allclose(r.entropy, -(r.marginals * np.log(np.maximum(r.marginals, 1e-12))).sum(-1), atol=1e-5)
    assert r.class_names == NAMES and (r.palette == voc_palette()).all()


def test_iterations_matter_and_default_to_the_models(segment):
    image = photograph(SIZE)
    off, default, four = (segment(image, n).labels for n in (0, None, 4))
    np.testing.assert_array_equal(default, four)
    assert (off != four).mean() > 0.01


def test_a_preset_or_preset_file_replaces_the_models(workdir, tmp_path):
    loaded = deeplab_jax.load(workdir, crf="v1_largefov", crf_iterations=3)
    assert loaded.crf.params.bilateral_xy_std == 121 and loaded.crf_iterations == 3
    write_preset(tmp_path / "mine.json", Preset(CRFParams(1.0, 20.0, 7.0, 2.0, 1.5), 6, "symmetric", "by hand"))
    loaded = deeplab_jax.load(workdir, crf=tmp_path / "mine.json")
    assert loaded.crf.params.bilateral_rgb_std == 7 and loaded.crf_iterations == 6
    assert loaded.crf.normalization == "symmetric"
    with pytest.raises(UserError, match="neither a \\.json file"):
        deeplab_jax.load(workdir, crf="nonsense")


def test_the_parameters_that_the_run_searched_for_are_the_models(workdir, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    write_preset(copy / "crf_preset.json", Preset(CRFParams(1.0, 20.0, 7.0, 2.0, 1.5), 6, "after", "searched"))
    assert deeplab_jax.load(copy).crf.params.bilateral_rgb_std != 7  # a search that the config does not ask for
    config = json.loads((copy / "config.json").read_text())
    config["search"]["images"] = 2
    (copy / "config.json").write_text(json.dumps(config))
    loaded = deeplab_jax.load(copy)
    assert loaded.crf.params.bilateral_rgb_std == 7 and loaded.crf_iterations == 6
    assert deeplab_jax.load(copy, crf="v1_largefov").crf.params.bilateral_xy_std == 121


def test_searched_parameters_replace_those_learned_end_to_end(workdir, tmp_path, monkeypatch):
    config, variables, meta = load_workdir(workdir)
    learned = {"bilateral_weight": np.float32(2), "compatibility": 3 - 3 * np.eye(4, dtype=np.float32)}
    variables["params"]["crf"] = learned
    config.search.images = 2
    monkeypatch.setattr("deeplab_jax.runs.checkpoints.load_workdir", lambda path, step: (config, variables, meta))
    copy = shutil.copytree(workdir, tmp_path / "run")
    before = deeplab_jax.load(copy)
    assert before.crf.params.bilateral_weight == 2 and before.segmenter.compatibility[0, 1] == 3
    write_preset(copy / "crf_preset.json", Preset(CRFParams(5.0, 20.0, 7.0, 2.0, 1.5), 6, "after", "searched"))
    after = deeplab_jax.load(copy)
    assert after.crf.params.bilateral_weight == 5 and after.segmenter.compatibility is None


def test_a_limit_on_size_is_load_s_own(workdir, tmp_path):
    Image.fromarray(photograph((40, 50))).save(tmp_path / "a.png")
    assert deeplab_jax.load(workdir, refuse_above=2000)(tmp_path / "a.png").labels.shape == (40, 50)
    for name, most in (("refuse_above", 1999), ("max_pixels", 900)):  # Pillow itself refuses twice its limit
        with pytest.raises(UserError, match="the limit of"):
            deeplab_jax.load(workdir, **{name: most})(tmp_path / "a.png")


@pytest.mark.parametrize("iterations", [-1, 10**9, True, 2.5])
def test_iterations_without_end_are_refused_before_anything_is_read(tmp_path, iterations):
    with pytest.raises(UserError, match=f"crf_iterations={iterations} must be"):
        deeplab_jax.load(tmp_path / "none", crf_iterations=iterations)


def test_load_of_nothing_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        deeplab_jax.load(tmp_path / "none")
    with pytest.raises(UserError, match="neither a training workdir nor an exported artifact"):
        deeplab_jax.load(tmp_path, batch_size=2)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8)]
)
def test_arrays_that_are_no_photograph(segment, array):
    with pytest.raises(UserError, match="uint8"):
        segment(array)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"batch_size": 0}, "batch_size=0: must be a whole number, at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: must be a whole number"),
        ({"size_multiple": 12}, "size_multiple=12: must be a multiple of 8"),
        ({"tile": -5}, "tile=-5: must be a whole number, at least 0"),
        ({"scales": ()}, r"scales=\(\): must be one or more numbers from 0.05 to 16"),
        ({"scales": 1.0}, "scales=1.0: must be one or more numbers"),
        ({"scales": (0.0,)}, r"scales=\(0.0,\): must be one or more numbers"),
        ({"mirror": "yes"}, "mirror=yes: must be True or False"),
        ({"resize": "bad"}, "resize=bad: must be one of corners, half_pixel"),
        ({"cut_above": 0}, "cut_above=0: must be a whole number, at least 1"),
        ({"cut_above": "x"}, "cut_above=x: must be a whole number"),
        ({"refuse_above": -1}, "refuse_above=-1: must be a whole number, at least 0"),
        ({"compatibility": np.eye(3)}, r"compatibility: must be \(4, 4\) finite numbers, and has shape \(3, 3\)"),
        ({"mirror_swaps": ((1, 99),)}, r"^mirror_swaps=\(\(1, 99\),\): must name classes between 0 and 3"),
        ({"mirror_swaps": "x"}, "^mirror_swaps=x: must be pairs of class ids"),
        ({"devices": "cpu"}, "devices=cpu: must be a list of devices"),
        ({"batchsize": 2}, "batchsize=2: there is no such option; did you mean 'batch_size'"),
        ({"nonsense": 2}, "nonsense=2: there is no such option; there are compatibility, scales, mirror"),
    ],
)
def test_options_that_cannot_be_used_are_named(workdir, options, sentence):
    with pytest.raises(UserError, match=sentence):
        deeplab_jax.load(workdir, **options)


def test_a_compatibility_is_used_with_any_setting(workdir, segment):
    image, penalties = photograph(SIZE), 5 * (1 - np.eye(4))
    for options in ({}, {"crf": "v2_vgg16"}):
        given, potts = (deeplab_jax.load(workdir, **options, **more) for more in ({"compatibility": penalties}, {}))
        assert (given(image).marginals != potts(image).marginals).any()
        np.testing.assert_array_equal(given(image, 0).marginals, potts(image, 0).marginals)


def test_refining_takes_any_whole_number(segment):
    steps, image = segment.segmenter, photograph(SIZE)
    (scores,) = steps.scores([image])
    np.testing.assert_array_equal(steps.refine(scores, image, np.int64(2)), steps.refine(scores, image, 2))
    assert steps.refine(scores, image, ()) == []


def test_in_pieces_is_like_whole(workdir, segment):
    image = photograph((120, 200), 4)
    pieces = deeplab_jax.load(workdir, cut_above=8_000)
    assert segment.pieces(image.shape) == 1 and pieces.pieces(image.shape) > 2
    assert deeplab_jax.load(workdir, tile_above=8_000).pieces(image.shape) == pieces.pieces(image.shape)
    whole, cut = segment(image), pieces(image)
    assert cut.marginals.dtype == np.float16
    assert (whole.labels != cut.labels).mean() <= 0.005
    ((labels, none),) = pieces.many([image])
    assert none is None and (labels != cut.labels).mean() < 0.001


def test_pieces_of_a_photograph_have_its_light():
    """The shipped network brings each photograph to one mean: its dark pieces must stay darker than the others."""
    street = Path(deeplab_jax.__file__).parent / "box" / "street.jpg"
    image = np.asarray(Image.open(street).convert("RGB").resize((480, 768)))
    options = {"crf_iterations": 0, "scales": (1.0,), "mirror": False}
    whole, pieces = (deeplab_jax.load("camvid", cut_above=above, **options) for above in (480 * 768, 480 * 400))
    assert (whole.pieces(image.shape), pieces.pieces(image.shape)) == (1, 2)
    assert (whole(image).labels != pieces(image).labels).mean() <= 0.005  # 0.056 if each piece has its own
    ((labels, _),) = pieces.many([image])
    assert (labels != pieces(image).labels).mean() < 0.001


def test_converted_weights_are_the_same_network(segment, tmp_path):
    write_weights(tmp_path)
    loaded = load_weights(toy_config(), tmp_path / "w.safetensors")
    image = photograph(SIZE)
    np.testing.assert_array_equal(loaded(image).labels, segment(image).labels)
    assert loaded.class_names == ("class 0", "class 1", "class 2", "class 3")
