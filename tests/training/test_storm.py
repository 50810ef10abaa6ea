"""Two hundred random faults over many short runs, each of which ends with the same bits and records."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from deeplab_jax.runs.checkpoints import Checkpoints
from tests.small_disk import filled
from tests.training.conftest import END_TO_END, LEAN
from tests.training.test_resume import last_step, wait_for_steps

STEPS = (END_TO_END, "num_steps=300", "checkpoint.every=5", "checkpoint.keep=3", "eval.every=100", "log.every=2")
PER_RUN = 20
FAULTS = (
    "kill", "stop", "SIGTERM", "SIGINT", "second writer", "flip", "truncate", "delete", "digests", "line", "full disk",
)  # fmt: skip


@pytest.mark.long
def test_storm(runs, tmp_path, request):
    """DEEPLAB_STORM_SEED repeats a storm, DEEPLAB_STORM_FAULTS makes it shorter.

    The runs are on a small disk of their own, which one of the faults fills; where none can be mounted, it is left out.
    """
    seed = int(os.environ.get("DEEPLAB_STORM_SEED", time.time()))
    count = int(os.environ.get("DEEPLAB_STORM_FAULTS", "200"))
    print(f"DEEPLAB_STORM_SEED={seed}")
    rng = np.random.default_rng(seed)
    faults = list(FAULTS)
    try:
        disk = request.getfixturevalue("small_disk")
    except pytest.skip.Exception as e:
        print(f"no fault 'full disk': {e}")
        faults.remove("full disk")
        disk = tmp_path
    whole = tmp_path / "whole"
    runs.run(whole, *STEPS)
    for first in range(0, count, PER_RUN):
        workdir = disk / f"run{first}"
        # Each kind occurs before one occurs twice.
        order = [str(f) for _ in range(1 + PER_RUN // len(faults)) for f in rng.permutation(faults)]
        for number, fault in zip(range(first, min(first + PER_RUN, count)), order, strict=False):
            print(f"fault {number}: {fault} after step {last_step(workdir)} of {workdir.name}")
            strike(runs, workdir, fault, rng)
        runs.run(workdir, *STEPS)
        runs.same_result(whole, workdir)
        shutil.rmtree(workdir)


FILLED = ("num_steps=1000", "checkpoint.every=5", "eval.every=0", "log.every=2")


@pytest.mark.long
def test_a_disk_that_is_full_for_a_while(runs, small_disk, tmp_path):
    """Checkpoints and rows meet it; each is reported once, and the run ends as one whose disk had room."""
    whole, workdir = tmp_path / "whole", small_disk / "run"
    runs.run(whole, *FILLED, flags=["--mode=train"])
    process = runs.start(workdir, *FILLED, flags=["--mode=train"])
    wait_for_steps(workdir, process)
    with filled(small_disk):
        time.sleep(2)
        assert not [p for p in workdir.rglob("*") if "tmp" in p.name or p.name.startswith(".metrics")]
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    print(err)
    assert "Traceback" not in err
    assert err.count("metrics.jsonl: cannot be written (no space left on device)") <= 1  # its last block may have room
    assert err.count("TensorBoard logs cannot be written (no space left on device)") <= 1
    refused = [line for line in err.splitlines() if "could not be written (no space left" in line]
    assert len(refused) == 1 and str(workdir / "checkpoints") in refused[0], refused
    newest = [Checkpoints(w, read_only=True).newest_whole() for w in (whole, workdir)]
    assert newest == [1000, 1000]
    states = [Checkpoints(w, read_only=True).restore(1000)[0] for w in (whole, workdir)]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    assert (whole / "metrics.jsonl").read_bytes() == (workdir / "metrics.jsonl").read_bytes()


def strike(runs, workdir: Path, fault: str, rng: np.random.Generator) -> None:
    """Starts the run, and lets a fault meet it somewhere; what damages files does so after a kill."""
    # TensorFlow takes a third of a short run: it is there where its log meets a full disk, a kill and a signal.
    process = runs.start(workdir, *STEPS, env=None if fault in ("full disk", "kill", "SIGTERM") else LEAN)
    try:
        wait_for_steps(workdir, process)
        time.sleep(rng.uniform(0, 1))
        if fault in ("SIGTERM", "SIGINT"):
            number = signal.Signals[fault]
            process.send_signal(number)
            _, err = process.communicate(timeout=300)
            assert process.returncode in (0, 128 + number), err  # 0: it had just ended
            assert process.returncode == 0 or "the same command continues from" in err
        elif fault == "stop":
            process.send_signal(signal.SIGSTOP)
            time.sleep(rng.uniform(0, 2))
            process.send_signal(signal.SIGCONT)
        elif fault == "full disk":
            with filled(workdir.parent):
                time.sleep(rng.uniform(1, 4))
            time.sleep(rng.uniform(0, 1))
        elif fault == "second writer":
            second_writer(runs, workdir, process)
    finally:
        process.kill()
        _, err = process.communicate()
    assert "Traceback" not in err, err
    damage(workdir, fault, rng)


def second_writer(runs, workdir: Path, process: subprocess.Popen) -> None:
    second = runs.start(workdir, *STEPS, env=LEAN)
    _, err = second.communicate(timeout=300)
    if process.poll() is None:
        assert second.returncode == 1, err
        assert f"process {process.pid} on host" in err or "another process wrote there meanwhile" in err


def damage(workdir: Path, fault: str, rng: np.random.Generator) -> None:
    steps = Checkpoints(workdir, read_only=True).steps()
    if fault == "line":
        with (workdir / "metrics.jsonl").open("ab") as file:
            file.write(b"\xff\xfe damaged\n")
    if len(steps) < 2 or fault not in ("flip", "truncate", "delete", "digests"):
        return
    if fault == "digests":
        (workdir / "digests" / f"{steps[-1]}.json").unlink()
        return
    files = sorted(p for p in (workdir / "checkpoints" / str(steps[-1])).rglob("*") if p.is_file())
    path = files[rng.integers(len(files))]
    content = bytearray(path.read_bytes())
    if fault == "delete" or not content:
        path.unlink()
    elif fault == "truncate":
        path.write_bytes(content[: rng.integers(len(content))])
    else:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        path.write_bytes(content)
