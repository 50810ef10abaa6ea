"""Recognizing one of several processes, the process that searches, and the choice of GPUs."""

import importlib.metadata
import importlib.util
import os

import jax
import numpy as np
import pytest

from deeplab_jax import startup
from deeplab_jax.crf import CRFParams, Preset, write_preset
from deeplab_jax.evaluation import workdir as evaluation
from deeplab_jax.runs import processes

DETERMINISTIC, CUBLAS = "--xla_gpu_deterministic_ops", "--xla_gpu_enable_triton_gemm=false"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}, False),  # python alone in an allocation
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0"}, False),  # a batch script
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, False),  # an interactive step
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8"}, True),  # srun
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_who_waits_for_peers(monkeypatch, variables, expected):
    for name in [n for n in os.environ if n.startswith(("SLURM_", "OMPI_"))]:
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    joined = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
    monkeypatch.setenv("JAX_PLATFORMS", "")  # leaves the collectives of this process alone
    processes.initialize(False)
    assert bool(joined) is expected


def test_a_lost_peer_is_told_from_other_errors(monkeypatch):
    gone = RuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer [127.0.0.1]:4321")
    assert not processes.lost_peer(gone)  # one process has no peers
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert processes.lost_peer(gone)
    assert not processes.lost_peer(RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes"))


def test_all_processes_search_and_read_what_the_first_found(monkeypatch, tmp_path):
    preset = Preset(CRFParams(4.0, 50.0, 3.0, 3.0, 1.5), 7, "before", "found")
    jobs = []

    def search(config, workdir, job):
        jobs.append((job.index, job.count))
        write_preset(workdir / "crf_preset.json", preset)
        return "table"

    monkeypatch.setattr(evaluation, "_search_together", search)
    found = evaluation._search(None, tmp_path)
    assert jobs == [(0, 1)] and not (tmp_path / "crf_search").exists()
    assert (found.iterations, found.normalization, found.source) == (7, "before", "found")
    np.testing.assert_allclose(found.params.bilateral_xy_std, 50.0)


@pytest.mark.parametrize(
    ("plugins", "training", "flags", "expected"),
    [
        (["xla_cuda12"], True, "", f"{DETERMINISTIC}=true {CUBLAS}"),
        (["xla_rocm7"], True, "", f"{DETERMINISTIC}=true {CUBLAS}"),
        (["xla_cuda12"], False, "", ""),  # predict, serve
        (["xla_tpu"], True, "", ""),
        (["xla_cuda12"], True, f"{DETERMINISTIC}=false", f"{DETERMINISTIC}=false {CUBLAS}"),
    ],
)
def test_training_on_gpus_is_deterministic_and_compiles(monkeypatch, plugins, training, flags, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("DEEPLAB_XLA_DEFAULTS", "")
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "jax_plugins")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.10.2")
    monkeypatch.setattr(startup, "_plugins", lambda: plugins)
    monkeypatch.setattr(startup, "_has_devices", lambda plugin: True)
    startup.set_xla_defaults(training)
    assert os.environ["XLA_FLAGS"] == expected
