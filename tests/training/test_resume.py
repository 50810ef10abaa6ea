"""Killed anywhere and started again, a run ends with the same bits."""

import os
import shutil
import signal
import time

import numpy as np
import pytest

from deeplab_jax.training.checkpoints import Checkpoints

# Where to die: the function, and at which of its calls. The process kills itself with SIGKILL, so nothing is tidied up.
KILLER = """
import os, signal, sys
import deeplab_jax.training.{module} as module
def deadly(function):
    calls = [0]
    def wrapped(*args, **kwargs):
        calls[0] += 1
        if calls[0] == {call} and not {after}:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if calls[0] == {call}:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
module.{name} = deadly(module.{name})
from deeplab_jax import cli, main
main.define_flags()
cli.run(main.main, ["main", *sys.argv[1:]])
"""


def run_and_die(runs, workdir, module, name, call, after=False):
    code = KILLER.format(module=module, name=name, call=call, after=after)
    process = runs.start(workdir, program=["-c", code])
    _, err = process.communicate(timeout=400)
    assert process.returncode == -signal.SIGKILL, err


@pytest.mark.parametrize(
    ("module", "name", "call", "after"),
    [
        ("checkpoints", "_digest_files", 2, False),  # between orbax's write and the commit
        ("checkpoints", "write_json", 3, False),  # before the rename that commits
        ("loop", "report", 4, True),  # in the middle of training
        ("evaluation", "evaluate", 2, False),  # in the selection's evaluation
    ],
)
def test_a_killed_run_ends_as_if_it_had_not_been(runs, whole_run, tmp_path, module, name, call, after):
    workdir = tmp_path / "run"
    run_and_die(runs, workdir, module, name, call, after)
    runs.run(workdir)
    runs.same_result(whole_run, workdir)


@pytest.mark.long
def test_twenty_kills_at_random_moments(runs, whole_run, tmp_path):
    seed = int(os.environ.get("DEEPLAB_KILL_SEED", time.time()))
    print(f"DEEPLAB_KILL_SEED={seed}")
    rng = np.random.default_rng(seed)
    workdir = tmp_path / "run"
    for _ in range(20):
        process = runs.start(workdir)
        time.sleep(rng.uniform(2, 25))
        process.kill()
        process.communicate()
    runs.run(workdir)
    runs.same_result(whole_run, workdir)


def test_resume_with_other_devices_and_workers(runs, whole_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run, workdir)
    shutil.rmtree(workdir / "checkpoints" / "12")
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    _, err = runs.run(workdir, "data.workers=4", flags=["--mode=train"], env=two)
    assert "resuming at step 9" in err
    states = [Checkpoints(w).restore(12)[0] for w in (whole_run, workdir)]
    for name, value in states[0].items():
        np.testing.assert_allclose(value, states[1][name], rtol=1e-3, atol=1e-3, err_msg=name)


def test_sigterm_saves_and_says_so(runs, tmp_path):
    workdir = tmp_path / "run"
    process = runs.start(workdir, "num_steps=100000", "checkpoint.every=0", "eval.every=0")
    deadline = time.time() + 200
    while time.time() < deadline and not (workdir / "config.json").is_file():
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 143
    assert "SIGTERM: saved step" in err
    assert len(Checkpoints(workdir).steps()) == 1
