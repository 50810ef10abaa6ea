"""One writer per workdir: a lock that lives as long as its process, however the process ends."""

import contextlib
import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deeplab_jax.console import say
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, reason, write_json
from deeplab_jax.runs import processes

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_LOCK, _HOLDER = ".writer.lock", ".writer.json"


@contextlib.contextmanager
def writing(workdir: str | Path) -> Iterator[None]:
    """Holds the right to write a workdir; the same process may request it again inside. Readers need no lock.

    The lock is the operating system's (`filelock`), on the file `.writer.lock`: a kill frees it. `.writer.json` names
    the process and host that hold it. The first process of a job holds it for all.

    Raises:
      UserError: another process, which is named, is writing, or the folder cannot be written.
    """
    if not processes.is_first():
        yield
        return
    import filelock

    workdir = Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(str(workdir.resolve() / _LOCK), is_singleton=True)
        lock.acquire(timeout=0)
    except filelock.Timeout as e:
        raise UserError(
            f"{workdir}: {_holder(workdir)} is writing there; wait until it ends, or give another --workdir"
        ) from e
    except (NotImplementedError, OSError) as e:
        if isinstance(e, NotImplementedError) or e.errno in _NO_LOCKS:
            say(f"warning: {workdir}: this file system has no locks; make sure that no second command writes there")
            yield
            return
        raise UserError(f"{workdir}: cannot be written ({reason(e)}); give another --workdir") from e
    try:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):  # only informs the second; a full disk is reported elsewhere
                write_json(workdir / _HOLDER, {"host": socket.gethostname(), "pid": os.getpid()})
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                (workdir / _HOLDER).unlink(missing_ok=True)
        lock.release()


def check_can_write(workdir: str | Path) -> None:
    """Reports, before long preparations, the errors that `writing` would raise after them; leaves nothing behind.

    Raises:
      UserError: like `writing`.
    """
    if not processes.is_first():
        return
    workdir = Path(workdir)
    if (workdir / _LOCK).exists():
        with writing(workdir):
            return
    place = workdir
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    try:
        os.rmdir(tempfile.mkdtemp(dir=place, prefix="."))
    except OSError as e:
        raise UserError(f"{workdir}: cannot be written ({reason(e)}); give another --workdir") from e


def _holder(workdir: Path) -> str:
    try:
        found = read_json(workdir / _HOLDER)
        return f"process {int(found['pid'])} on host {str(found['host'])[:100]!r}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
