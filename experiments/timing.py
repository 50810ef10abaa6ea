"""Timing that other work on the machine disturbs little: systems in turn, medians of ratios."""

import os
import statistics
import time
from collections.abc import Callable


def in_turn(systems: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each system in each round, the systems in turn; each must end only when its result is there.

    In its turn a system runs twice and the second run counts: work comes in long rows, and after a pause the first run
    must get back the memory that the system has lent elsewhere meanwhile (two seconds of a step of ResNet-101).
    """
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(rounds):
        for name, run in systems.items():
            run()
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(a: list[float], b: list[float]) -> float:
    """The median over rounds of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def rss_mib() -> float:
    """Resident memory of this process now, MiB."""
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def threads() -> int:
    """Cores that this process may use, which is how many threads XLA takes."""
    return len(os.sched_getaffinity(0))
