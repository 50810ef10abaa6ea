"""Processes that share a command's files without collectives: which process handles which file, and the outcome.

Each of `count` processes handles every `count`-th file of one list. They meet in a folder that all of them see: each
keeps a small file there, which changes while the process lives and holds its report when its share is done. The first
process reads them and writes the result with which all end. A process that dies does not stop the others.
"""

import contextlib
import hashlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, write_json
from deeplab_jax.runs import processes

Item = TypeVar("Item")
AGAIN = "run the same command again"


@dataclass(frozen=True)
class Report:
    """The outcome of a process's share.

    Attributes:
      index: of the process.
      found: its report; None if it ended before reporting.
      reason: in that case, a clause that names the process and how it ended.
    """

    index: int
    found: dict[str, Any] | None
    reason: str = ""


def absence(report: Report, files: int, left: Sequence[Path]) -> str:
    """The sentence about a process whose own report does not count.

    Args:
      report: its report.
      files: the number of files in its share.
      left: its files that are not done.
    """
    why = report.reason or f"process {report.index} was given other files or settings"
    if not left:
        return f"{why}; all of its {files} files are done"
    return f"{why}; {len(left)} of its {files} files are missing, the first {left[0]}; {AGAIN}"


def digest(facts: Any) -> str:
    """32 characters that identify JSON values."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


class Job:
    """One process and its place among those of a job.

    Attributes:
      index: of this process, from 0.
      count: the number of processes.
    """

    def __init__(self, index: int = 0, count: int = 1):
        """Raises `UserError` if `index` is not below `count`."""
        if not 0 <= index < count:
            raise UserError(f"--process_id={index}: must be from 0 to {count - 1}, because --num_processes={count}")
        self.index, self.count = index, count
        self._meeting: _Meeting | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints the summary."""
        return self.index == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This process's part of a list that is the same in all processes.

        >>> Job(1, 3).share(["a", "b", "c", "d", "e"])
        ['b', 'e']
        """
        return self.share_of(self.index, items)

    def share_of(self, index: int, items: Sequence[Item]) -> list[Item]:
        """The part of process `index`."""
        return list(items[index :: self.count])

    @contextlib.contextmanager
    def meeting(self, folder: str | os.PathLike) -> Iterator[None]:
        """Inside, the processes find each other through files in `folder`, and `conclude` may be called.

        The folder is created, and removed by the first process at the end. A single process creates none.
        """
        if self.count == 1:
            yield
            return
        self._meeting = _Meeting(Path(folder), self.index, self.count)
        try:
            with self._meeting:
                yield
        finally:
            self._meeting = None

    def owns(self, position: int) -> bool:
        """Whether the item at this position of a list is in this process's share."""
        return position % self.count == self.index

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready` reports that the others have done their part.

        Raises:
          UserError: one of them ended before that.
        """
        if self._meeting is None:
            assert ready(), "a single process has nobody to wait for"
        else:
            self._meeting.wait_until(ready)

    def conclude(self, report: dict[str, Any], sum_up: Callable[[list[Report]], int]) -> int:
        """Reports that this process's share is done, waits for the others, and returns one number in all of them.

        Args:
          report: of this process, JSON values.
          sum_up: called only in the first process, with every process's report; all processes return its result.

        Raises:
          UserError: the first process is gone.
        """
        if self._meeting is None:
            return sum_up([Report(0, report)])
        return self._meeting.first_concludes(report, sum_up) if self.is_first else self._meeting.conclude(report)


@dataclass
class _Peer:
    """Another process as seen in its file: the contents, when they last changed, and whether they ever did."""

    state: dict[str, Any] | None = None
    changed: float = 0.0
    lives: bool = False


class _Meeting:
    """The files of a job's processes; see `Job.meeting`. A thread keeps this process's own changing."""

    def __init__(self, folder: Path, index: int, count: int):
        self._folder, self._index, self._count = folder, index, count
        self._patience = processes.heartbeat_seconds()
        self._every = min(5.0, self._patience / 5)
        self._peers = {k: _Peer() for k in range(count) if k != index}
        self._watched = [0] if index else [*self._peers]
        self._state: dict[str, Any] = {"token": secrets.token_hex(8), "beat": 0, "does": "works"}
        self._state |= {"host": socket.gethostname(), "pid": os.getpid(), "kernel": _kernel()}
        self._lock = threading.Lock()
        self._ends = threading.Event()
        self._waits_since = 0.0
        self._thread = threading.Thread(target=self._keep_alive, daemon=True, name="job")

    def __enter__(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Removes files of an earlier run: later ones are from processes of this run.
            for old in self._folder.iterdir() if self._index == 0 else [self._path(self._index)]:
                if not old.name.startswith("."):  # another process is about to rename it
                    old.unlink(missing_ok=True)
            write_json(self._path(self._index), self._state)
        except OSError as e:
            raise UserError(f"{self._folder}: cannot be written ({e.strerror}), so the processes cannot meet") from e
        if self._index:
            for k in self._watched:
                self._peers[k] = _Peer(self._read(k), time.monotonic())
        self._thread.start()

    def __exit__(self, kind, error, trace) -> None:
        self._ends.set()
        self._thread.join()
        if error is not None:
            text = str(error) if isinstance(error, UserError) else kind.__name__
            self._beat(does="failed", said=text)

    def wait_until(self, ready: Callable[[], bool]) -> None:
        """Like `Job.wait_until`; from the first call on each process watches all others."""
        now = time.monotonic()
        for k in self._peers.keys() - self._watched:
            self._peers[k] = _Peer(self._read(k), now)
        self._watched = [*self._peers]
        self._waits_since = now
        while not ready():
            ended = [self._report(k) for k in self._peers]
            reasons = [report.reason for report in ended if report and report.found is None]
            if reasons and not ready():  # its last work counts
                raise UserError(f"{'; '.join(reasons)}; {AGAIN}, which continues from here")
            self._pause(True)

    def first_concludes(self, report: dict[str, Any], sum_up: Callable[[list[Report]], int]) -> int:
        """Waits until each of the others has reported or is gone, and writes the result for them."""
        self._beat()
        self._waits_since = time.monotonic()
        reports = {0: Report(0, report)}
        while len(reports) < self._count:
            for k in self._peers:
                if k not in reports and (found := self._report(k)):
                    reports[k] = found
            self._pause(len(reports) < self._count)
        result = sum_up([reports[k] for k in range(self._count)])
        waiting = [k for k, found in reports.items() if k and found.found is not None]
        tokens = {str(k): (self._peers[k].state or {}).get("token") for k in waiting}
        self._beat(does="ended", result=result, heard=tokens)
        while any(self._read(k) is not None and not self._gone(k) for k in waiting):  # they remove their files
            self._pause(True)
        self._ends.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            for path in self._folder.iterdir():
                path.unlink(missing_ok=True)
            self._folder.rmdir()
        return result

    def conclude(self, report: dict[str, Any]) -> int:
        """Reports, waits for the first process's result, and removes its file."""
        self._beat(does="reports", report=report)
        self._waits_since = time.monotonic()
        while True:
            gone = self._gone(0)
            self._look(0)
            first = self._peers[0].state or {}
            heard = first.get("heard")
            if isinstance(heard, dict) and heard.get(str(self._index)) == self._state["token"]:
                self._ends.set()
                self._thread.join()
                with contextlib.suppress(OSError):
                    self._path(self._index).unlink(missing_ok=True)
                return int(first.get("result", 1))
            if self._peers[0].lives and first.get("does") == "failed":
                gone = f"{self._name(0)} ended ({first.get('said')})"
            if gone:
                raise UserError(f"{gone}; the files of process {self._index} are done, the summary is not; {AGAIN}")
            self._pause(True)

    def _report(self, k: int) -> Report | None:
        """Process k's report, if it has ended; in this order, a report written just before the end is not missed."""
        gone = self._gone(k)
        self._look(k)
        if not self._peers[k].lives:  # what it says is an earlier run's
            return Report(k, None, gone) if gone else None
        state = self._peers[k].state or {}
        if state.get("does") == "reports" and isinstance(state.get("report"), dict):
            return Report(k, state["report"])
        if state.get("does") == "failed":
            return Report(k, None, f"{self._name(k)} ended ({state.get('said')})")
        return Report(k, None, gone) if gone else None

    def _gone(self, k: int) -> str:
        """How process k ended without a report, as a clause; "" while it may be alive."""
        peer = self._peers[k]
        silent = time.monotonic() - max(peer.changed, 0.0 if peer.lives else self._waits_since)
        if peer.lives and peer.state and _is_dead(peer.state):
            return f"{self._name(k)} is gone"
        if silent <= self._patience:
            return ""
        words = f"gave no sign for {silent:.0f} seconds" if peer.lives else f"did not appear in {silent:.0f} seconds"
        return f"{self._name(k)} {words}"

    def _name(self, k: int) -> str:
        state = self._peers[k].state
        known = self._peers[k].lives and state
        return f"process {k}" + (f" (number {state.get('pid')} on {state.get('host')})" if known and state else "")

    def _look(self, k: int) -> None:
        found, peer = self._read(k), self._peers[k]
        if found is not None and found != peer.state:
            self._peers[k] = _Peer(found, time.monotonic(), True)

    def _read(self, k: int) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            found = read_json(self._path(k))
            return found if isinstance(found, dict) else None
        return None

    def _keep_alive(self) -> None:
        while not self._ends.wait(self._every):
            self._beat()
            for k in self._watched:
                self._look(k)

    def _beat(self, **news: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # if the disk is full, the next beat tries again
            self._state |= {"beat": self._state["beat"] + 1} | news
            write_json(self._path(self._index), self._state)

    def _path(self, k: int) -> Path:
        return self._folder / f"{k}-of-{self._count}.json"

    def _pause(self, more: bool) -> None:
        if more:
            time.sleep(min(0.5, self._every / 2))


def _kernel() -> str:
    """Identifies the kernel and PID namespace: equal for processes whose process numbers are comparable."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _is_dead(state: dict[str, Any]) -> bool:
    """Whether a process is known to have ended; False for processes elsewhere."""
    if not _kernel() or state.get("kernel") != _kernel():
        return False
    try:
        return Path(f"/proc/{state['pid']}/stat").read_text().rpartition(")")[2].split()[0] in ("Z", "X")
    except FileNotFoundError:
        return True
    except (OSError, IndexError):
        return False
