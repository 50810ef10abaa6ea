"""Two hundred random faults over many short runs, each of which ends with the same bits and records."""

import contextlib
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from deeplab_jax.runs.checkpoints import Checkpoints
from tests.small_disk import filled, mounted
from tests.training.conftest import END_TO_END
from tests.training.forked import Forked, start_server
from tests.training.test_resume import last_step, wait_for_steps

LAST = 180
STEPS = (f"num_steps={LAST}", "checkpoint.every=5", "checkpoint.keep=3", "eval.every=60", "log.every=2")
NETWORK = (*STEPS, "eval.crf_iterations=0,")
# Runs take these in turn. Those with a CRF need longer until their first step.
KINDS = (
    NETWORK,
    (*STEPS, END_TO_END, "crf.train_iterations=1", "eval.crf_iterations=0,1"),
    NETWORK,
    (*NETWORK, "log.images_every=30", "eval.overlays=2"),
)
PER_RUN = 20
FAULTS = (
    "kill", "stop", "SIGTERM", "SIGINT", "second writer", "flip", "truncate", "delete", "digests", "line", "full disk",
)  # fmt: skip


@pytest.mark.long
def test_storm(runs, tmp_path, monkeypatch):
    """DEEPLAB_STORM_SEED repeats a storm, DEEPLAB_STORM_FAULTS makes it shorter, DEEPLAB_STORM_SKIP leaves out the
    first runs of it.

    Two runs at a time; each is on a small disk of its own, which one of the faults fills; where none can be mounted,
    that fault is left out. What faults meet is forked (see `forked`); each run is finished by `python -m`.
    """
    seed = int(os.environ.get("DEEPLAB_STORM_SEED", time.time()))
    count = int(os.environ.get("DEEPLAB_STORM_FAULTS", "200"))
    skipped = int(os.environ.get("DEEPLAB_STORM_SKIP", "0"))
    print(f"DEEPLAB_STORM_SEED={seed}", flush=True)
    # Every program comes from the cache, small ones too, and was written there by a run that nothing met.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    start_server()
    with contextlib.ExitStack() as disks, ThreadPoolExecutor(2) as pool:
        waiting = []
        for number in range(skipped, -(-count // PER_RUN)):
            folder, faults = tmp_path / f"disk{number}", list(FAULTS)
            try:
                disks.enter_context(mounted(folder))
            except pytest.skip.Exception as e:
                print(f"no fault 'full disk': {e}")
                faults.remove("full disk")
                folder.mkdir(exist_ok=True)
            strikes = min(PER_RUN, count - number * PER_RUN)
            waiting.append((number, Story(runs, folder / "run", number, seed, faults), strikes))
        kinds = sorted({number % len(KINDS) for number, _, _ in waiting})
        whole = {kind: tmp_path / f"whole{kind}" for kind in kinds}
        list(pool.map(lambda kind: runs.run(whole[kind], *KINDS[kind]), kinds))
        ended = [pool.submit(story.happen, strikes) for _, story, strikes in waiting]
        try:
            for (number, story, _), end in zip(waiting, ended, strict=True):
                end.result()
                runs.same_result(whole[number % len(KINDS)], story.workdir)
                same_pictures(whole[number % len(KINDS)], story.workdir, story.was_full)
                print(f"run {number}: as if nothing had happened", flush=True)
        finally:
            pool.shutdown(cancel_futures=True)


def same_pictures(whole: Path, workdir: Path, was_full: bool) -> None:
    """Asserts that pictures have the same bytes; some may be missing where it was said that the disk was full."""
    names = [
        {p.relative_to(w) for folder in ("pictures", "eval") for p in (w / folder).rglob("*.png")}
        for w in (whole, workdir)
    ]
    assert names[1] <= names[0]
    assert names[1] == names[0] or (was_full and all(p.parts[0] == "pictures" for p in names[0] - names[1]))
    for name in names[1]:
        assert (whole / name).read_bytes() == (workdir / name).read_bytes(), name


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
        deadline = time.monotonic() + 10
        while half_written(workdir) and time.monotonic() < deadline:  # an attempt may be under way just now
            time.sleep(0.05)
        assert not half_written(workdir)
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


def half_written(workdir: Path) -> list[str]:
    names = [name for _, folders, files in os.walk(workdir) for name in (*folders, *files)]
    return [name for name in names if "tmp" in name or name.startswith(".metrics")]


class Story:
    """A run and the faults that meet it.

    Args:
      runs: knows the config.
      workdir: of the run.
      number: of the run, which says its kind and, with `seed`, what happens to it.
      seed: of the storm.
      faults: kinds of faults that can be had here.
    """

    def __init__(self, runs, workdir: Path, number: int, seed: int, faults: list[str]):
        self.runs, self.workdir, self.number, self.faults = runs, workdir, number, faults
        self.rng = np.random.default_rng([seed, number])
        self.steps = KINDS[number % len(KINDS)]
        self.was_full = False  # whether a process said so
        self.starts = 0

    def happen(self, strikes: int) -> None:
        """Lets faults meet the run, and the run end."""
        # Each kind occurs before one occurs twice.
        rounds = 1 + strikes // len(self.faults)
        order = [str(f) for _ in range(rounds) for f in self.rng.permutation(self.faults)][:strikes]
        for number, fault in enumerate(order, self.number * PER_RUN):
            begin, step = time.monotonic(), last_step(self.workdir)
            self.strike(fault)
            seconds = time.monotonic() - begin
            print(f"run {self.number}, fault {number}: {fault} after step {step}, {seconds:.1f} s", flush=True)
        self.runs.run(self.workdir, *self.steps)

    def start(self) -> Forked:
        self.starts += 1
        arguments = self.runs.arguments(self.workdir, *self.steps)
        return Forked(arguments, self.workdir.parent.parent / f"run{self.number}-{self.starts}.err")

    def strike(self, fault: str) -> None:
        """Starts the run, and lets a fault meet it somewhere; what damages files does so after a kill."""
        process, rng = self.start(), self.rng
        try:
            self.wait_for_steps(process, int(rng.integers(12)))
            time.sleep(rng.uniform(0, 0.3))
            if fault in ("SIGTERM", "SIGINT"):
                number = signal.Signals[fault]
                process.send_signal(number)
                err = process.wait(300)
                assert process.returncode in (0, 128 + number), err  # 0: it had just ended
                assert process.returncode == 0 or "the same command continues from" in err
            elif fault == "stop":
                process.send_signal(signal.SIGSTOP)
                time.sleep(rng.uniform(0, 1))
                process.send_signal(signal.SIGCONT)
            elif fault == "full disk":
                with filled(self.workdir.parent):
                    time.sleep(rng.uniform(0.5, 2))
                time.sleep(rng.uniform(0, 0.5))
            elif fault == "second writer":
                self.second_writer(process)
        finally:
            process.kill()
            err = process.wait(60)
        assert "Traceback" not in err, err
        self.was_full |= "no space left" in err
        damage(self.workdir, fault, rng)

    def wait_for_steps(self, process: Forked, more: int) -> None:
        """Waits until a run has logged steps of its own, and then `more`: runs get on, however slow the machine is."""
        wait_for_steps(self.workdir, process)
        wanted, deadline = min(last_step(self.workdir) + more, LAST), time.monotonic() + 300
        while last_step(self.workdir) < wanted and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)

    def second_writer(self, process: Forked) -> None:
        second = self.start()
        err = second.wait(300)
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
