"""Training in an existing workdir: nothing changes before all checks pass, and nothing is lost."""

import json
import os
import shutil
import signal
import types

import filelock
import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_json
from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.record import read_record
from deeplab_jax.training import loop
from deeplab_jax.training.selection import Selection
from deeplab_jax.training.termination import Terminated

SHORT = ("num_steps=4", "log.every=2", "checkpoint.every=2", "eval.every=0", "log.images_every=0")


@pytest.fixture(scope="module")
def trained(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    loop.train(runs.config(*SHORT), workdir)
    return workdir


@pytest.fixture
def workdir(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage(workdir, *steps):
    for step in steps:
        files = [p for p in (workdir / "checkpoints" / str(step)).rglob("*") if p.is_file()]
        largest = max(files, key=lambda p: p.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["model.head_width=16"], "another architecture"),
        (["batch_size=0"], "batch_size"),
        (["crf.bilateral_rgb_std=1e-50"], "must lie between 0.01 and 1e"),
        (["data.gamma=-1"], "config.data.gamma=-1.0: must lie between 0 and 8"),
        (["crf.iterations=1000000000"], "must lie between 0 and 10000"),
    ],
)
def test_a_refused_command_changes_nothing(runs, workdir, overrides, sentence):
    before = contents(workdir)
    with pytest.raises(UserError, match=sentence):
        loop.train(runs.config(*SHORT, *overrides), workdir)
    assert contents(workdir) == before


def test_the_callers_config_is_left_as_it_is(runs, workdir):
    config = runs.config(*SHORT)
    before = config.to_dict()
    loop.train(config, workdir)
    assert config.to_dict() == before


def test_a_second_writer_is_refused_and_the_first_loses_nothing(runs, workdir):
    with filelock.FileLock(str(workdir / ".writer.lock")):  # as another process holds it
        write_json(workdir / ".writer.json", {"host": "node7", "pid": 77})
        before = contents(workdir)
        with pytest.raises(UserError, match="process 77 on host 'node7' is writing there"):
            loop.train(runs.config(*SHORT, "num_steps=6"), workdir)
        assert contents(workdir) == before


def test_without_digests_the_checkpoints_are_used(runs, workdir, capfd):
    shutil.rmtree(workdir / "digests")
    loop.train(runs.config(*SHORT), workdir)
    err = capfd.readouterr().err
    assert "checkpoint 4 has no digests; it can be read completely" in err and "resuming at step 4 of 4" in err
    checkpoints = Checkpoints(workdir, read_only=True)
    assert checkpoints.steps() == [4] and not checkpoints.problem(4)


def test_damage_moves_aside_and_the_one_before_ends_with_the_same_bits(runs, trained, workdir):
    damage(workdir, 4)
    damaged = contents(workdir / "checkpoints" / "4")
    loop.train(runs.config(*SHORT), workdir)
    states = [Checkpoints(w, read_only=True).restore(4)[0] for w in (trained, workdir)]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    assert read_record(workdir / "metrics.jsonl") == read_record(trained / "metrics.jsonl")
    assert contents(workdir / "aside" / "checkpoint_4" / "4") == damaged


@pytest.mark.parametrize("lost", ["both damaged", "folders gone", "all gone but the record"])
def test_a_trained_workdir_never_begins_again_by_itself(runs, workdir, capfd, lost):
    if lost == "both damaged":
        damage(workdir, 2, 4)
    else:
        shutil.rmtree(workdir / "checkpoints")
    if lost == "all gone but the record":
        shutil.rmtree(workdir / "digests")
    before = contents(workdir)
    said = "a record of 4 steps" if "record" in lost else "checkpoint 2 .*checkpoint 4"
    with pytest.raises(UserError, match=f"has been trained, but has no usable checkpoint.*{said}.*with --restart"):
        loop.train(runs.config(*SHORT), workdir)
    assert contents(workdir) == before
    loop.train(runs.config(*SHORT), workdir, restart=True)
    kept = contents(workdir / "aside" / "run_1")
    assert kept == {name: data for name, data in before.items() if name.parts[0] not in ("run.json", ".writer.lock")}
    assert Checkpoints(workdir, read_only=True).steps() == [2, 4]
    assert [row["step"] for row in read_record(workdir / "metrics.jsonl")] == [1, 2, 3, 4]
    assert [entry["step"] for entry in json.loads((workdir / "run.json").read_text())] == [0, 0]


def test_a_best_mark_that_is_damaged_is_said_and_found_again(runs, workdir, capfd):
    (workdir / "best.json").write_text("{}")
    assert Checkpoints(workdir, read_only=True).best_step() is None
    assert "best.json: is damaged: it holds no step" in capfd.readouterr().err
    Checkpoints(workdir).mark_best(4, 0.5)
    assert json.loads((workdir / "best.json").read_text()) == {"step": 4, "mean_iou": 0.5}


def test_ctrl_c_saves_and_the_next_run_ends_with_the_same_bits(runs, trained, tmp_path, monkeypatch, capfd):
    save = Checkpoints.save

    def saved(self, step, *args):
        save(self, step, *args)
        os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(Terminated) as e:
        patch.setattr(Checkpoints, "save", saved)
        loop.train(runs.config(*SHORT), tmp_path / "run")
    assert e.value.code == 130
    err = capfd.readouterr().err
    assert "Ctrl-C: ending after this step" in err
    assert "Ctrl-C: saved step 2 and stopping; the same command continues from there" in err
    loop.train(runs.config(*SHORT), tmp_path / "run")
    states = [Checkpoints(w, read_only=True).restore(4)[0] for w in (trained, tmp_path / "run")]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)


@pytest.mark.parametrize("results", [[], [{"mean_iou": None, "per_class_iou": {}, "images": 2}]])
def test_a_checkpoint_that_cannot_be_measured_is_not_chosen(runs, tmp_path, monkeypatch, capfd, results):
    """Where all images that have labels are left out as corrupt; the training continues."""
    monkeypatch.setattr("deeplab_jax.evaluation.workdir.evaluate_split", lambda *_, **__: results)
    config = runs.config("eval.every=2", "eval.select_split=val")
    state = types.SimpleNamespace(variables=dict)
    Selection(config, tmp_path, Checkpoints(tmp_path), None, {})(2, state)
    assert "step 2: no pixel of 'val' that could be compared has a label" in capfd.readouterr().err
    assert not (tmp_path / "best.json").exists()
