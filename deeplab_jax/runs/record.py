"""Reading a run's record, metrics.jsonl: every readable row, regardless of damage elsewhere."""

import json
import math
from pathlib import Path
from typing import NamedTuple

from deeplab_jax.files import reason


class Record(NamedTuple):
    """The contents of a record.

    Attributes:
      rows: each {"step": n, name: value, ...}, in the file's order.
      problem: what is wrong with the rest, or "". A last line cut short by a kill does not count as damage.
    """

    rows: list[dict]
    problem: str = ""


def read_record(path: str | Path) -> list[dict]:
    """The readable rows of a metrics.jsonl; see `inspect_record`."""
    return inspect_record(path).rows


def inspect_record(path: str | Path) -> Record:
    """Reads a metrics.jsonl; a missing file has no rows, and is not a problem."""
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            return Record([], "is not a file")
        content = path.read_bytes()
    except FileNotFoundError:
        return Record([])
    except OSError as e:
        return Record([], f"cannot be read ({reason(e)})")
    *lines, rest = content.split(b"\n")
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        row = _row(line)
        if row is None:
            bad.append(number)
        else:
            rows.append(row)
    if rest and (row := _row(rest)) is not None:
        rows.append(row)
    if not bad:
        return Record(rows)
    where = f"line {bad[0]}" if len(bad) == 1 else f"{len(bad)} lines, the first of them {bad[0]},"
    return Record(rows, f"{where} cannot be read")


def _row(line: bytes) -> dict | None:
    """The row of one line, or None if it is not a row: a step and numbers that can be plotted."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or not is_count(row.get("step")):
        return None
    return row if all(_is_number(value) for value in row.values()) else None


def is_count(value: object) -> bool:
    """Whether a value read from JSON is a whole number of at least 0 that fits 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_number(value: object) -> bool:
    """Numbers that fit a float; a loss may be NaN or infinite if such steps are skipped."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or math.log2(abs(value) + 1) < 1024
