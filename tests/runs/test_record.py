"""Every row of a record that can be read is read."""

import json

import pytest

from deeplab_jax.runs.record import inspect_record, read_record
from deeplab_jax.runs.reporting import Reporter

ROWS = [{"step": n, "train/loss": 1 / n} for n in range(1, 7)]
BAD = {
    "cut": b'{"step": 3, "train',
    "not UTF-8": b'{"step": 3, "\xff": 1}',
    "null": b"null",
    "an empty object": b"{}",
    "empty": b"",
    "a list": b"[1, 2]",
    "no step": b'{"train/loss": 1}',
    "a step of text": b'{"step": "3"}',
    "a step of true": b'{"step": true}',
    "a text for a number": b'{"step": 3, "train/loss": "1"}',
    "a number of 400 digits": b'{"step": 3, "train/loss": 1' + b"0" * 400 + b"}",
    "deep": b"[" * 100_000,
}


def write(path, lines):
    path.write_bytes(b"".join(line + b"\n" for line in lines))


@pytest.mark.parametrize("bad", BAD)
def test_rows_around_a_bad_line_are_kept(tmp_path, bad):
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[2] = BAD[bad]
    write(tmp_path / "metrics.jsonl", lines)
    found = inspect_record(tmp_path / "metrics.jsonl")
    assert found.rows == ROWS[:2] + ROWS[3:]
    assert found.problem == "line 3 cannot be read"


def test_a_last_line_cut_by_a_kill_is_no_damage(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"step": 2, "tra')
    assert inspect_record(tmp_path / "metrics.jsonl") == ([ROWS[0]], "")


def test_nothing_there_has_no_rows_and_a_folder_is_a_problem(tmp_path):
    assert inspect_record(tmp_path / "metrics.jsonl") == ([], "")
    (tmp_path / "metrics.jsonl").mkdir()
    assert inspect_record(tmp_path / "metrics.jsonl") == ([], "is not a file")


def test_a_diverged_run_has_losses_that_are_not_finite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": Infinity}\n')
    assert [row["step"] for row in read_record(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_damaged_record_stays_beside_the_one_that_goes_on(tmp_path, capfd):
    lines = [json.dumps(row).encode() for row in ROWS]
    lines[1] = b"\xff\xfe"
    write(tmp_path / "metrics.jsonl", lines)
    damaged = (tmp_path / "metrics.jsonl").read_bytes()
    Reporter(tmp_path, 5, 30).close()
    assert [row["step"] for row in read_record(tmp_path / "metrics.jsonl")] == [1, 3, 4, 5]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damaged
    assert "metrics.jsonl: line 2 cannot be read; its 5 readable rows are kept" in capfd.readouterr().err


def test_a_record_that_is_gone_is_said(tmp_path, capfd):
    Reporter(tmp_path, 5, 30).close()
    assert "metrics.jsonl: is missing; the record begins again after step 5" in capfd.readouterr().err
