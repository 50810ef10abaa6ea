"""The files that a run leaves, mistakes that are refused before it, and the end-to-end CRF's input."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.models import create_model
from deeplab_jax.runs.checkpoints import Checkpoints, load_workdir
from deeplab_jax.runs.record import read_record
from deeplab_jax.training import loop, setup
from tests.training.conftest import END_TO_END

SHORT = ("num_steps=6", "checkpoint.every=2", "log.every=2", "eval.every=0", "eval.select_split=")


def test_a_run_leaves_its_record(runs, tmp_path):
    config = runs.config(*SHORT, END_TO_END)
    loop.train(config, tmp_path)
    assert Checkpoints(tmp_path).steps() == [4, 6]
    rows = [r for r in read_record(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    assert {"train/loss_scores", "train/loss_crf", "train/gradient_norm", "train/learning_rate"} <= set(rows[0])
    assert rows[0]["train/learning_rate"] == pytest.approx(0.05 / 20)  # the first of 20 warmup steps
    run = json.loads((tmp_path / "run.json").read_text())[-1]
    assert run["packages"]["jax"] and run["devices"] and run["data_fingerprint"]

    read, variables, meta = load_workdir(tmp_path)
    model = create_model(read.model, meta["num_classes"], crf=read.crf)
    assert read.to_dict() == config.to_dict()
    assert (meta["step"], meta["num_classes"], len(meta["class_names"])) == (6, 7, 7)
    logits, out = jax.jit(model.apply)(variables, np.zeros((1, 33, 33, 3), np.uint8))
    assert logits.shape == (1, 5, 5, 7)
    np.testing.assert_allclose(np.sum(out["marginals"], -1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["search.thin=pole,"], "thin class 'pole': no such class; there are background, ball, "),
        (["search.objective=iou"], "config.search.objective=iou: must be one of mean_iou, trimap, both"),
        (["crf.preset=", "crf.bilateral_weight=1,2"], "bilateral_weight has a number for each of 2 classes, but"),
        (["data.mirror_swaps=((0,9),)"], "config.data.mirror_swaps=((0, 9),): must name classes between 0 and 6"),
        (["data.mirror_swaps=((0,1),(1,2))"], "names class 1 more than once; give each class one partner"),
        (["data.mirror_swaps=(0,1)"], "must be pairs of class ids, as in ((3,4),(5,6))"),
        (["loss.class_weights=foo"], "config.loss.class_weights=foo: must be sqrt, fourth_root, median, or one number"),
        (["loss.class_weights=1,2"], "config.loss.class_weights: has 2 numbers for 7 classes"),
        (["loss.class_weights=1,2,a,1,1,1,1"], "config.loss.class_weights=1,2,a,1,1,1,1: must be sqrt, fourth_root, "),
        (["eval.every=2", "eval.select_split=vall"], "no split 'vall'"),
    ],
)
def test_mistakes_are_told_before_the_training(runs, tmp_path, overrides, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        loop.train(runs.config(*SHORT, *overrides), tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], []),
        (["eval.every=6"], ["note: config.eval.every=6 has no effect without config.eval.select_split, which names "]),
        (["eval.every=6", "eval.select_split=val"], []),
        (["search.images=2"], ["warning: the CRF's parameters are searched on the evaluation split 'val', so that "]),
        (["search.images=2", "data.holdout=5"], []),
        (["search.images=2", "crf.iterations=0"], []),  # nothing is searched
    ],
)
def test_what_may_surprise_is_said_before_the_training(runs, tmp_path, capfd, overrides, said):
    setup.prepare(runs.config(*SHORT, *overrides), tmp_path / "w")
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("note: ", "warning: "))]
    assert len(lines) == len(said) and all(line.startswith(start) for line, start in zip(lines, said))


def test_the_crf_sees_the_photograph_and_not_the_normalized_input(monkeypatch):
    """The CRF's image inside the model is the untouched RGB 0..255, sampled by its stride."""
    from deeplab_jax.config import load_config
    from deeplab_jax.crf import layer
    from deeplab_jax.models import create_model

    config = load_config(
        "shapes", ["model.widths=8,8,8,8", "model.head_width=8", "crf.train=end_to_end", "crf.stride=4"]
    )
    model = create_model(config.model, 3, crf=config.crf)
    photograph = np.random.default_rng(0).integers(0, 256, (1, 33, 33, 3)).astype(np.uint8)
    seen = []
    original = layer.MeanFieldCRF.__call__

    def spy(self, unary, image, *args, **kwargs):
        seen.append(image)
        return original(self, unary, image, *args, **kwargs)

    def images_of_the_crf(variables, photograph):
        model.apply(variables, photograph)
        return seen.pop()

    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(photograph))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    monkeypatch.setattr(layer.MeanFieldCRF, "__call__", spy)
    image = jax.jit(images_of_the_crf)(variables, photograph)
    np.testing.assert_array_equal(image, photograph[:, ::4, ::4])
