"""Commands called in this process: the flags, messages and exit status of `python -m`, without starting Python."""

import contextlib
import importlib
import io
import os
from typing import NamedTuple

from absl import flags

from deeplab_jax import cli


class Done(NamedTuple):
    """The outcome of a command: its exit status and output."""

    returncode: int
    stdout: str
    stderr: str


def call(command: str, *arguments: object) -> Done:
    """Runs `python -m deeplab_jax.COMMAND ARGUMENTS` in this process, and restores environment and flags."""
    module = importlib.import_module(f"deeplab_jax.{command}")
    others = {name: flags.FLAGS[name] for name in _of_commands()}  # of a test that called another command
    for name in others:
        delattr(flags.FLAGS, name)
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
        for flag in others.values():
            flags.DEFINE_flag(flag, module_name="deeplab_jax")
        os.environ.clear()
        os.environ.update(environment)
    assert isinstance(status, int), status
    return Done(status, out.getvalue(), err.getvalue())


def _of_commands() -> list[str]:
    """Names of the flags that commands have defined in this process."""
    by_module = flags.FLAGS.flags_by_module_dict()
    return sorted({flag.name for module, own in by_module.items() if module.startswith("deeplab_jax") for flag in own})
