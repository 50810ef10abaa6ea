"""A run that is stopped at an awkward moment, with a full disk, and with overflowing numbers."""

import json
import os
import shutil
import signal
import threading
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.evaluation import workdir as evaluation
from deeplab_jax.runs import checkpoints, reporting
from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.flat import flatten_state
from deeplab_jax.runs.provenance import read_config
from deeplab_jax.runs.record import read_record
from deeplab_jax.training import loop, setup
from deeplab_jax.training.observation import Pictures
from deeplab_jax.training.step import finite_leaves
from deeplab_jax.training.termination import Terminated

SHORT = ("num_steps=4", "log.every=2", "checkpoint.every=2", "eval.every=2", "log.images_every=0")
OVERFLOW = (
    "eval.every=0",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=1e37",
    "optimizer.classifier_multiplier=1e6",
)


class Kill(BaseException):
    """Simulates SIGKILL: nothing in the program catches it."""


class Evaluations:
    """Replaces evaluation: the given mean IoUs one by one, and a callback in between."""

    def __init__(self, monkeypatch, *ious, meanwhile=lambda: None):
        self.ious, self.meanwhile, self.started, self.ended = list(ious), meanwhile, 0, 0
        monkeypatch.setattr(evaluation, "evaluate_split", self)

    def __call__(self, *args, **kwargs):
        self.started += 1
        self.meanwhile()
        self.ended += 1
        return [{"mean_iou": self.ious.pop(0), "per_class_iou": {}, "images": 2}]


def selected(workdir) -> dict[int, float]:
    return {r["step"]: r["select/mean_iou"] for r in read_record(workdir / "metrics.jsonl") if "select/mean_iou" in r}


def best(workdir) -> dict:
    return json.loads((workdir / "best.json").read_text())


def sigterm():
    assert threading.current_thread() is threading.main_thread()  # elsewhere it would end the test run
    assert callable(signal.getsignal(signal.SIGTERM))
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_kill_between_an_evaluation_and_its_mark_loses_nothing(runs, tmp_path, monkeypatch):
    evaluations = Evaluations(monkeypatch, 0.3, 0.6)
    mark_best = Checkpoints.mark_best

    def deadly(self, step, mean_iou):
        if step == 4:
            raise Kill
        return mark_best(self, step, mean_iou)

    monkeypatch.setattr(Checkpoints, "mark_best", deadly)
    with pytest.raises(Kill):
        loop.train(runs.config(*SHORT), tmp_path)
    assert best(tmp_path) == {"step": 2, "mean_iou": 0.3}
    monkeypatch.setattr(Checkpoints, "mark_best", mark_best)
    loop.train(runs.config(*SHORT), tmp_path)
    assert best(tmp_path) == {"step": 4, "mean_iou": 0.6}
    assert selected(tmp_path) == {2: 0.3, 4: 0.6}
    assert evaluations.ended == 2  # recorded results are not evaluated again


@pytest.mark.long
def test_going_back_before_the_best_finds_the_best_before_it(runs, tmp_path, monkeypatch):
    Evaluations(monkeypatch, 0.5, 0.4, 0.6, 0.6)
    config = runs.config(*SHORT, "num_steps=6")
    loop.train(config, tmp_path)
    assert best(tmp_path) == {"step": 6, "mean_iou": 0.6}
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["2", "4", "6"]
    shutil.rmtree(folder / "6")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_batches", lambda *args, **kwargs: (_ for _ in ()).throw(Kill))
        with pytest.raises(Kill):
            loop.train(config, tmp_path)
    assert best(tmp_path) == {"step": 2, "mean_iou": 0.5}


def test_sigterm_at_a_selection_leaves_the_evaluation_to_the_next_run(runs, tmp_path, monkeypatch, capfd):
    evaluations = Evaluations(monkeypatch, 0.3, 0.2)
    save = Checkpoints.save

    def saved(self, step, *args):
        save(self, step, *args)
        sigterm()

    with monkeypatch.context() as patch, pytest.raises(Terminated) as e:
        patch.setattr(Checkpoints, "save", saved)
        loop.train(runs.config(*SHORT), tmp_path)
    assert e.value.code == 143
    assert "SIGTERM: saved step 2" in capfd.readouterr().err
    assert evaluations.started == 0
    loop.train(runs.config(*SHORT), tmp_path)
    assert selected(tmp_path) == {2: 0.3, 4: 0.2}
    assert best(tmp_path)["step"] == 2


