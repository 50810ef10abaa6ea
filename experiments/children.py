"""Systems in separate processes: the threads of two frameworks in one process interfere with each other."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

from deeplab_jax.errors import UserError


class Child:
    """A process of an experiment that does a piece of work on each request; see `work_when_asked`.

    Args:
      module: the experiment's, as in `python -m`.
      arguments: its flags, among them the one that makes it a worker.
      devices: virtual CPU devices.
      cache: folder for compiled programs; default: the parent's.

    Attributes:
      facts: its report when it was ready, and "ready", the seconds until then.
    """

    def __init__(self, module: str, *arguments: str, devices: int = 1, cache: str | None = None):
        count = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()}
        if cache:
            env |= {"JAX_COMPILATION_CACHE_DIR": cache}
        command = [sys.executable, "-m", module, *arguments]
        began = time.perf_counter()
        self._process = subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.facts = self._answer() | {"ready": time.perf_counter() - began}

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise UserError("the child process ended early; its error is above")
        return json.loads(line)

    def work(self) -> dict:
        """Waits for one piece of work; returns the child's report."""
        self._process.stdin.write("work\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the process."""
        self._process.stdin.close()
        self._process.wait()


def work_when_asked(work: Callable[[], object], ready: dict, facts: Callable[[], dict] = dict) -> None:
    """The child process: reports `ready`, then works for each line of stdin and reports `facts()`."""
    print(json.dumps(ready), flush=True)
    for _ in sys.stdin:
        work()
        print(json.dumps(facts()), flush=True)
