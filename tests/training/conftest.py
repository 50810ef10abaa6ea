"""A run small enough to repeat many times: a thin network on `shapes`, as real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.small_disk import mounted

TINY = (
    "model.widths=8,8,8,8",
    "model.blocks=1,1,1,1",
    "model.head_width=8",
    "crf.train=off",  # its program takes twice as long to compile; the longer tests train END_TO_END
    "crf.train_iterations=2",
    "crf.stride=8",
    "data.crop=33,33",
    "data.holdout=0",
    "search.images=0",
    "loss.at=scores",
    "batch_size=4",
    "num_steps=12",
    "optimizer.schedule=step",  # its program is that of runs of any length
    "optimizer.step_size=3",
    "log.every=2",
    "checkpoint.every=3",
    "eval.limit=4",
    "eval.crf_iterations=0,",  # a CRF's program takes longer to compile than the whole run
    "eval.overlays=0",
    "eval.trimap_widths=2,",
    "eval.every=6",
    "eval.select_split=val",
)
END_TO_END = "crf.train=end_to_end"


# No TensorBoard log: importing TensorFlow for it takes a third of a short run's time.
LEAN = {"PYTHONPATH": f"{Path(__file__).parents[1] / 'without_tensorflow'}{os.pathsep}{Path(__file__).parents[2]}"}

# A command's own defaults for XLA change last bits on some CPUs; a process whose bits are compared with those of this
# one leaves them out.
AS_HERE = {"DEEPLAB_XLA_DEFAULTS": "off"}


class Runs:
    """Starts `deeplab_jax.main` on a tiny config."""

    @staticmethod
    def same_result(a: Path, b: Path) -> None:
        """Asserts that two workdirs ended with the same bits: all state, evaluation, and logged values."""
        same_result(a, b)

    def __init__(self, cache: Path):
        self.overrides = [*TINY, f"data.cache_dir={cache}"]

    def config(self, *overrides: str):
        from deeplab_jax.config import load_config

        return load_config("shapes", [*self.overrides, *overrides])

    def arguments(self, workdir: Path, *overrides: str) -> list[str]:
        """Of `deeplab_jax.main`."""
        overriding = [f"--config.{o}" for o in (*self.overrides, *overrides)]
        return ["--config", "shapes", "--workdir", str(workdir), *overriding]

    def start(
        self, workdir: Path, *overrides: str, flags=(), env=None, program=("-m", "deeplab_jax.main")
    ) -> subprocess.Popen:
        command = [sys.executable, *program, *self.arguments(workdir, *overrides), *flags]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }
        return subprocess.Popen(
            command, env=environment | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, workdir: Path, *overrides: str, flags=(), env=None, status: int = 0) -> tuple[str, str]:
        process = self.start(workdir, *overrides, flags=flags, env=env)
        out, err = process.communicate(timeout=900)
        assert process.returncode == status, f"status {process.returncode}\n{out}\n{err}"
        return out, err

    def run_here(self, workdir: Path, *overrides: str) -> None:
        """What `deeplab_jax.main` does, in this process."""
        from deeplab_jax.evaluation.workdir import evaluate_workdir
        from deeplab_jax.training import loop

        config = self.config(*overrides)
        loop.train(config, workdir)
        evaluate_workdir(config, workdir)


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> Runs:
    return Runs(few_scenes(tmp_path_factory))


def few_scenes(tmp_path_factory) -> Path:
    """The folder of data sets of all workers, in which `shapes` has been built with a tenth of its scenes."""
    from deeplab_jax.config import load_config
    from deeplab_jax.data import open_dataset
    from deeplab_jax.data.builders.shapes import shapes_dataset_builder

    root = tmp_path_factory.getbasetemp()
    cache = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "shapes-cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes_dataset_builder, "SIZES", {"train": 60, "val": 10})
        open_dataset(load_config("shapes", ["data.holdout=0", f"data.cache_dir={cache}"]).data, "train")
    return cache


@pytest.fixture
def small_disk(tmp_path):
    with mounted(tmp_path / "disk") as folder:
        yield folder


@pytest.fixture(scope="session")
def whole_run(runs, tmp_path_factory) -> Path:
    """The workdir of a run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    runs.run_here(workdir)
    return workdir


@pytest.fixture(autouse=True)
def traced_once(monkeypatch):
    """Trainings in this process share their step if it would be the same: tracing it takes most of a short run."""
    from deeplab_jax.training import setup

    monkeypatch.setattr(setup, "create_train_step", shared(setup.create_train_step))


_SHARED: dict[tuple, object] = {}


def shared(create_train_step: Callable) -> Callable:
    """`create_train_step` that returns the same function again for the same model, config, optimizer and weights."""

    def step(model, config, optimizer, class_weights):
        names = ["model", "crf", "loss", "optimizer", "seed", "batch_size"]
        if config.optimizer.schedule != "step":
            names.append("num_steps")
        weights = None if class_weights is None else np.asarray(class_weights).tobytes()
        key = (repr(model), *(str(config[name]) for name in names), weights)
        if key not in _SHARED:
            _SHARED[key] = create_train_step(model, config, optimizer, class_weights)
        return _SHARED[key]

    return step


def with_devices(count: int) -> dict[str, str]:
    """The environment of a process with this many devices, and otherwise the flags of this one."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    return {"XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={count}"])}


def same_result(a: Path, b: Path) -> None:
    """Asserts that two workdirs ended with the same bits: all state, evaluation, and logged values."""
    from deeplab_jax.runs.checkpoints import Checkpoints

    newest = [Checkpoints(w, read_only=True).newest_whole() for w in (a, b)]
    assert newest[0] == newest[1]
    states = [Checkpoints(w, read_only=True).restore(newest[0])[0] for w in (a, b)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    assert (a / "eval" / "val.json").read_bytes() == (b / "eval" / "val.json").read_bytes()
    rows = [[json.loads(line) for line in (w / "metrics.jsonl").read_text().splitlines()] for w in (a, b)]
    assert rows[0] == rows[1]
    steps = [row["step"] for row in rows[0] if "train/loss" in row]
    assert steps == sorted(set(steps))
