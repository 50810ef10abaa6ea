"""SIGTERM and Ctrl-C: the first one requests an orderly end, the second one ends the process at once."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from deeplab_jax import console
from deeplab_jax.console import say
from deeplab_jax.interrupts import importing, now

NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class Terminated(SystemExit):
    """A signal requested the end, and has been reported. The exit status is 128 plus its number: 143 or 130."""

    def __init__(self, number: int):
        super().__init__(128 + number)


class TermSignal:
    """Records the first SIGTERM or SIGINT; a second one ends the process at once.

    Python runs a signal's handler between two of its own instructions, so not while the main thread is inside XLA. A
    separate thread therefore counts the signals too: Python writes a byte to the wake-up socket the moment one arrives.

    Attributes:
      arrived: the number of the first one, or 0.
    """

    def __init__(self) -> None:
        self.arrived = 0
        self._raises = False
        self._sentence = ""  # said where the process ends at once
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}
        self._wakeup_before = -1
        self._sockets: tuple[socket.socket, ...] = ()  # the thread's end, and Python's

    @property
    def name(self) -> str:
        """The name of the signal that arrived."""
        return NAMES.get(self.arrived, "")

    @contextlib.contextmanager
    def interrupting(self, sentence: str = "") -> Iterator[None]:
        """Inside, the first signal raises `Terminated` at once: for work that the next run repeats anyway.

        During an import it ends the process at once, after `sentence` if there is one: C code in an import swallows
        the exception, or crashes.
        """
        self._raises, self._sentence = True, sentence
        try:
            if self.arrived:
                raise Terminated(self.arrived)
            yield
        finally:
            self._raises = False

    def __enter__(self) -> "TermSignal":
        try:
            for number in NAMES:
                self._before[number] = signal.signal(number, self._handle)
        except ValueError:  # not the main thread (a notebook, a test): no handler
            return self
        ours, pythons = socket.socketpair()
        pythons.setblocking(False)
        self._sockets = (ours, pythons)
        self._wakeup_before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_count, args=(ours,), daemon=True, name="signals").start()
        return self

    def __exit__(self, *exc) -> None:
        if not self._sockets:
            return
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._sockets[1].close()  # the thread sees the end of the stream, and closes the other side
        self._sockets = ()

    def _handle(self, number, frame) -> None:
        if self.arrived:
            os._exit(128 + number)
        self.arrived = number
        if self._raises and self._sentence and importing(frame):
            now(128 + number, f"{NAMES[number]}: {self._sentence}\n".encode())
        if self._raises:
            raise Terminated(number)
        # Not through Python's buffers: the handler may have interrupted a write to them.
        line = f"{NAMES[number]}: ending after this step and its checkpoint; a second one ends at once\n"
        console.outlive_readers()  # a pipe's reader, such as tee, ends by the same Ctrl-C
        with contextlib.suppress(OSError):
            os.write(2, line.encode())


@contextlib.contextmanager
def interruptible(sentence: str) -> Iterator[None]:
    """Inside, the first SIGTERM or Ctrl-C raises `Terminated` at once, after `sentence` on stderr."""
    with TermSignal() as stop:
        try:
            with stop.interrupting(sentence):
                yield
        except BaseException:  # C code during an import may turn it into other exceptions
            if not stop.arrived:  # raised, and reported, further inside
                raise
            say(f"{stop.name}: {sentence}")
            raise Terminated(stop.arrived) from None


def _count(stream: socket.socket) -> None:
    """Reads the number of each signal that arrives; ends the process at the second."""
    seen = 0
    with stream:
        while data := stream.recv(64):
            for number in data:
                seen += number in NAMES
                if seen > 1:
                    os._exit(128 + number)
