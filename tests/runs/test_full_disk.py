"""Of a full disk one sentence is read, and not the tracebacks of libraries' threads."""

import asyncio
import logging
import sys
import threading

import pytest
import tensorstore

from deeplab_jax.runs.full_disk import reported_once


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError(28, "No space left on device"), False),
        (RuntimeError("INTERNAL: Error writing: No space left on device [1]"), False),
        (OSError(13, "Permission denied"), True),
    ],
)
def test_threads_and_loggers_are_quiet_about_a_full_disk_alone(monkeypatch, caplog, error, shown):
    seen = []
    monkeypatch.setattr(threading, "excepthook", lambda args: seen.append(args.exc_value))

    def fail():
        raise error

    with reported_once(), caplog.at_level(logging.ERROR):
        thread = threading.Thread(target=fail)
        thread.start()
        thread.join()
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert seen == ([error] if shown else [])
    assert len(caplog.records) == shown
    thread = threading.Thread(target=fail)  # afterwards all is as it was
    thread.start()
    thread.join()
    assert seen[-1] is error


def test_threads_that_come_to_a_closed_loop_are_quiet(monkeypatch):
    """A callback of tensorstore's that fails, as it calls it when a write has ended."""
    seen: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda args: seen.append(str(args.exc_value)))
    closed = asyncio.new_event_loop()
    closed.close()

    def other(future) -> None:
        raise RuntimeError("Event loop stopped")

    def end_a_write() -> None:
        promise, future = tensorstore.Promise.new()
        future.add_done_callback(lambda future: closed.call_soon_threadsafe(print))
        future.add_done_callback(other)
        promise.set_result(0)

    with reported_once():
        end_a_write()
    assert seen == ["Event loop stopped"]
    end_a_write()
    assert sorted(seen[1:]) == ["Event loop is closed", "Event loop stopped"]