def test_sigterm_ends_an_evaluation_that_is_under_way(runs, tmp_path, monkeypatch):
    evaluations = Evaluations(monkeypatch, 0.3, meanwhile=lambda: (sigterm(), time.sleep(300)))
    start = time.monotonic()
    with pytest.raises(Terminated):
        loop.train(runs.config(*SHORT), tmp_path)
    assert time.monotonic() - start < 200
    assert (evaluations.started, evaluations.ended) == (1, 0)
    assert Checkpoints(tmp_path).steps() == [2]


def test_a_full_disk_does_not_stop_training(runs, tmp_path, monkeypatch, capfd):
    """It is full while steps 2 to 4 write: this affects a checkpoint, rows, a picture and the best mark."""
    Evaluations(monkeypatch, 0.9, 0.6, 0.4)
    monkeypatch.setattr(Pictures, "_picture", lambda self, state: np.zeros((4, 6, 3), np.uint8))
    append, write_json, save = reporting.append, checkpoints.write_json, PIL.Image.Image.save

    def full(function, when):
        def wrapped(*args, **kwargs):
            if when(*args):
                raise OSError(28, "No space left on device")
            return function(*args, **kwargs)

        return wrapped

    def last_step(path, size, data):
        return json.loads(data.splitlines()[-1])["step"]

    best_tries = []

    def refused(path, value):
        if path.name == "best.json":
            best_tries.append(value)
            return len(best_tries) == 1
        return path.name == "2.json"

    monkeypatch.setattr(reporting, "append", full(append, lambda *args: last_step(*args) in (3, 4)))
    monkeypatch.setattr(checkpoints, "write_json", full(write_json, refused))
    monkeypatch.setattr(PIL.Image.Image, "save", full(save, lambda image, path, *args: "00000004" in str(path)))
    loop.train(runs.config(*SHORT, "num_steps=6", "log.images_every=2"), tmp_path)
    err = capfd.readouterr().err
    assert "training continues, the newest checkpoint is that of step 0" in err
    assert err.count("metrics are kept in memory, training continues") == 1
    assert err.count("best.json: cannot be written") == 1
    assert Checkpoints(tmp_path).steps() == [4, 6]
    assert not list(tmp_path.rglob(".*.*.*"))
    steps = [r["step"] for r in read_record(tmp_path / "metrics.jsonl") if "train/loss" in r]
    assert steps == [1, 2, 3, 4, 5, 6]
    assert selected(tmp_path) == {2: 0.9, 4: 0.6, 6: 0.4}
    assert best(tmp_path) == {"step": 4, "mean_iou": 0.6}  # step 2 has no checkpoint to select
    assert [p.name for p in sorted((tmp_path / "pictures").iterdir())] == ["00000002_train.png", "00000006_train.png"]


def test_updates_that_overflow_are_never_saved(runs, tmp_path):
    """The first step's gradient is finite, and its update is not."""
    with pytest.raises(loop.NonFiniteError, match=r"at step 1 \(checked: 1 to 1\); affected parameters: head\."):
        loop.train(runs.config(*SHORT, *OVERFLOW, "checkpoint.every=1"), tmp_path)
    assert Checkpoints(tmp_path).steps() == []


def test_updates_that_overflow_can_be_skipped(runs, tmp_path, capfd):
    loop.train(runs.config(*SHORT, *OVERFLOW, "optimizer.skip_nonfinite=true", "optimizer.ema=0.9"), tmp_path)
    flat, _ = Checkpoints(tmp_path).restore(4)
    assert int(flat["skipped"]) == 4
    assert "steps were skipped for a non-finite gradient" in capfd.readouterr().err
    assert all(np.isfinite(v).all() for v in flat.values())
    assert any(name.startswith("ema.") for name in flat)


