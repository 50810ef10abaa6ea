"""Output of commands while they work: lines on stderr, times, and the time left."""

import os
import sys
import time

_outlives = False


def say(message: str) -> None:
    """Prints one line of progress on stderr; only results go to stdout."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        if not _outlives:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def outlive_readers() -> None:
    """From here on lines that nobody reads any more are no error: the end of a training must be saved."""
    global _outlives
    _outlives = True


def shown(text: str | os.PathLike) -> str:
    """Text or a path, safe to print: control characters, direction marks and bytes that are not UTF-8 are escaped.

    >>> shown("a\\nb"), shown("\\u202egpj.exe"), shown("Straße")
    ('a\\\\nb', '\\\\u202egpj.exe', 'Straße')
    """
    given = os.fspath(text)
    given = given.decode("utf-8", "surrogateescape") if isinstance(given, bytes) else given
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in given)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Meter:
    """Counts finished items, and estimates the time for the rest.

    Attributes:
      total: the number of items.
      done: the number of finished items, including earlier ones.
      measured: the number finished since the start, on which the estimate is based.
    """

    def __init__(self, total: int, every: float = 5.0):
        """`every`: seconds between two lines; 0 = a line for each item."""
        self.total, self.done = total, 0
        self._every, self.measured = every, 0
        self._start = self._said = time.monotonic()

    def known(self, count: int) -> None:
        """Counts items finished earlier."""
        self.done += count

    def tick(self, count: int = 1) -> bool:
        """Counts newly finished items; returns whether a line is due."""
        self.done += count
        self.measured += count
        now = time.monotonic()
        due = now - self._said >= self._every or self.done == self.total
        if due:
            self._said = now
        return due

    @property
    def per_second(self) -> float:
        """Items finished per second, on average."""
        return self.measured / max(time.monotonic() - self._start, 1e-9)

    @property
    def left(self) -> str:
        """The time left, such as "1:15 left"."""
        return f"{clock(max(self.total - self.done, 0) / max(self.per_second, 1e-9))} left"
