"""Training as processes of their own that need not import: forked by a server that has imported everything.

Imports take most of a short run's time until its first steps. The forked process has done its imports and nothing else:
no backend of JAX, no thread. It runs `deeplab_jax.main` as `python -m` does, has its own process number, and meets
signals as any other process. It ends as a process of `multiprocessing` does, without Python's own end.
"""

import contextlib
import importlib
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver, get_context
from pathlib import Path
from unittest import mock

PRELOADED = (
    "jax", "optax", "orbax.checkpoint", "grain", "tensorflow", "clu.metric_writers", "clu.periodic_actions",
    "tensorflow_datasets", "deeplab_jax.training.loop", "deeplab_jax.training.termination", "deeplab_jax.config",
    "deeplab_jax.evaluation.workdir", "deeplab_jax.configs.shapes", "runpy",
)  # fmt: skip


def start_server(tensorflow: bool = True) -> None:
    """Starts the server, which imports in the environment that this process has now.

    Args:
      tensorflow: without it, its processes are as if it were not installed, and begin sooner.
    """
    # Threads of OpenBLAS would be lost by forking; the server does not inherit this process's search path.
    path = [p for p in sys.path if p]
    if not tensorflow:
        path.insert(0, str(Path(__file__).parents[1] / "without_tensorflow"))
    with mock.patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(path), "OPENBLAS_NUM_THREADS": "1"}):
        get_context("forkserver").set_forkserver_preload(["tests.training.forked_imports"])
        forkserver.ensure_running()


def stop_server() -> None:
    """Stops the server; another test may need one that has imported other things."""
    forkserver._forkserver._stop()


class Forked:
    """A process that trains, as far as this file needs it like `subprocess.Popen`; its stderr goes to a file.

    Args:
      arguments: of `deeplab_jax.main`.
      err: where its stderr goes; its stdout goes nowhere.
      environment: changes to that of the server; JAX has been imported, and has not begun.
      work: what it does with the arguments.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        err: Path,
        environment: Mapping[str, str] | None = None,
        work: Callable[[list[str]], None] | None = None,
    ):
        self._err = err
        details = ([*arguments], str(err), dict(environment or {}), work or run_main)
        self._process = get_context("forkserver").Process(target=begin, args=details)
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


def begin(arguments: list[str], err: str, environment: dict[str, str], work: Callable[[list[str]], None]) -> None:
    """The life of a forked process."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ.update(environment)
    work(arguments)


def run_main(arguments: list[str]) -> None:
    """`python -m deeplab_jax.main`."""
    sys.argv = ["main", *arguments]
    runpy.run_module("deeplab_jax.main", run_name="__main__", alter_sys=True)


def preload() -> None:
    """The work of the server."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
