"""Processes that share files: the shares, the reports to the first process, and its messages about dead ones."""

import os
import subprocess
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, write_json
from deeplab_jax.runs import job as jobs
from deeplab_jax.runs import processes
from deeplab_jax.runs.devices import in_order
from deeplab_jax.runs.job import Job, Report, absence


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_item_is_in_one_share(count):
    items = list("abcde")
    shares = [Job(k, count).share(items) for k in range(count)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Job(0, count).share_of(count - 1, items) == shares[-1]


def test_a_place_that_is_none_is_refused():
    with pytest.raises(UserError, match="--process_id=2: must be from 0 to 1"):
        Job(2, 2)
    with pytest.raises(UserError, match="must be given together"):
        processes.place(False, "host:1", -1, 4)
    assert processes.place(False, "host:1", 3, 4) == (3, 4)


@pytest.mark.parametrize(
    ("variables", "expected", "gpu"),
    [
        ({}, (0, 1), None),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, (0, 1), None),  # a batch script
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}, (5, 8), "1"),
        ({"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "3"},
         (5, 8), None),  # the launcher has chosen
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"},
         (1, 4), None),  # one process for each host
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
          "CUDA_VISIBLE_DEVICES": "0,1"}, (0, 2), "0"),
    ],
)  # fmt: skip
def test_a_launcher_says_which_process_this_is(monkeypatch, variables, expected, gpu):
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_", "CUDA_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = {}
    monkeypatch.setattr(jax.config, "update", lambda name, value: told.update({name: value}))
    assert processes.place(False) == expected
    assert told.get("jax_cuda_visible_devices") == gpu


def test_without_a_launcher_distributed_needs_numbers(monkeypatch):
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(UserError, match="no launcher is detected; give --process_id and --num_processes"):
        processes.place(True)


# ---- meeting -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setenv("DEEPLAB_HEARTBEAT_SECONDS", "1")


def total(reports: list[Report]) -> int:
    return sum(report.found["bad"] if report.found else 100 for report in reports)


