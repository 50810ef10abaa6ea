"""The measurements of a search: counts by setting and image, in files, so that a stopped search can continue."""

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.files import reason, remedy, write_text


class Counts(NamedTuple):
    """Per class: correct pixels, pixels of the truth, predicted pixels; of all valid pixels or of a trimap."""

    hit: np.ndarray
    truth: np.ndarray
    predicted: np.ndarray

    @classmethod
    def of(cls, matrix: np.ndarray) -> "Counts":
        """From a confusion matrix [C, C], rows the truth."""
        return cls(np.diagonal(matrix).copy(), matrix.sum(1), matrix.sum(0))


class Keyed(Protocol):
    """A setting of the search (`grid.Candidate`), identified by a text."""

    @property
    def key(self) -> str: ...


class Ledger:
    """Results by (setting, image), one JSON line each, appended as they are measured; a torn last line is ignored.

    Args:
      path: the file.
      about: what the results are valid for (checkpoint, images, ...); a ledger about anything else is emptied.
      index: of this process, if several search: all except the first have files of their own beside `path`.
    """

    def __init__(self, path: Path, about: Mapping, index: int = 0):
        self.results: dict[tuple[str, int], dict[str, Counts]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._first, self._path = path, path.with_stem(f"{path.stem}-{index}") if index else path
        self._head = json.dumps(about, sort_keys=True) + "\n"
        good = self._read(self._path)
        write_text(self._path, self._head + "".join(good))
        self.refresh()
        self._old = set(self.results)
        self._file = self._path.open("a")

    def refresh(self) -> None:
        """Reads the measurements of other processes."""
        for path in [self._first, *self._first.parent.glob(f"{self._first.stem}-*{self._first.suffix}")]:
            if path != self._path:
                self._read(path)

    def gather(self) -> None:
        """Collects the results of all processes in the first one's file."""
        self.refresh()
        self.close()
        lines = "".join(self._line(key, image, counts) for (key, image), counts in self.results.items())
        write_text(self._first, self._head + lines)
        for path in self._first.parent.glob(f"{self._first.stem}-*{self._first.suffix}"):
            path.unlink(missing_ok=True)

    def _read(self, path: Path) -> list[str]:
        """Reads the results of a file about the same; returns their lines."""
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        good = []
        for line in lines[1:] if lines and lines[0] == self._head else ():
            try:
                key, image, counts = json.loads(line)
                if key is not None and line.endswith("\n"):
                    self.results[key, image] = {k: Counts(*map(np.asarray, v)) for k, v in counts.items()}
                    good.append(line)
            except (ValueError, TypeError):
                continue
        return good

    @staticmethod
    def _line(key: str, image: int, counts: dict[str, Counts]) -> str:
        return json.dumps([key, image, {kind: [column.tolist() for column in c] for kind, c in counts.items()}]) + "\n"

    def add(self, setting: Keyed | None, image: int, counts: dict[str, Counts]) -> None:
        """Stores one result; raises `UserError` if it cannot be written."""
        key = setting.key if setting else ""
        self.results[key, image] = counts
        try:
            self._file.write(self._line(key, image, counts))
            self._file.flush()
        except OSError as e:
            raise UserError(f"{self._path}: cannot be written ({reason(e)}); {remedy(e)}") from e

    def get(self, setting: Keyed | None, image: int) -> dict[str, Counts] | None:
        return self.results.get((setting.key if setting else "", image))

    def recalled(self, setting: Keyed | None, image: int) -> bool:
        """Whether an earlier search measured this; True only once, so that it is not counted again."""
        key = (setting.key if setting else "", image)
        known = key in self._old
        self._old.discard(key)
        return known

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written has been reported
            self._file.close()
