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
    first error ends orbax's event loop, and each of tensorstore's threads that uses it afterwards prints that.
    """
    before, before_elsewhere = threading.excepthook, sys.excepthook

    def hook(args) -> None:
        if not _is_full(args.exc_value):
            before(args)

    def elsewhere(kind, error, traceback) -> None:
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed") and not _is_full(error):
            before_elsewhere(kind, error, traceback)

    def passes(record: logging.LogRecord) -> bool:
        return not (record.exc_info and _is_full(record.exc_info[1])) and "no space left" not in str(record.msg).lower()

    loggers = [logging.getLogger(name) for name in ("asyncio", "absl", "jax", "orbax", "tensorflow")]
    threading.excepthook, sys.excepthook = hook, elsewhere
    for logger in loggers:
        logger.addFilter(passes)
    try:
        yield
    finally:
        threading.excepthook, sys.excepthook = before, before_elsewhere
        for logger in loggers:
            logger.removeFilter(passes)


def _is_full(error: BaseException | None) -> bool:
    return error is not None and reason(error) == "no space left on device"
