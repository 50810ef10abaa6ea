"""One writer per workdir, known by host and process, and gone with its process."""

import errno
import os
import signal
import socket
import subprocess
import sys

import filelock
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_json
from deeplab_jax.runs.lock import check_can_write, writing

HOLD = """
import sys, filelock
lock = filelock.FileLock(sys.argv[1] + "/.writer.lock")
lock.acquire()
print("held", flush=True)
sys.stdin.read()
"""


def test_the_second_writer_is_told_who_has_it_and_changes_nothing(tmp_path):
    with filelock.FileLock(str(tmp_path / ".writer.lock")):  # another descriptor, as another process has
        write_json(tmp_path / ".writer.json", {"host": "node7", "pid": 4321})
        before = sorted(tmp_path.iterdir())
        with (
            pytest.raises(UserError, match=r"process 4321 on host 'node7' is writing there; wait until it ends"),
            writing(tmp_path),
        ):
            raise AssertionError("not reached")
        assert sorted(tmp_path.iterdir()) == before
    with writing(tmp_path):
        assert (tmp_path / ".writer.json").is_file()
    assert not (tmp_path / ".writer.json").exists()


@pytest.mark.parametrize("holder", ["", "null", "[]", '{"host": 1}', "{"])
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path, holder):
    with filelock.FileLock(str(tmp_path / ".writer.lock")):
        (tmp_path / ".writer.json").write_text(holder)
        with pytest.raises(UserError, match="another process is writing there"), writing(tmp_path):
            raise AssertionError("not reached")


def test_a_process_may_ask_again_and_names_itself(tmp_path):
    import json

    with writing(tmp_path):
        with writing(tmp_path):
            pass
        held = json.loads((tmp_path / ".writer.json").read_text())
        assert held == {"host": socket.gethostname(), "pid": os.getpid()}
        other = filelock.FileLock(str(tmp_path / ".writer.lock"))
        with pytest.raises(filelock.Timeout):
            other.acquire(timeout=0)
    other.acquire(timeout=0)
    other.release()


def test_a_kill_frees_the_lock(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match="is writing there"), writing(tmp_path):
        raise AssertionError("not reached")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with writing(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"cannot be written .*; give another --workdir"),
        writing(tmp_path / "file" / "w"),
    ):
        raise AssertionError("not reached")


def test_what_cannot_be_written_is_told_before_and_nothing_is_left(tmp_path):
    check_can_write(tmp_path / "a" / "new" / "run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "run", "/proc/none/run"):
        with pytest.raises(UserError, match=r"cannot be written .*; give another --workdir"):
            check_can_write(place)
    with (
        filelock.FileLock(str(tmp_path / ".writer.lock")),
        pytest.raises(UserError, match="another process is writing there"),
    ):
        check_can_write(tmp_path)
    check_can_write(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".writer.lock", "file"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_reported_and_used(tmp_path, monkeypatch, capfd, number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    with writing(tmp_path / "w"):
        assert (tmp_path / "w").is_dir()
    assert "this file system has no locks; make sure that no second command writes there" in capfd.readouterr().err
