"""A full disk is reported once, by the writer; libraries' threads that also fail are kept quiet."""

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

from deeplab_jax.files import reason


@contextlib.contextmanager
def reported_once() -> Iterator[None]:
    """Inside, output of libraries' threads and tasks about a full disk is suppressed.

    orbax, tensorstore and TensorBoard's writer each print a traceback for every array and event, hundreds of them, and
    also raise the error where it is awaited; there it becomes one sentence (see `checkpoints` and `reporting`). The
    first error ends orbax's event loop, and each of tensorstore's threads that uses it afterwards reports that as an
    exception that nobody can catch.
    """
    before, before_elsewhere = threading.excepthook, sys.unraisablehook

    def hook(args) -> None:
        if not _is_full(args.exc_value):
            before(args)

    def elsewhere(args) -> None:
        closed = isinstance(args.exc_value, RuntimeError) and str(args.exc_value) == "Event loop is closed"
        if not closed and not _is_full(args.exc_value):
            before_elsewhere(args)

    def passes(record: logging.LogRecord) -> bool:
        return not (record.exc_info and _is_full(record.exc_info[1])) and "no space left" not in str(record.msg).lower()

    loggers = [logging.getLogger(name) for name in ("asyncio", "absl", "jax", "orbax", "tensorflow")]
    threading.excepthook, sys.unraisablehook = hook, elsewhere
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        threading.excepthook, sys.unraisablehook = before, before_elsewhere
        for logger in loggers:
            logger.removeFilter(passes)


def _is_full(error: BaseException | None) -> bool:
    return error is not None and reason(error) == "no space left on device"
