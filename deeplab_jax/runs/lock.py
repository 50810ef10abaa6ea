"""One writer per workdir: a lock that lives as long as its process, however that ends."""

import contextlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from deeplab_jax.console import say
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, reason, write_json
from deeplab_jax.runs import processes

_LOCK, _HOLDER = ".writer.lock", ".writer.json"


@contextlib.contextmanager
def writing(workdir: str | Path) -> Iterator[None]:
    """Holds the right to write a workdir; the same process may ask again inside. Readers need nothing of the kind.

    The lock is the operating system's (`filelock`), on the file `.writer.lock`: a kill frees it. `.writer.json` says
    which process of which host has it. Of the processes of one job, the first holds it for all.

    Raises:
      UserError: another process is writing, which is named, or the folder cannot be written.
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
            f"{workdir}: {_holder(workdir)} is writing there; wait for its end, or give another --workdir"
        ) from e
    except NotImplementedError:
        say(f"warning: {workdir}: this file system has no locks; see to it that no second command writes there")
        yield
        return
    except OSError as e:
        raise UserError(f"{workdir}: cannot be written ({reason(e)}); give another --workdir") from e
    try:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):  # a courtesy to the second; a full disk is told of elsewhere
                write_json(workdir / _HOLDER, {"host": socket.gethostname(), "pid": os.getpid()})
        yield
    finally:
        if lock.lock_counter == 1:
            with contextlib.suppress(OSError):
                (workdir / _HOLDER).unlink(missing_ok=True)
        lock.release()


def check_can_write(workdir: str | Path) -> None:
    """Tells before long preparations what `writing` would find out after them; leaves nothing behind.

    Raises:
      UserError: as `writing`.
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
