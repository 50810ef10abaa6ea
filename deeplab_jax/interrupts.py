"""Ctrl-C while a command is still importing: one line and status 130, wherever it comes.

Imported first of all by commands (see `deeplab_jax/__init__.py`), so it imports nothing that takes time.
"""

import os
import signal
import sys

STATUS = 130  # 128 + SIGINT
_LINE = b"interrupted\n"


def starts_a_command() -> bool:
    """Whether Python was started as `python -m deeplab_jax.NAME` and is about to import that module."""
    words = getattr(sys, "orig_argv", [])
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    return sys.argv[:1] == ["-m"] and module.startswith("deeplab_jax.")


def end_at_once() -> None:
    """From here on Ctrl-C ends the process at once: during imports nothing needs tidying, and C code in the middle of
    one turns the exception into others."""
    signal.signal(signal.SIGINT, lambda number, frame: now())


def now(status: int = STATUS, line: bytes = _LINE) -> None:
    """Ends the process without Python's own end, whose handlers a further Ctrl-C would meet in the middle."""
    if line:
        os.write(2, line)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, RuntimeError):
            continue
    os._exit(status)


class Interruptible:
    """From here on the first Ctrl-C raises KeyboardInterrupt, so that what is open is tidied; the second ends at once.

    Attributes:
      arrived: whether there was one: what C code makes of the exception may be another one.
    """

    def __init__(self):
        self.arrived = False

    def install(self) -> None:
        """Sets the handler; in a thread other than the main one there is none to set."""
        try:
            signal.signal(signal.SIGINT, self._handle)
        except ValueError:
            return
        before = sys.unraisablehook
        # Raised inside a callback that C code makes, it is printed and swallowed; then it counts as a second one.
        sys.unraisablehook = lambda e: now() if isinstance(e.exc_value, KeyboardInterrupt) else before(e)

    def _handle(self, number, frame) -> None:
        if self.arrived:
            now()
        self.arrived = True
        raise KeyboardInterrupt
