"""The origin of a workdir's results: config.json, run.json, and earlier configs."""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import jax
from ml_collections import ConfigDict

from deeplab_jax.config import fields
from deeplab_jax.console import say
from deeplab_jax.errors import UserError
from deeplab_jax.files import json_writer, read_json, reason, replace_together, set_aside
from deeplab_jax.old_fields import renamed
from deeplab_jax.runs import schema
from deeplab_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "grain", "clu")


def record_start(workdir: str | Path, config: ConfigDict, step: int, **facts) -> None:
    """Writes, together, the description of a run that is about to train; nothing is written before that.

    `config.json` is its config. If that differs from the previous config, the previous one is added to the list in
    `config_history.json`, with the step up to which it applied. `run.json` gets one more entry: command, versions,
    commit, devices, the step, and the given facts. A damaged file is reported and kept beside the new one.

    Args:
      workdir: the run's folder; created if missing.
      config: of this start.
      step: the number of steps done.
      **facts: JSON values for run.json.

    Raises:
      UserError: the workdir cannot be written.
    """
    workdir = Path(workdir)
    paths = {name: workdir / f"{name}.json" for name in ("config", "config_history", "run")}
    new = json.loads(json.dumps(config.to_dict()))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        before = _read_or_set_aside(paths["config"], lambda value: schema.config(value) and renamed(value))
        runs = _read_or_set_aside(paths["run"], schema.run_entries) or []
        files = {paths["run"]: json_writer([*runs, _entry(step, facts)]), paths["config"]: json_writer(new)}
        old = dict(fields(ConfigDict(before))) if before else {}
        changed = [name for name, value in fields(ConfigDict(new)) if old and old.get(name, value) != value]
        if changed:
            say(f"the config differs from the run's previous one in: {', '.join(changed)}")
            earlier = _read_or_set_aside(paths["config_history"], schema.history) or []
            entry = {"until_step": step, "config": before}
            if not earlier or earlier[-1] != entry:
                files = {paths["config_history"]: json_writer([*earlier, entry])} | files
        replace_together(files)
    except OSError as e:
        where = e.filename if e.filename and ".json" in str(e.filename) else workdir
        raise UserError(f"{where}: cannot be written ({reason(e)}); free disk space or give another --workdir") from e


_OF_A_RUN = (
    "checkpoints", "digests", "best.json", "metrics.jsonl", "pictures", "tensorboard", "eval", "crf_search",
    "crf_preset.json", "config.json", "config_history.json",
)  # fmt: skip


def begin_again(workdir: str | Path) -> None:
    """Moves the run in a workdir to `aside/run_1`, or the next number; `run.json` stays.

    Raises:
      UserError: the workdir cannot be written.
    """
    workdir = Path(workdir)
    there = [workdir / name for name in _OF_A_RUN if (workdir / name).exists()]
    if not there:
        return
    number = 1
    while (workdir / "aside" / f"run_{number}").exists():
        number += 1
    aside = workdir / "aside" / f"run_{number}"
    try:
        aside.mkdir(parents=True)
        for path in there:
            os.rename(path, aside / path.name)
    except OSError as e:
        raise UserError(f"{aside}: cannot be written ({reason(e)}); give another --workdir") from e
    say(f"--restart: the contents of {workdir} were moved to {aside}")


def read_config(workdir: str | Path) -> ConfigDict:
    """The config with which a workdir's run was last started.

    Raises:
      UserError: config.json is missing or damaged.
    """
    path = Path(workdir) / "config.json"
    try:
        return schema.config(read_json(path))
    except FileNotFoundError as e:
        raise UserError(f"{path}: is missing; give the workdir of a training run") from e
    except ValueError as e:
        raise UserError(f"{path}: {e}; put it back, or run the training's command again") from e


def config_of(workdir: str | Path, step: int, meta: dict) -> ConfigDict:
    """The config of a checkpoint: the run's last one, with the `model` that the checkpoint was trained with.

    Args:
      workdir: the run's folder.
      step: of the checkpoint.
      meta: the values recorded with it; its `config`, if there is one, replaces a damaged config.json.

    Raises:
      UserError: neither can be used.
    """
    own = _own_config(Path(workdir), step, meta)
    try:
        config = read_config(workdir)
    except UserError as e:
        if own is None:
            raise
        say(f"{e}; the config of checkpoint {step} is used")
        return own
    if own is not None:
        config.model = own.model
    return config


def _own_config(workdir: Path, step: int, meta: dict) -> ConfigDict | None:
    """The config that applied when a checkpoint was written, or None if only config.json can tell."""
    if "config" in meta:
        try:
            return schema.config(meta["config"])
        except ValueError as e:
            raise UserError(f"{workdir}: checkpoint {step}: its config cannot be used: {e}") from e
    try:
        earlier = schema.history(read_json(workdir / "config_history.json"))
        held = next((entry["config"] for entry in earlier if entry["until_step"] >= step), None)
        return schema.config(held) if held else None
    except (FileNotFoundError, ValueError):
        return None


def _read_or_set_aside(path: Path, check):
    """The result of `check` for a JSON file; None if there is none, or if it is damaged and was moved aside."""
    try:
        return check(read_json(path))
    except FileNotFoundError:
        return None
    except ValueError as e:
        say(f"warning: {path}: {e}; it is kept as {set_aside(path).name}, and the run continues without it")
        return None


def _entry(step: int, facts: dict) -> dict:
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "deeplab_jax": __version__,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processes": jax.process_count(),
        "cpus": os.cpu_count(),
        "step": step,
        **facts,
    }


def commit() -> str:
    """The commit of the source checkout, with + if it has changes, or "" outside one."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            run = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    if not git("ls-files", Path(__file__).name):  # the package is installed within another project's checkout
        return ""
    head = git("rev-parse", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
