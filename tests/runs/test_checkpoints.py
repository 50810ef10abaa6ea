"""A checkpoint is complete or does not count."""

import contextlib
import threading
import time

import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.runs import checkpoints as module
from deeplab_jax.runs.checkpoints import Checkpoints, CheckpointWriteError, load_workdir
from deeplab_jax.runs.flat import unflatten_state, variables_from
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


def newest(checkpoints, say=print):
    """(step, flat, meta) of the newest usable checkpoint, or None."""
    step = checkpoints.newest_whole(say)
    return None if step is None else (step, *checkpoints.read(step))


def largest(checkpoints, step):
    folder = checkpoints.workdir / "checkpoints" / str(step)
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_what_is_saved_comes_back(two):
    step, flat, meta = newest(two)
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
    step, flat, _ = newest(Checkpoints(two.workdir), said.append)
    assert step == 1
    assert "checkpoint 2 is damaged" in said[0]
    np.testing.assert_array_equal(flat["step"], 1)


def test_a_checkpoint_without_digests_is_used_if_it_reads_whole(two):
    (two.workdir / "digests" / "2.json").unlink()
    again, said = Checkpoints(two.workdir), []
    assert (again.steps(), again.present()) == ([1], [1, 2])
    assert newest(again, said.append)[0] == 2
    assert len(said) == 1 and "checkpoint 2 has no digests; it can be read completely and is used" in said[0]
    reader = Checkpoints(two.workdir, read_only=True)  # during a training it may be half written: the previous one
    assert newest(reader)[0] == 1
    again.go_on_from(2)
    assert again.steps() == [1, 2] and not again.problem(2)


def test_a_checkpoint_without_digests_that_does_not_read_is_not_used(two):
    (two.workdir / "digests" / "2.json").unlink()
    damage(two, 2)
    largest(two, 2).unlink()
    said = []
    assert newest(Checkpoints(two.workdir), said.append)[0] == 1
    assert "checkpoint 2 is damaged (its digests are missing)" in said[0]


def test_a_step_that_is_done_again_replaces_what_a_kill_left(two):
    (two.workdir / "digests" / "2.json").unlink()
    again = Checkpoints(two.workdir)
    again.save(2, tree(5), {"step": 2})
    assert int(again.restore(2)[0]["step"]) == 5


def test_what_a_kill_left_of_a_deletion_goes(two, monkeypatch):
    """Killed after each of a deletion's parts: the digest's, the folder's move, and half of its files."""
    folder = two.workdir / "checkpoints" / "1"
    (two.workdir / "digests" / "1.json").unlink()
    Checkpoints(two.workdir).go_on_from(2)
    assert not folder.exists() and not list((two.workdir).glob(".deleted"))
    (two.workdir / ".deleted" / "1.abc").mkdir(parents=True)
    (two.workdir / ".deleted" / "1.abc" / "data").write_bytes(b"half")
    (two.workdir / "digests" / ".3.12.34.abcdef.json").write_text("{")
    again = Checkpoints(two.workdir)
    assert not (two.workdir / ".deleted").exists()
    assert again.present() == [2] and [p.name for p in (two.workdir / "digests").iterdir()] == ["2.json"]


def test_a_full_disk_is_said_and_leaves_nothing_half_written(two, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(CheckpointWriteError, match="no space left on device"):
        two.save(3, tree(3), {"step": 3})
    monkeypatch.undo()
    assert newest(Checkpoints(two.workdir))[0] == 2
    assert not (two.workdir / "checkpoints" / "3").exists()


def test_what_threads_still_write_after_a_failure_is_removed_too(tmp_path, monkeypatch):
    """Tensorstore's threads put files into a half-written checkpoint for a while after its exception."""
    checkpoints = Checkpoints(tmp_path, keep=5)
    checkpoints.save(30, tree(30), {"step": 30})
    partial = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    end = time.monotonic() + 0.3

    def write() -> None:
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                partial.mkdir(exist_ok=True)
                (partial / str(time.monotonic())).write_bytes(b"half")

    writer = threading.Thread(target=write)

    def full(*args, **kwargs):
        writer.start()
        while not partial.exists():
            time.sleep(0.001)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._writing, "save", full)
        with pytest.raises(CheckpointWriteError, match="no space left on device"):
            checkpoints.save(3, tree(3), {"step": 3})
    writer.join()
    partial.mkdir(exist_ok=True)  # as if a thread had been later still
    checkpoints.save(31, tree(31), {"step": 31})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["30", "31"]


