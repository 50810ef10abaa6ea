"""A checkpoint is whole or does not count."""

import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.runs import checkpoints as module
from deeplab_jax.runs.checkpoints import (
    Checkpoints,
    CheckpointWriteError,
    load_workdir,
    unflatten_state,
    variables_from,
)
from tests.toy_workdir import write_toy_workdir


def tree(value: float) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    return {"trainable.head.fc1.kernel": noise + value, "step": np.int32(value)}


@pytest.fixture
def two(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, tree(step), {"step": step})
    return checkpoints


def largest(checkpoints, step):
    folder = checkpoints.workdir / "checkpoints" / str(step)
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_what_is_saved_comes_back(two):
    step, flat, meta = two.restore_newest()
    assert (step, meta["step"]) == (2, 2)
    np.testing.assert_array_equal(flat["trainable.head.fc1.kernel"], tree(2)["trainable.head.fc1.kernel"])


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete file", "delete folder"])
def test_damage_is_noticed_and_the_one_before_used(two, damage):
    path = largest(two, 2)
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "delete file":
        path.unlink()
    else:
        import shutil

        shutil.rmtree(two.workdir / "checkpoints" / "2")
    said = []
    step, flat, _ = Checkpoints(two.workdir).restore_newest(said.append)
    assert step == 1
    assert "checkpoint 2 is damaged" in said[0]
    np.testing.assert_array_equal(flat["step"], 1)


def test_uncommitted_checkpoints_do_not_count(two):
    (two.workdir / "digests" / "2.json").unlink()
    again = Checkpoints(two.workdir)
    assert again.steps() == [1]
    again.save(2, tree(5), {"step": 2})  # and are replaced
    assert int(again.restore(2)[0]["step"]) == 5


def test_a_full_disk_is_said_and_leaves_nothing_half_written(two, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(CheckpointWriteError, match="No space left on device"):
        two.save(3, tree(3), {"step": 3})
    monkeypatch.undo()
    assert Checkpoints(two.workdir).restore_newest()[0] == 2
    assert not (two.workdir / "checkpoints" / "3").exists()


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, iou in ((1, 0.3), (2, 0.9), (3, 0.5), (4, 0.6), (5, 0.2)):
        checkpoints.save(step, tree(step), {"step": step})
        assert checkpoints.mark_best(step, iou) is (step <= 2)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


def test_another_architecture_is_refused(two):
    _, flat, _ = two.restore_newest()
    template = {"trainable": {"head": {"fc1": {"kernel": np.zeros((3, 64))}}}, "step": np.int32(0)}
    with pytest.raises(UserError, match=r"'trainable\.head\.fc1\.kernel' is \(64, 64\) there and \(3, 64\)"):
        unflatten_state(template, flat)
    with pytest.raises(UserError, match=r"lacks 'trainable\.backbone"):
        unflatten_state({"trainable": {"backbone": np.zeros(1)}, "step": np.int32(0)}, flat)


def test_variables_prefer_averages():
    flat = {
        "trainable.head.fc1.kernel": 1,
        "ema.trainable.head.fc1.kernel": 2,
        "frozen.backbone.bn.scale": 3,
        "batch_stats.backbone.bn.mean": 4,
        "ema.batch_stats.backbone.bn.mean": 5,
    }
    assert variables_from(flat) == {
        "params": {"head": {"fc1": {"kernel": 2}}, "backbone": {"bn": {"scale": 3}}},
        "batch_stats": {"backbone": {"bn": {"mean": 5}}},
    }


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def damage(checkpoints, step):
    path = largest(checkpoints, step)
    path.write_bytes(path.read_bytes()[:-1])


def test_a_reader_beside_a_training_changes_nothing(tmp_path):
    workdir = write_toy_workdir(tmp_path / "run", step=7)
    Checkpoints(workdir).save(9, tree(9), {"step": 9})
    writing = workdir / "checkpoints" / "11.orbax-checkpoint-tmp-0"  # what the trainer has under its pen
    writing.mkdir()
    (writing / "data").write_bytes(b"half")
    damage(Checkpoints(workdir, read_only=True), 9)
    before = files_of(workdir)
    said = []
    reader = Checkpoints(workdir, read_only=True)
    assert reader.restore_newest(said.append)[0] == 7
    assert len(said) == 1 and "checkpoint 9 is damaged" in said[0]
    assert load_workdir(workdir)[3]["step"] == 7
    assert reader.mark_best(7, 0.5)
    reader.forget_after(0)
    assert files_of(workdir) == before
    assert Checkpoints(workdir).restore_newest(said.append)[0] == 7  # a writer removes what is damaged
    assert not (workdir / "checkpoints" / "9").exists()


def test_a_reader_makes_no_folders(tmp_path):
    assert Checkpoints(tmp_path / "none", read_only=True).restore_newest() is None
    assert not (tmp_path / "none").exists()


def test_what_is_passed_over_is_named_on_stderr(tmp_path, capfd):
    workdir = write_toy_workdir(tmp_path / "run", step=7)
    writer = Checkpoints(workdir)
    flat, meta = writer.restore(7)
    writer.save(8, flat, meta)
    writer.mark_best(7, 0.9)
    assert load_workdir(workdir)[3]["step"] == 7
    assert capfd.readouterr() == ("", "")
    damage(writer, 7)
    assert load_workdir(workdir)[3]["step"] == 8
    out, err = capfd.readouterr()
    assert out == ""
    assert "the best checkpoint, 7, is not used (its file" in err
    with pytest.raises(UserError, match=r"checkpoint 7 cannot be used \(its file .*; it has those of steps 7, 8"):
        load_workdir(workdir, 7)
    with pytest.raises(UserError, match=r"checkpoint 6 cannot be used \(its digests are missing"):
        load_workdir(workdir, 6)
    (workdir / "digests" / "7.json").unlink()  # gone altogether
    assert load_workdir(workdir)[3]["step"] == 8
    assert "the best checkpoint, 7, is not used (its digests are missing" in capfd.readouterr().err


def test_a_mark_that_the_disk_does_not_take_counts_and_is_written_later(two, monkeypatch, capfd):
    two.mark_best(1, 0.3)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    assert two.mark_best(2, 0.8)
    assert not two.mark_best(1, 0.5)
    assert two.best_step() == 2
    assert two.mark_best(2, 0.9)
    assert Checkpoints(two.workdir, read_only=True).best() == {"step": 1, "mean_iou": 0.3}
    assert capfd.readouterr().err.count("best.json: cannot be written (No space left on device)") == 1
    monkeypatch.undo()
    two.save(3, tree(3), {"step": 3})
    assert Checkpoints(two.workdir, read_only=True).best() == {"step": 2, "mean_iou": 0.9}
