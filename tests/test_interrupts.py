"""Ctrl-C at any moment: one line, status 130."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A command that waits at a given point: in its imports, in its work, or in Python's own shutdown.
COMMAND = """
import sys
if __name__ == "__main__":
    sys.argv[:1], argv = ["-m"], sys.argv
    sys.orig_argv = ["python", "-m", "deeplab_jax.main"]
import deeplab_jax
sys.argv = argv
import atexit, time
from deeplab_jax import cli
where = sys.argv.pop()
def wait():
    print(where, flush=True)
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        if where != "library":
            raise
        raise ImportError("initialization failed")  # as C code in the middle of an import does
if where == "import":
    wait()
if where == "end":
    atexit.register(wait)
def main(argv):
    if where in ("work", "library"):
        wait()
main.__module__ = "__main__"
cli.run(main)
"""


@pytest.mark.parametrize("where", ["import", "work", "library", "end"])
def test_ctrl_c_is_one_line_and_130(where):
    env = os.environ | {"DEEPLAB_HUGE_PAGES": "off", "DEEPLAB_COMPILATION_CACHE": "off", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, where], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    assert process.stdout.readline().strip() == where
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


SWALLOWING = """
import time
try:
    print("swallowing", flush=True)
    time.sleep(20)
except BaseException:
    print("swallowed", flush=True)
"""


@pytest.mark.parametrize("preparing", [False, True])
def test_an_import_that_swallows_exceptions_does_not_swallow_ctrl_c(tmp_path, preparing):
    """Some of NumPy's and JAX's do; what is imported late meets the handlers of a command, and of a training."""
    (tmp_path / "swallowing.py").write_text(SWALLOWING)
    code = """
        from deeplab_jax import cli
        from deeplab_jax.training.termination import interruptible
        def main(argv):
            if argv:
                with interruptible("stopped"):
                    import swallowing
            import swallowing
        main.__module__ = "__main__"
        cli.run(main)
    """
    env = os.environ | {"DEEPLAB_COMPILATION_CACHE": "off", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-c", textwrap.dedent(code), *["preparing"] * preparing]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout.readline() == "swallowing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "Ctrl-C: stopped\n" if preparing else "interrupted\n")
