"""Commands called in this process: the flags, messages and exit status of `python -m`, without starting Python."""

import contextlib
import importlib
import io
import os
from typing import NamedTuple

from absl import flags

from deeplab_jax import cli


class Done(NamedTuple):
    """What a command left: its exit status, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


def call(command: str, *arguments: object) -> Done:
    """Runs `python -m deeplab_jax.COMMAND ARGUMENTS` in this process, and restores environment and flags."""
    module = importlib.import_module(f"deeplab_jax.{command}")
    known, environment = set(flags.FLAGS), dict(os.environ)
    out, err = io.StringIO(), io.StringIO()
    status: object = "did not exit"
    try:
        module.define_flags()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.run(module.main, [command, *map(str, arguments)])
    except SystemExit as e:
        status = e.code
    finally:
        for name in set(flags.FLAGS) - known:
            delattr(flags.FLAGS, name)
        os.environ.clear()
        os.environ.update(environment)
    assert isinstance(status, int), status
    return Done(status, out.getvalue(), err.getvalue())
