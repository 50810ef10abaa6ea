"""One program for one device, several devices and several processes: the same parameters, the same counts."""

import json
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.record import read_record
from deeplab_jax.training import loop
from tests.training import unequal_void
from tests.training.conftest import END_TO_END, LEAN, with_devices
from tests.training.forked import Forked, start_server, stop_server

SHORT = ("num_steps=4", "checkpoint.every=0", "eval.every=0", "eval.limit=5", "eval.crf_iterations=0,2")
MORE = ((2, 2), (4, 1))  # processes and devices of each


def parameters(workdir):
    checkpoints = Checkpoints(workdir, read_only=True)
    return checkpoints.read(checkpoints.newest_whole())[0]


def same_parameters(a, b):
    for name, value in a.items():
        np.testing.assert_allclose(value, b[name], rtol=1e-3, atol=2e-4, err_msg=name)


@pytest.fixture(scope="module")
def one_device(runs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one") / "run"
    loop.train(runs.config(*SHORT), workdir)
    return workdir


@pytest.fixture(scope="module")
def server():
    """Processes that need not import."""
    start_server(tensorflow=False)
    yield
    stop_server()


@pytest.mark.long
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_give_the_same_parameters(runs, tmp_path, devices):
    for name, count in (("one", 1), ("several", devices)):
        runs.run(tmp_path / name, *SHORT, END_TO_END, flags=["--mode=train"], env=with_devices(count))
    same_parameters(parameters(tmp_path / "one"), parameters(tmp_path / "several"))


def flags_of_a_job(processes: int, *flags: str) -> list[list[str]]:
    """Of each of its processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [*flags, f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [[*flags, f"--process_id={i}"] for i in range(processes)]


def start_job(runs, workdir, *overrides, processes=2, devices=2, flags=(), env=None):
    env = with_devices(devices) | (env or {})
    return [runs.start(workdir, *overrides, flags=one, env=env) for one in flags_of_a_job(processes, *flags)]


def finish(processes) -> list[str]:
    """Each process's stderr."""
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [err for _, err in outputs]


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), *(pytest.param(*n, marks=pytest.mark.long) for n in MORE)])
def test_several_processes_give_the_same_parameters(server, runs, one_device, tmp_path, processes, devices):
    # A checkpoint at every step: process 0 also deletes the old ones, alone.
    arguments = runs.arguments(tmp_path / "run", *SHORT, "checkpoint.every=1")
    job = [
        Forked([*arguments, *flags], tmp_path / f"{i}.err", with_devices(devices))
        for i, flags in enumerate(flags_of_a_job(processes, "--mode=train"))
    ]
    said = [process.wait(400) for process in job]
    assert [process.returncode for process in job] == [0] * processes, said
    assert Checkpoints(tmp_path / "run").steps() == [3, 4]
    same_parameters(parameters(one_device), parameters(tmp_path / "run"))


@pytest.mark.long
@pytest.mark.parametrize(("processes", "devices"), MORE)
def test_several_processes_count_alike(runs, one_device, tmp_path, processes, devices):
    for name in ("one", "several"):
        shutil.copytree(one_device, tmp_path / name)
    runs.run(tmp_path / "one", *SHORT, flags=["--mode=eval"], env=LEAN)
    how = {"processes": processes, "devices": devices, "flags": ["--mode=eval"], "env": LEAN}
    finish(start_job(runs, tmp_path / "several", *SHORT, **how))
    results = [json.loads((tmp_path / name / "eval" / "val.json").read_text()) for name in ("one", "several")]
    assert [r["images"] for r in results[1]] == [5, 5]
    for one, several in zip(*results):
        assert several["pixel_accuracy"] == pytest.approx(one["pixel_accuracy"], abs=1e-4)


@pytest.mark.long
def test_resume_with_another_number_of_processes(runs, whole_run, tmp_path):
    """The newest checkpoint is damaged: process 0 detects it, and both continue from the previous one."""
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    files = [p for p in (workdir / "checkpoints" / "12").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    said = finish(start_job(runs, workdir, devices=1, flags=["--mode=train"]))
    assert ["checkpoint 12 is damaged" in err for err in said] == [True, False]
    assert all("resuming at step 9 of 12" in err for err in said)
    states = [Checkpoints(w).restore(12)[0] for w in (whole_run, workdir)]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-3, atol=1e-3, err_msg=name)
    rows = [read_record(w / "metrics.jsonl") for w in (whole_run, workdir)]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]


def start_endless_pair(runs, workdir, env=None):
    """A pair that has logged steps and has far to go."""
    processes = start_job(runs, workdir, "num_steps=100000", "checkpoint.every=0", "eval.every=0", env=env)
    deadline = time.time() + 200
    while time.time() < deadline and not read_record(workdir / "metrics.jsonl"):
        assert processes[0].poll() is None, processes[0].communicate()
        time.sleep(0.3)
    return processes


@pytest.mark.long
def test_sigterm_to_one_process_stops_all_at_one_step(runs, tmp_path):
    processes = start_endless_pair(runs, tmp_path / "run")
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    saved = Checkpoints(tmp_path / "run").steps()
    assert len(saved) == 1
    assert f"a signal to another process: saved step {saved[0]}" in outputs[0][1]


@pytest.mark.long
@pytest.mark.parametrize("dead", [0, 1])
def test_a_dead_peer_ends_the_job_with_a_sentence(runs, tmp_path, dead):
    processes = start_endless_pair(runs, tmp_path / "run")
    processes[dead].kill()
    processes[dead].communicate()
    other = processes[1 - dead]
    _, err = other.communicate(timeout=30)
    assert other.returncode == 1, err
    assert re.search(rf"^error: process {1 - dead} of 2: another process of the job ended \(.*\); see", err, re.M), err
    assert err.count("another process of the job ended") == 1
    assert not re.search("Traceback|stack trace|@ +0x|Terminating process|^[EF][0-9]{4} ", err, re.M), err


@pytest.mark.long
def test_unequal_void_weighs_every_position_alike(server, tmp_path):
    """Two devices, one of which holds nothing but void: the gradient is that of the valid positions alone."""
    done = Forked([], tmp_path / "err", with_devices(2), unequal_void.compare)
    said = done.wait(300)
    assert done.returncode == 0, said