def test_all_state_is_looked_at():
    bad, good = jnp.array([1.0, jnp.inf]), jnp.ones(2)
    gradient = {"a": {"bias": good, "kernel": good}, "b": {"kernel": good}}
    updated = {"a": {"bias": good, "kernel": bad}, "b": {"kernel": good}}
    assert finite_leaves(gradient, gradient, {}).tolist() == [True, True, True]
    assert finite_leaves(gradient, updated, {}).tolist() == [True, False, True]
    assert finite_leaves(gradient | {"b": {"kernel": bad}}, updated, {}).tolist() == [True, False, False]
    assert finite_leaves(gradient, gradient, {"bn": {"mean": bad}}).tolist() == [False, False, False]


@pytest.mark.parametrize(("fingerprint", "said"), [("same", 0), ("another", 1)])
def test_other_data_on_resume_are_said(tmp_path, capfd, fingerprint, said):
    state = {"step": np.int32(2)}
    writer = Checkpoints(tmp_path)
    writer.save(2, flatten_state(state), {"data_fingerprint": "same"})
    done, _ = setup.resume(tmp_path, {"step": np.int32(0)}, SimpleNamespace(fingerprint=fingerprint), 4)
    assert done == 2
    err = capfd.readouterr().err
    assert err.count("the data differ from those of the run so far (fingerprint another, before: same)") == said


def test_a_finished_run_with_other_data_is_an_error(tmp_path):
    state = {"step": np.int32(4)}
    Checkpoints(tmp_path).save(4, flatten_state(state), {"data_fingerprint": "same"})
    assert setup.resume(tmp_path, state, SimpleNamespace(fingerprint="same"), 4)[0] == 4
    with pytest.raises(UserError, match=r"nothing would be trained: give another --workdir .* --mode eval"):
        setup.resume(tmp_path, state, SimpleNamespace(fingerprint="another"), 4)


def test_a_run_keeps_its_preprocessing(runs, tmp_path, capfd):
    """A shipped config may get another one; weights are wrong with it."""
    config = runs.config(*SHORT, "eval.every=0")
    other = {"torch_rgb": "own_rgb", "own_rgb": "torch_rgb"}[config.model.preprocessing]
    loop.train(config, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    capfd.readouterr()
    loop.train(runs.config(*SHORT, "eval.every=0", f"model.preprocessing={other}"), tmp_path / "run")
    said = f"config.model.preprocessing = {config.model.preprocessing}, as recorded with {tmp_path / 'run'}"
    assert said in capfd.readouterr().err
    assert read_config(tmp_path / "run").model.preprocessing == config.model.preprocessing
    assert Checkpoints(tmp_path / "run").steps()[-1] == 4
    kept = setup.settings_so_far(tmp_path / "run")
    assert kept["preprocessing"] == config.model.preprocessing
    (tmp_path / "run" / "config.json").write_text("{")
    assert setup.settings_so_far(tmp_path / "run") == kept  # the checkpoint knows
    assert setup.settings_so_far(tmp_path / "none") == {}


def test_resume_from_a_moved_data_folder(runs, tmp_path, capfd):
    rng = np.random.default_rng(0)
    data = tmp_path / "here"
    for i in range(8):
        label = np.kron(rng.integers(0, 7, (4, 4)), np.ones((10, 12))).astype(np.uint8)
        for kind, array in (("images", label[..., None] * 25 + rng.integers(0, 60, (40, 48, 3))), ("masks", label)):
            (data / kind).mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(array.astype(np.uint8)).save(data / kind / f"{i}.png")
    # As many classes as `shapes` has: the programs are those of the other tests.
    (data / "classes.txt").write_text("ground\nhill\nsky\ntree\nlake\nroad\nhouse\n")

    def train(folder, workdir):
        where = [f"data.images={folder}/images", f"data.masks={folder}/masks", f"data.classes={folder}/classes.txt"]
        cache = f"data.cache_dir={tmp_path}/cache-{folder.name}"
        loop.train(runs.config(*SHORT, "eval.every=0", "data.name=folder", cache, *where), workdir)

    train(data, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "4")
    data.rename(tmp_path / "there")
    capfd.readouterr()
    train(tmp_path / "there", tmp_path / "moved")
    err = capfd.readouterr().err
    assert "resuming at step 2" in err and "the data differ" not in err
    states = [Checkpoints(tmp_path / name).restore(4)[0] for name in ("whole", "moved")]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    records = [read_record(tmp_path / name / "metrics.jsonl") for name in ("whole", "moved")]
    assert records[0] == records[1]
