"""Ctrl-C while a command is still importing: one line and status 130 at any point.

The first import of every command (see `deeplab_jax/__init__.py`), so it imports nothing slow.
"""

import contextlib
import os
import signal
import sys
from types import FrameType

STATUS = 130  # 128 + SIGINT
_LINE = b"interrupted\n"


def starts_a_command() -> bool:
    """Whether Python was started as `python -m deeplab_jax.NAME` and is about to import that module."""
    words = getattr(sys, "orig_argv", [])
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return sys.argv[:1] == ["-m"] and module.startswith("deeplab_jax.")


def end_at_once() -> None:
    """From here on Ctrl-C ends the process at once: during imports nothing needs cleaning up, and C code may turn the
    exception into others."""
    signal.signal(signal.SIGINT, lambda number, frame: now())


def now(status: int = STATUS, line: bytes = _LINE) -> None:
    """Ends the process without Python's own shutdown, whose handlers another Ctrl-C could interrupt."""
    if line:
        with contextlib.suppress(OSError):  # its reader is gone, as a pipe's is after the same Ctrl-C
            os.write(2, line)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, RuntimeError):
            continue
    os._exit(status)


def importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where a signal's handler was called."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


class Interruptible:
    """From here on the first Ctrl-C raises KeyboardInterrupt, so that open resources are closed; the second ends at
    once.

    Attributes:
      arrived: whether there was one; C code may turn the exception into another one.
    """

    def __init__(self):
        self.arrived = False

    def install(self) -> None:
        """Sets the handler; does nothing outside the main thread."""
        try:
            signal.signal(signal.SIGINT, self._handle)
        except ValueError:
            return
        before = sys.unraisablehook
        # Inside a callback from C code the exception is printed and swallowed; this then counts as a second one.
        sys.unraisablehook = lambda e: now() if isinstance(e.exc_value, KeyboardInterrupt) else before(e)

    def _handle(self, number, frame) -> None:
        if self.arrived or importing(frame):  # C code that is imported swallows the exception, or crashes
            now()
        self.arrived = True
        raise KeyboardInterrupt
