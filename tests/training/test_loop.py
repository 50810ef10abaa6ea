"""Stopping on numbers that are not finite, what a workdir says, and the end-to-end CRF's input."""

import json

import numpy as np
import pytest

from deeplab_jax.models import create_model
from deeplab_jax.runs.checkpoints import Checkpoints, load_workdir
from deeplab_jax.runs.record import read_record
from deeplab_jax.training import loop

SHORT = ("num_steps=6", "checkpoint.every=2", "log.every=2", "eval.every=0", "eval.select_split=")


def test_a_run_leaves_its_record(runs, tmp_path):
    config = runs.config(*SHORT)
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
    logits, out = model.apply(variables, np.zeros((1, 33, 33, 3), np.uint8), train=False)
    assert logits.shape == (1, 5, 5, 7)
    np.testing.assert_allclose(np.sum(out["marginals"], -1), 1, atol=1e-5)


def test_what_is_not_finite_stops_training_and_is_named(runs, tmp_path):
    with pytest.raises(loop.NonFiniteError) as e:
        loop.train(runs.config(*SHORT, "optimizer.learning_rate=1e30", "optimizer.warmup_steps=0"), tmp_path)
    sentence = str(e.value)
    assert "was not finite at step" in sentence and "parameters concerned: backbone." in sentence
    for step in Checkpoints(tmp_path).steps():  # whatever was saved before is good
        flat, _ = Checkpoints(tmp_path).restore(step)
        assert all(np.isfinite(v).all() for v in flat.values())


def test_steps_that_are_not_finite_can_be_skipped(runs, tmp_path, capfd):
    overrides = ["optimizer.learning_rate=1e30", "optimizer.warmup_steps=0", "optimizer.skip_nonfinite=true"]
    loop.train(runs.config(*SHORT, *overrides), tmp_path)
    assert "steps were skipped for a non-finite gradient" in capfd.readouterr().err
    flat, _ = Checkpoints(tmp_path).restore(6)
    assert int(flat["skipped"]) >= 1
    assert all(np.isfinite(v).all() for v in flat.values())


def test_another_architecture_in_the_workdir_is_refused(runs, tmp_path):
    from deeplab_jax.errors import UserError

    loop.train(runs.config(*SHORT, "num_steps=2"), tmp_path)
    with pytest.raises(UserError, match="another architecture"):
        loop.train(runs.config(*SHORT, "model.widths=8,8,8,16"), tmp_path)


def test_mistakes_in_the_search_are_told_before_the_training(runs, tmp_path):
    from deeplab_jax.errors import UserError

    with pytest.raises(UserError, match="thin class 'pole': no such class; there are background, ball, "):
        loop.train(runs.config(*SHORT, "crf.search_thin=pole,"), tmp_path / "w")
    with pytest.raises(UserError, match=r"config\.crf\.search_objective=iou: must be among mean_iou, trimap, both"):
        loop.train(runs.config(*SHORT, "crf.search_objective=iou"), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_crf_sees_the_photograph_and_not_the_normalized_input(monkeypatch):
    """The CRF's image inside the model is the untouched RGB 0..255, sampled by its stride."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.config import load_config
    from deeplab_jax.crf import layer
    from deeplab_jax.models import create_model

    config = load_config("shapes", ["model.widths=8,8,8,8", "model.head_width=8", "crf.stride=4"])
    model = create_model(config.model, 3, crf=config.crf)
    photograph = np.random.default_rng(0).integers(0, 256, (1, 33, 33, 3)).astype(np.uint8)
    seen = []
    original = layer.MeanFieldCRF.__call__

    def spy(self, unary, image, *args, **kwargs):
        seen.append(np.asarray(image))
        return original(self, unary, image, *args, **kwargs)

    variables = model.init(jax.random.key(0), jnp.asarray(photograph))
    monkeypatch.setattr(layer.MeanFieldCRF, "__call__", spy)
    model.apply(variables, photograph)
    np.testing.assert_array_equal(seen[-1], photograph[:, ::4, ::4])
