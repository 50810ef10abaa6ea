"""SIGTERM: the first one asks for a tidy end, the second one ends the process at once, whatever it is doing."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

TERMINATED = 143  # 128 + SIGTERM, which schedulers read as "asked to stop"


class Terminated(SystemExit):
    """SIGTERM arrived; the state was saved."""


class TermSignal:
    """Notes the first SIGTERM; a second one ends the process at once.

    Python runs a signal's handler between two of its own instructions, so not while the main thread is inside XLA. A
    thread of ours therefore counts the signals too: Python writes a byte to the wake-up socket the moment one arrives.

    Attributes:
      arrived: whether the first one was noted.
    """

    def __init__(self):
        self.arrived = False
        self._raises = False
        self._before = None
        self._wakeup_before = -1
        self._sockets: tuple[socket.socket, ...] = ()  # the thread's end, and Python's

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, the first SIGTERM raises `Terminated` at once: for what the next run does again anyway."""
        self._raises = True
        try:
            if self.arrived:
                raise Terminated(TERMINATED)
            yield
        finally:
            self._raises = False

    def __enter__(self) -> "TermSignal":
        try:
            self._before = signal.signal(signal.SIGTERM, self._handle)
        except ValueError:  # not the main thread (a notebook, a test): no handler
            return self
        ours, pythons = socket.socketpair()
        pythons.setblocking(False)
        self._sockets = (ours, pythons)
        self._wakeup_before = signal.set_wakeup_fd(pythons.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=_count, args=(ours,), daemon=True, name="sigterm").start()
        return self

    def __exit__(self, *exc) -> None:
        if not self._sockets:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)
        signal.set_wakeup_fd(self._wakeup_before)
        self._sockets[1].close()  # the thread reads the end of the stream, and closes the other side
        self._sockets = ()

    def _handle(self, number, frame) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.arrived = True
        if self._raises:
            raise Terminated(TERMINATED)


def _count(stream: socket.socket) -> None:
    """Reads the number of each signal that arrives; ends the process at the second SIGTERM."""
    seen = 0
    with stream:
        while data := stream.recv(64):
            seen += data.count(signal.SIGTERM)
            if seen > 1:
                os._exit(TERMINATED)