def start(folder, index, count, report, results):
    """A process of a job, as a thread."""

    def run():
        member = Job(index, count)
        try:
            with member.meeting(folder):
                results[index] = member.conclude(report, total)
        except UserError as e:
            results[index] = str(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_all_end_with_one_result_and_leave_nothing(tmp_path):
    folder = tmp_path / "out/.processes"
    folder.mkdir(parents=True)
    # An earlier run whose processes were killed: reports and results of it count for nothing.
    write_json(folder / "1-of-3.json", {"token": "old", "does": "reports", "report": {"bad": 50}})
    write_json(folder / "0-of-3.json", {"token": "old", "does": "ended", "result": 9, "heard": {"2": "old"}})
    results = {}
    threads = [start(folder, 2, 3, {"bad": 4}, results)]  # it has ended before the first one begins
    time.sleep(0.3)
    threads += [start(folder, k, 3, {"bad": k}, results) for k in (0, 1)]
    for thread in threads:
        thread.join(30)
    assert results == {0: 5, 1: 5, 2: 5}
    assert not folder.exists()


def test_one_process_writes_nothing(tmp_path):
    alone = Job()
    with alone.meeting(tmp_path / "m"):
        assert alone.conclude({"bad": 3}, total) == 3
    assert not (tmp_path / "m").exists()


def test_the_dead_are_named_at_once_and_the_absent_after_a_while(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    first, heard = Job(0, 3), []
    with first.meeting(tmp_path / "m"):
        state = {"token": "t", "does": "works", "pid": child.pid, "host": "here", "kernel": jobs._kernel()}
        write_json(tmp_path / "m/1-of-3.json", state)
        assert first.conclude({"bad": 0}, lambda reports: heard.extend(reports) or total(reports)) == 200
    assert [report.found for report in heard] == [{"bad": 0}, None, None]
    assert heard[1].reason == f"process 1 (number {child.pid} on here) is gone"
    assert heard[2].reason == "process 2 did not appear in 1 seconds"
    assert absence(heard[1], 3, [tmp_path / "a"]).endswith(
        f"is gone; 1 of its 3 files are missing, the first {tmp_path}/a; run the same command again"
    )
    assert absence(heard[1], 3, []).endswith("is gone; all of its 3 files are done")
    assert not (tmp_path / "m").exists()


def test_a_process_that_was_refused_says_so_to_the_first(tmp_path):
    first, heard = Job(0, 2), []
    with first.meeting(tmp_path / "m"):
        second = Job(1, 2)
        with pytest.raises(UserError), second.meeting(tmp_path / "m"):
            raise UserError("w: no such folder")
        first.conclude({"bad": 0}, lambda reports: heard.extend(reports) or 0)
    assert heard[1].found is None and heard[1].reason.startswith("process 1 (number ")
    assert heard[1].reason.endswith(" ended (w: no such folder)")


def test_the_first_process_may_die_as_well(tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    (tmp_path / "m").mkdir()
    stale = {"token": "t", "beat": 1, "does": "works", "pid": child.pid, "host": "x", "kernel": jobs._kernel()}
    write_json(tmp_path / "m/0-of-2.json", stale)
    second = Job(1, 2)
    words = "process 0 did not appear in 1 seconds; the files of process 1 are done"
    with pytest.raises(UserError, match=words), second.meeting(tmp_path / "m"):
        second.conclude({"bad": 0}, total)
    assert read_json(tmp_path / "m/1-of-2.json")["does"] == "failed"
    with pytest.raises(UserError, match=r"process 0 \(number \d+ on x\) is gone"), second.meeting(tmp_path / "m"):
        write_json(tmp_path / "m/0-of-2.json", stale | {"beat": 2})
        second.conclude({"bad": 0}, total)


# ---- local devices -------------------------------------------------------------------------------------------------


def test_work_on_several_devices_keeps_its_order():
    (device,) = jax.local_devices()[:1]
    both = threading.Barrier(2, timeout=60)

    def work(item: int):
        if item < 2:
            both.wait()  # two are under way at once
        return jnp.ones(()).devices(), jax.config.jax_default_device, threading.current_thread()

    found = list(in_order(work, iter(range(20)), [device, device]))
    assert [item for item, _ in found] == list(range(20))
    assert all(default == device and where == {device} for _, (where, default, _) in found)
    assert len({thread for _, (_, _, thread) in found}) == 2
    ((_, (_, default, thread)),) = in_order(lambda _: work(2), [2], [device])
    assert default is None and thread is threading.current_thread()


def test_an_error_of_the_work_is_the_callers():
    (device,) = jax.local_devices()[:1]

    def work(item: int) -> float:
        return 1 / (3 - item)

    with pytest.raises(ZeroDivisionError):
        list(in_order(work, range(1000), [device, device]))


def test_what_an_earlier_run_left_ends_nothing(tmp_path, monkeypatch):
    """Files of processes that failed then, and have not begun again yet, are no news."""
    monkeypatch.setenv("DEEPLAB_HEARTBEAT_SECONDS", "2")
    write_json(tmp_path / "2-of-3.json", {"token": "old", "beat": 9, "does": "failed", "said": "OutOfMemory"})
    ready = time.monotonic() + 0.8
    job = Job(1, 3)
    with job.meeting(tmp_path):
        job.wait_until(lambda: time.monotonic() > ready)


def test_the_first_process_leaves_what_another_is_about_to_rename(tmp_path):
    (tmp_path / ".1-of-2.x.json").write_text("{}")
    write_json(tmp_path / "1-of-2.json", {"does": "failed"})
    meeting = jobs._Meeting(tmp_path, 0, 2)
    with meeting:
        assert {p.name for p in tmp_path.iterdir()} == {".1-of-2.x.json", "0-of-2.json"}
