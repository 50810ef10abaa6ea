"""Killed anywhere and started again, a run ends with the same bits."""

import os
import shutil
import signal
import time

import numpy as np
import pytest

from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.record import read_record
from tests.training.conftest import AS_HERE, END_TO_END, LEAN, with_devices

# Where to die: before the n-th call of a function (of those with a path that holds a word, if one is given). The
# process kills itself with SIGKILL, so nothing is tidied up.
KILLER = """
import importlib, os, signal, sys
from deeplab_jax import cli, main

def deadly(function):
    calls = [0]
    def wrapped(*args, **kwargs):
        if not {word!r} or any({word!r} in os.fspath(a) for a in args if isinstance(a, (str, os.PathLike))):
            calls[0] += 1
            if calls[0] == {call}:
                os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return wrapped

*path, name = {function!r}.split(".")
owner = importlib.import_module({module!r})
for part in path:
    owner = getattr(owner, part)
setattr(owner, name, deadly(getattr(owner, name)))
main.define_flags()
cli.run(main.main, ["main", *sys.argv[1:]])
"""


def run_and_die(runs, workdir, module, function, word, call):
    code = KILLER.format(module=module, function=function, word=word, call=call)
    process = runs.start(workdir, program=["-c", code], env=LEAN | AS_HERE)
    _, err = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL, err


def seeded(default: float) -> np.random.Generator:
    """Random moments that DEEPLAB_KILL_SEED repeats."""
    seed = int(os.environ.get("DEEPLAB_KILL_SEED", default))
    print(f"DEEPLAB_KILL_SEED={seed}")
    return np.random.default_rng(seed)


# The run writes 4 checkpoints, settles its metrics 6 times or more, and evaluates 4 images after step 6.
MOMENTS = {
    "in a checkpoint's write": ("os", "rename", "orbax-checkpoint-tmp", (1, 4)),
    "before the rename that commits": ("os", "replace", "digests", (1, 4)),
    "in training": ("deeplab_jax.training.loop", "report", "", (2, 6)),
    "in an evaluation": ("deeplab_jax.inference.segmenter", "Segmenter.labels", "", (2, 4)),
}


OFTEN = ("in a checkpoint's write",)  # the other moments are for `make test-long`


@pytest.mark.parametrize("moment", [m if m in OFTEN else pytest.param(m, marks=pytest.mark.long) for m in MOMENTS])
def test_a_killed_run_ends_as_if_it_had_not_been(runs, whole_run, tmp_path, moment):
    module, function, word, (low, high) = MOMENTS[moment]
    call = int(seeded(0).integers(low, high, endpoint=True))
    print(f"killed {moment}, at call {call} of {function}")
    workdir = tmp_path / "run"
    run_and_die(runs, workdir, module, function, word, call)
    partial = [p.name for p in (workdir / "checkpoints").glob("*orbax-checkpoint-tmp*")]
    uncommitted = [p.name for p in (workdir / "digests").glob(".*")]
    assert len(partial) == (moment == "in a checkpoint's write")
    assert len(uncommitted) == (moment == "before the rename that commits")
    if moment == "in an evaluation":
        rows = read_record(workdir / "metrics.jsonl")
        assert Checkpoints(workdir, read_only=True).steps() == [3, 6]
        assert not any("select/mean_iou" in row for row in rows)
    runs.run_here(workdir)
    assert not [*(workdir / "checkpoints").glob("*-tmp*"), *(workdir / "digests").glob(".*")]
    runs.same_result(whole_run, workdir)


LONG = (END_TO_END, "num_steps=1500", "checkpoint.every=10", "eval.every=500", "log.every=2")


@pytest.mark.long
def test_twenty_kills_at_random_moments(runs, tmp_path):
    """Every kill hits a run that is training: it has logged steps of its own, and has steps left."""
    rng = seeded(time.time())
    whole, workdir = tmp_path / "whole", tmp_path / "run"
    runs.run(whole, *LONG)
    for kill in range(20):
        process = runs.start(workdir, *LONG)
        try:
            wait_for_steps(workdir, process)
            time.sleep(rng.uniform(0, 2))
            assert process.poll() is None, f"kill {kill} came after the end: {process.communicate()}"
        finally:
            process.kill()
            process.communicate()
        print(f"kill {kill} after step {last_step(workdir)}")
    runs.run(workdir, *LONG)
    runs.same_result(whole, workdir)


def wait_for_steps(workdir, process) -> None:
    """Waits until a run has logged steps; a resumed one first removes entries after its checkpoint."""
    low, deadline = last_step(workdir), time.time() + 300
    while process.poll() is None and time.time() < deadline:
        now = last_step(workdir)
        if now > low:
            return
        low = now
        time.sleep(0.05)


def last_step(workdir) -> int:
    return max((row["step"] for row in read_record(workdir / "metrics.jsonl")), default=0)


@pytest.mark.long
def test_resume_with_other_devices_and_workers(runs, whole_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    _, err = runs.run(workdir, "data.workers=4", flags=["--mode=train"], env=with_devices(2))
    assert "resuming at step 9" in err
    states = [Checkpoints(w).restore(12)[0] for w in (whole_run, workdir)]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-3, atol=1e-3, err_msg=name)
