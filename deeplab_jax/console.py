"""What commands print while they work: lines on stderr, times, and how long the rest will take."""

import sys
import time


def say(message: str) -> None:
    """Prints one line of progress on stderr; results alone go to stdout."""
    print(message, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, seconds = divmod(round(max(seconds, 0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Meter:
    """Counts what is done, and estimates how long the rest will take.

    Attributes:
      total: how many there are to do.
      done: how many are done, those included that were done before.
      measured: how many were done since, on which the estimate rests.
    """

    def __init__(self, total: int, every: float = 5.0):
        """`every`: seconds between two lines that are due; 0 = each time."""
        self.total, self.done = total, 0
        self._every, self.measured = every, 0
        self._start = self._said = time.monotonic()

    def known(self, count: int) -> None:
        """Counts what was done before and cost nothing now."""
        self.done += count

    def tick(self, count: int = 1) -> bool:
        """Counts what was done now; returns whether a line about it is due."""
        self.done += count
        self.measured += count
        now = time.monotonic()
        due = now - self._said >= self._every or self.done == self.total
        if due:
            self._said = now
        return due

    @property
    def per_second(self) -> float:
        """How many were done in a second, on average."""
        return self.measured / max(time.monotonic() - self._start, 1e-9)

    @property
    def left(self) -> str:
        """The time that the rest will take, such as "1:15 left"."""
        return f"{clock(max(self.total - self.done, 0) / max(self.per_second, 1e-9))} left"