def test_the_newest_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step, iou in ((1, 0.3), (2, 0.9), (3, 0.5), (4, 0.6), (5, 0.2)):
        checkpoints.save(step, tree(step), {"step": step})
        assert checkpoints.mark_best(step, iou) is (step <= 2)
    assert checkpoints.steps() == [2, 4, 5]
    assert checkpoints.best_step() == 2


def test_another_architecture_is_refused(two):
    _, flat, _ = newest(two)
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
    writing = workdir / "checkpoints" / "11.orbax-checkpoint-tmp-0"  # the one that the trainer is writing
    writing.mkdir()
    (writing / "data").write_bytes(b"half")
    damage(Checkpoints(workdir, read_only=True), 9)
    before = files_of(workdir)
    said = []
    reader = Checkpoints(workdir, read_only=True)
    assert newest(reader, said.append)[0] == 7
    assert len(said) == 1 and "checkpoint 9 is damaged" in said[0]
    assert load_workdir(workdir)[2]["step"] == 7
    assert reader.mark_best(7, 0.5)
    reader.forget_after(0)
    assert files_of(workdir) == before
    writer = Checkpoints(workdir)
    writer.go_on_from(7, said.append)  # a writer moves damaged ones aside
    assert not (workdir / "checkpoints" / "9").exists() and writer.present() == [7]
    assert sorted(p.name for p in (workdir / "aside" / "checkpoint_9").iterdir()) == ["9", "9.json"]
    assert "checkpoint 9 were moved to" in said[-1]


def test_a_reader_makes_no_folders(tmp_path):
    assert newest(Checkpoints(tmp_path / "none", read_only=True)) is None
    assert not (tmp_path / "none").exists()


def test_what_is_passed_over_is_named_on_stderr(tmp_path, capfd):
    workdir = write_toy_workdir(tmp_path / "run", step=7)
    writer = Checkpoints(workdir)
    flat, meta = writer.restore(7)
    writer.save(8, flat, meta)
    writer.mark_best(7, 0.9)
    assert load_workdir(workdir)[2]["step"] == 7
    assert capfd.readouterr() == ("", "")
    damage(writer, 7)
    assert load_workdir(workdir)[2]["step"] == 8
    out, err = capfd.readouterr()
    assert out == ""
    assert "the best checkpoint, 7, is not used (its file" in err
    with pytest.raises(UserError, match=r"checkpoint 7 cannot be used \(its file .*; the steps it has are 7, 8"):
        load_workdir(workdir, 7)
    with pytest.raises(UserError, match=r"checkpoint 6 cannot be used \(it does not exist"):
        load_workdir(workdir, 6)
    (workdir / "digests" / "7.json").unlink()  # gone altogether
    assert load_workdir(workdir)[2]["step"] == 8
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
    assert capfd.readouterr().err.count("best.json: cannot be written (no space left on device)") == 1
    monkeypatch.undo()
    two.save(3, tree(3), {"step": 3})
    assert Checkpoints(two.workdir, read_only=True).best() == {"step": 2, "mean_iou": 0.9}


def test_an_old_checkpoint_that_cannot_be_deleted_stops_nothing(two, monkeypatch, capfd):
    def full(step):
        raise OSError(28, "No space left on device")

    two.keep = 1
    monkeypatch.setattr(two, "_delete", full)
    two.save(3, tree(3), {"step": 3})
    assert newest(Checkpoints(two.workdir))[0] == 3
    assert "could not be deleted (no space left on device)" in capfd.readouterr().err


def test_a_reader_takes_another_where_the_training_deletes_the_chosen_one(tmp_path, monkeypatch):
    workdir = write_toy_workdir(tmp_path / "run", step=7)
    read, deletions = Checkpoints.read, iter([8])
    trainer = Checkpoints(workdir, keep=1)
    flat, meta = trainer.restore(7)

    def meanwhile(self, step):
        for new in deletions:
            trainer.save(new, flat, meta)  # which deletes the chosen one
        return read(self, step)

    monkeypatch.setattr(Checkpoints, "read", meanwhile)
    assert load_workdir(workdir)[2]["step"] == 8

    def broken(self, step):
        raise ValueError("broken")

    monkeypatch.setattr(Checkpoints, "read", broken)
    with pytest.raises(UserError, match=rf"^{workdir}: checkpoint 8 cannot be read \(broken\); run the command again"):
        load_workdir(workdir)
