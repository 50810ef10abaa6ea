"""The models that the package ships: packed from a run, found by their name, close to the run in half precision."""

import json

import numpy as np
import pytest

import deeplab_jax
from deeplab_jax.errors import UserError
from deeplab_jax.weights import box, files
from deeplab_jax.weights.initial import load_initial, located, recorded_settings
from experiments.pack_model import pack
from tests.toy_workdir import NAMES, photograph, toy_config, toy_variables

SIZE = (44, 60)
SHIPPED = box.BOX


@pytest.fixture(scope="module")
def shipped(workdir, tmp_path_factory):
    """A box with one model, "street", packed from the toy run."""
    folder = tmp_path_factory.mktemp("box")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(box, "BOX", folder)
        pack(workdir, folder / "street", preset="v2_vgg16")
        yield folder


def test_it_labels_as_the_run_does(shipped, workdir):
    ours = deeplab_jax.load("street")
    run = deeplab_jax.load(workdir, crf="v2_vgg16")
    image = photograph(SIZE)
    found, expected = ours(image), run(image)
    assert found.class_names == NAMES
    np.testing.assert_array_equal(found.palette, expected.palette)
    assert ours.crf.params.bilateral_xy_std == 65  # v2_vgg16's
    assert (found.labels == expected.labels).mean() > 0.99
    np.testing.assert_allclose(found.marginals, expected.marginals, atol=0.05)
    assert ours.identity[0][:2] == ["box", "street"]


def test_kernels_are_in_half_precision_and_the_rest_is_not(shipped):
    arrays, metadata = files._load_safetensors(shipped / "street" / box.WEIGHTS)
    kinds = {(a.ndim == 4, str(a.dtype)) for a in arrays.values()}
    assert kinds == {(True, "float16"), (False, "float32")}
    assert json.loads(metadata["class_names"]) == list(NAMES)


def test_a_model_names_no_folder_of_the_machine_that_trained_it(workdir, tmp_path):
    text = json.loads((workdir / "config.json").read_text())
    assert text["data"]["dir"] == ""
    config = workdir / "config.json"
    before = config.read_text()
    text["data"]["dir"] = "/home/somebody/photographs"
    try:
        config.write_text(json.dumps(text))
        pack(workdir, tmp_path / "model")
    finally:
        config.write_text(before)
    assert not any("/home/" in path.read_text() for path in (tmp_path / "model").glob("*.[jm]*"))


def test_its_name_is_what_training_starts_from(shipped):
    assert located("street") == shipped / "street" / box.WEIGHTS
    config = toy_config()
    assert recorded_settings("street")["preprocessing"] == config.model.preprocessing
    zeros = {k: {n: _zeros(v) for n, v in group.items()} for k, group in toy_variables(config, classes=3).items()}
    variables, report = load_initial("street", config.model, zeros)
    assert all("classifier" in why for why in report.missing.values())  # of 4 classes there, 3 here
    stem = variables["params"]["backbone"]["conv1"]["kernel"]
    np.testing.assert_allclose(stem, toy_variables(config)["params"]["backbone"]["conv1"]["kernel"], atol=1e-3)


def _zeros(tree):
    return {k: _zeros(v) for k, v in tree.items()} if isinstance(tree, dict) else np.zeros_like(tree)


def test_a_wrong_name_gets_the_nearest(shipped):
    sentence = r"--model=stret: no model of this name; the package ships street; did you mean 'street'\?"
    with pytest.raises(UserError, match=sentence):
        box.require("stret")
    with pytest.raises(UserError, match="stret: no such folder; did you mean 'street'"):
        deeplab_jax.load("stret")
    with pytest.raises(UserError, match="stret: no such file; did you mean 'street'"):
        recorded_settings("stret")


def test_a_runs_folder_of_that_name_comes_first(shipped, workdir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert box.folder_of("street") == shipped / "street"
    (tmp_path / "street").mkdir()  # such as the data set
    assert box.folder_of("street") == shipped / "street"
    (tmp_path / "street/config.json").write_text("{}")
    assert box.folder_of("street") is None
    assert box.folder_of(shipped / "street") == shipped / "street"


def test_a_damaged_model_is_a_sentence(shipped, tmp_path):
    for name in (box.WEIGHTS, box.CONFIG, box.PRESET):
        (tmp_path / name).write_bytes((shipped / "street" / name).read_bytes())
    (tmp_path / box.CONFIG).write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        box.read(tmp_path)
    (tmp_path / box.WEIGHTS).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="safetensors"):
        box.read(tmp_path)


def test_without_any_model_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(box, "BOX", tmp_path)
    assert box.table().startswith("this installation ships no model")
    with pytest.raises(UserError, match="ships no model"):
        deeplab_jax.load("street")


def test_what_is_shipped_can_be_read():
    """Each model of the package: complete, small, with a measured card."""
    for weights in SHIPPED.glob(f"*/{box.WEIGHTS}"):
        folder = weights.parent
        boxed = box.read(folder)
        assert len(boxed.class_names) == len(set(boxed.class_names)) > 1
        assert weights.stat().st_size <= box.MOST_BYTES
        card = (folder / box.CARD).read_text()
        assert "Not measured yet" not in card and "## What it is not good for" in card


@pytest.mark.long
def test_200_steps_from_the_shipped_streets_beat_200_from_nothing(tmp_path, monkeypatch):
    """On drawn scenes of other classes: the learned first layers help there too."""
    from deeplab_jax.config import load_config
    from deeplab_jax.evaluation.workdir import evaluate_workdir
    from deeplab_jax.training import loop

    monkeypatch.setattr(box, "BOX", SHIPPED)  # `shipped` stands in its place for the rest of the file
    changes = (
        f"data.cache_dir={tmp_path}/cache", "data.name=shapes", "data.holdout=0", "data.stages=()", "data.crop=97,129",
        "num_steps=200",
        "checkpoint.every=200", "search.images=0", "search.thin=()", "eval.every=0", "eval.select_split=",
        "eval.crf_iterations=0,", "eval.scales=1,", "eval.mirror=false", "eval.limit=20", "eval.overlays=0",
        "log.images_every=0", "optimizer.ema=0",
    )  # fmt: skip
    found = {}
    for start in ("camvid", ""):
        config = load_config("camvid", [*changes, f"init_from={start}"])
        workdir = tmp_path / (start or "nothing")
        loop.train(config, workdir)
        evaluate_workdir(config, workdir)
        found[start] = json.loads((workdir / "eval" / "val.json").read_text())[0]["mean_iou"]
    assert found["camvid"] > found[""] + 0.02, found
