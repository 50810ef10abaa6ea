"""Of a full disk one sentence is read, and not the tracebacks of libraries' threads."""

import logging
import sys
import threading

import pytest

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
    """C++ threads print exceptions of their callbacks through sys.excepthook."""
    seen = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: seen.append(error))
    closed, other = RuntimeError("Event loop is closed"), RuntimeError("Event loop stopped")
    with reported_once():
        for error in (closed, other):
            sys.excepthook(type(error), error, None)
    assert seen == [other]
    sys.excepthook(RuntimeError, closed, None)
    assert seen == [other, closed]
