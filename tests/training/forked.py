"""Training as processes of their own that need not import: forked by a server that has imported everything.

Imports take most of a short run's time until its first steps. The forked process has done its imports and nothing else:
no backend of JAX, no thread. It runs `deeplab_jax.main` as `python -m` does, has its own process number, and meets
signals as any other process. It ends as a process of `multiprocessing` does, without Python's own end.
"""

import importlib
import os
import runpy
import sys
from collections.abc import Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

PRELOADED = (
    "jax", "optax", "orbax.checkpoint", "grain", "tensorflow", "clu.metric_writers", "clu.periodic_actions",
    "tensorflow_datasets", "deeplab_jax.training.loop", "deeplab_jax.training.termination", "deeplab_jax.config",
    "deeplab_jax.evaluation.workdir", "deeplab_jax.configs.shapes", "runpy",
)  # fmt: skip


def start_server() -> None:
    """Starts the server, which imports in the environment that this process has now."""
    # Threads of OpenBLAS would be lost by forking; the server does not inherit this process's search path.
    path = {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OPENBLAS_NUM_THREADS": "1"}
    with mock.patch.dict(os.environ, path):
        get_context("forkserver").set_forkserver_preload(["tests.training.forked_imports"])
        forkserver.ensure_running()


class Forked:
    """A process that trains, as far as this file needs it like `subprocess.Popen`; its stderr goes to a file.

    Args:
      arguments: of `deeplab_jax.main`.
      err: where its stderr goes; its stdout goes nowhere.
    """

    def __init__(self, arguments: Sequence[str], err: Path):
        self._err = err
        self._process = get_context("forkserver").Process(target=run_main, args=([*arguments], str(err)))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As Popen has it: the negative number of a signal that ended the process."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()

    def wait(self, seconds: float) -> str:
        """Waits for its end; returns what it wrote to stderr."""
        self._process.join(seconds)
        err = self._err.read_text() if self._err.exists() else ""
        assert self.poll() is not None, f"process {self.pid} still runs after {seconds:.0f} s\n{err}"
        return err


def run_main(arguments: list[str], err: str) -> None:
    """The work of a forked process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.argv = ["main", *arguments]
    runpy.run_module("deeplab_jax.main", run_name="__main__", alter_sys=True)


def preload() -> None:
    """The work of the server."""
    for name in PRELOADED:
        importlib.import_module(name)
