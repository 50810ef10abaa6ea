"""What a workdir says about where its results came from."""

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
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_json
from deeplab_jax.old_fields import renamed
from deeplab_jax.version import __version__

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets", "grain", "clu")


def open_workdir(workdir: str | Path, config: ConfigDict, say) -> None:
    """Creates the workdir and writes `config.json`; on a rerun, tells which fields differ from the first time.

    Raises:
      UserError: the workdir cannot be written.
    """
    workdir = Path(workdir)
    path = workdir / "config.json"
    new = json.loads(json.dumps(config.to_dict()))
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            old = dict(fields(ConfigDict(renamed(json.loads(path.read_text())))))
            changed = [n for n, v in fields(ConfigDict(new)) if old.get(n, v) != v]
            if changed:
                say(f"the config differs from the run's so far in: {', '.join(changed)}")
        write_json(path, new)
    except OSError as e:
        raise UserError(f"{workdir}: cannot be written ({e.strerror or e}); give another --workdir") from e


def record_run(workdir: str | Path, **facts) -> None:
    """Appends one entry to `run.json`: command, versions, commit, devices, and the facts given.

    Raises:
      UserError: it cannot be written.
    """
    path = Path(workdir) / "run.json"
    runs = json.loads(path.read_text()) if path.is_file() else []
    devices = jax.devices()
    runs.append(
        {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "deeplab_jax": __version__,
            "commit": commit(),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in _PACKAGES},
            "devices": [f"{d.platform}:{d.device_kind}" for d in devices],
            "processes": jax.process_count(),
            "cpus": os.cpu_count(),
            **facts,
        }
    )
    try:
        write_json(path, runs)
    except OSError as e:
        raise UserError(
            f"{path}: cannot be written ({e.strerror or e}); free disk space or give another --workdir"
        ) from e


def commit() -> str:
    """The commit of the source checkout, with + where it has changes, or "" outside one."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        try:
            run = subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return run.stdout.strip() if run.returncode == 0 else ""

    head = git("rev-parse", "HEAD")
    return head + ("+" if head and git("status", "--porcelain", "--untracked-files=no") else "")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
