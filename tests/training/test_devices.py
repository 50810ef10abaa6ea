"""One program for one device, several devices and several processes: the same parameters, the same counts."""

import json
import os
import re
import shutil
import signal
import socket
import time

import numpy as np
import pytest

from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.record import read_record
from tests.training.conftest import END_TO_END, LEAN, with_devices

SHORT = ("num_steps=4", "checkpoint.every=0", "eval.every=0", "eval.limit=5")
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
    runs.run(workdir, *SHORT, flags=["--mode=train"], env=LEAN)
    return workdir


@pytest.mark.long
@pytest.mark.parametrize("devices", [2, 4])
def test_several_devices_give_the_same_parameters(runs, tmp_path, devices):
    for name, count in (("one", 1), ("several", devices)):
        runs.run(tmp_path / name, *SHORT, END_TO_END, flags=["--mode=train"], env=with_devices(count))
    same_parameters(parameters(tmp_path / "one"), parameters(tmp_path / "several"))


def start_job(runs, workdir, *overrides, processes=2, devices=2, flags=(), env=None):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    flags = [*flags, f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
    env = with_devices(devices) | (env or {})
    return [runs.start(workdir, *overrides, flags=[*flags, f"--process_id={i}"], env=env) for i in range(processes)]


def finish(processes) -> list[str]:
    """Each process's stderr."""
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return [err for _, err in outputs]


@pytest.mark.parametrize(("processes", "devices"), [(2, 1), *(pytest.param(*n, marks=pytest.mark.long) for n in MORE)])
def test_several_processes_give_the_same_parameters(runs, one_device, tmp_path, processes, devices):
    # A checkpoint at every step: process 0 also deletes the old ones, alone.
    how = {"processes": processes, "devices": devices, "flags": ["--mode=train"], "env": LEAN}
    finish(start_job(runs, tmp_path / "run", *SHORT, "checkpoint.every=1", **how))
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


def test_unequal_void_weighs_every_position_alike(runs):
    """Two devices, one of which holds nothing but void: the gradient is that of the valid positions alone."""
    import subprocess
    import sys

    code = """
import jax, jax.numpy as jnp, numpy as np, optax
from deeplab_jax.config import load_config
from deeplab_jax.models import create_model
from deeplab_jax.training.state import create_state
from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard, unreplicate
overrides = ["batch_size=4", "model.widths=8,8,8,8", "model.head_width=8", "crf.train=off", "model.batch_norm=frozen",
             "model.allow_random_frozen=true", "optimizer.warmup_steps=0"]
config = load_config("shapes", overrides)
model = create_model(config.model, 7)
variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 33, 33, 3)))
rng = np.random.default_rng(0)
image = rng.integers(0, 256, (4, 33, 33, 3)).astype(np.uint8)
label = rng.integers(0, 7, (4, 33, 33)).astype(np.uint8)
label[0, :, 4:], label[2:] = 255, 255
batch = dict(image=image, label=label, valid=np.ones((4, 33, 33), bool), index=np.arange(4, dtype=np.int32))
optimizer = optax.sgd(1.0)
def gradient(accumulate, batch):
    config.optimizer.accumulate = accumulate
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    state = create_state(variables, config, optimizer)
    new, metrics = step(replicate(state), shard(batch, accumulate))
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, state.trainable, unreplicate(new).trainable)
    return change, unreplicate(metrics)
def reference(trainable):
    from deeplab_jax.training import losses
    from deeplab_jax.training.optimizer import merge_params, split_params
    frozen = split_params(variables["params"], config)[1]
    full = {**variables, "params": merge_params(trainable, frozen)}
    logits, _ = model.apply(full, batch["image"], train=True, valid=batch["valid"])
    sums = losses.loss_sums(dict(s=jax.nn.log_softmax(logits)), batch["label"], "scores")
    return sums["s"] / losses.valid_count(label[:, ::8, ::8])
from deeplab_jax.training.optimizer import split_params
expected = jax.jit(jax.grad(reference))(split_params(variables["params"], config)[0])
for accumulate in (1, 2):
    got, metrics = gradient(accumulate, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6), got, expected)
void = dict(batch, label=np.full_like(label, 255))
got, metrics = gradient(1, void)
assert not metrics["updated"] and metrics["loss"] == 0
assert all(not np.any(x) for x in jax.tree.leaves(got))
print("equal on", jax.device_count(), "devices")
"""
    env = os.environ | with_devices(2) | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal on 2 devices", done.stderr
