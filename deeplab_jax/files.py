"""Writing files atomically, and reading JSON that may be damaged."""

import contextlib
import errno
import json
import os
import secrets
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from deeplab_jax.errors import UserError

_LARGEST_JSON = 1 << 28  # bytes


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)` and renames the result to `path`: readers see the old file or the complete new one.

    Args:
      path: the file to write; its folder is created.
      write: writes the temporary file, which has the same suffix and folder.

    Raises:
      UserError: the folder cannot be created or written to.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_together({path: write})
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({reason(e)}); {remedy(e)}") from e


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes JSON atomically; an `OSError` is left to the caller, who knows the consequences of a full disk."""
    replace_together({path: json_writer(value)})


def json_writer(value: object) -> Callable[[Path], object]:
    """A function that writes `value` as JSON to a path; for `replace_together`."""
    text = json.dumps(value, indent=1)
    return lambda path: path.write_text(text, encoding="utf-8")


Place = TypeVar("Place", bound=str | os.PathLike)


def replace_together(writers: Mapping[Place, Callable[[Path], object]]) -> None:
    """Writes several files, all of them to temporary names before the first is renamed to its own.

    If the disk is too full for one of them, all are unchanged and no temporary file remains.

    Args:
      writers: for each path, a function that writes its content to a temporary path with the same folder and suffix.

    Raises:
      OSError: a file could not be written.
    """
    temporaries = {Path(path): _temporary(Path(path)) for path in writers}
    try:
        for temporary, write in zip(temporaries.values(), writers.values(), strict=True):
            write(temporary)
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A unique name that `is_temporary` recognizes."""
    unique = f"{os.getpid()}.{threading.get_ident()}.{secrets.token_hex(3)}"
    start = os.fsencode(path.stem)[:100].decode(errors="ignore")  # a name has at most 255 bytes
    return path.with_name(f".{start}.{unique}{path.suffix}")


def reason(error: BaseException) -> str:
    """Why writing or reading failed, briefly; libraries' own reports of a full disk are recognized.

    >>> reason(OSError(errno.ENOSPC, "No space left on device")), reason(ValueError("a\\nb"))
    ('no space left on device', 'a')
    """
    text = getattr(error, "strerror", None) or str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "no space left" in text.lower():
        return "no space left on device"
    return next((line.strip() for line in text.splitlines() if line.strip()), type(error).__name__)[:200]


def remedy(error: OSError) -> str:
    """Advice on a file that could not be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free disk space, and run the command again"
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "choose a folder you may write to"


def read_file(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file, or of a link to one: reading a pipe could block, and a device may have no end.

    Raises:
      OSError: it cannot be read, or is a pipe, a device or a socket.
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "it is a pipe, a device or a socket, not a file", os.fspath(path))
    return Path(path).read_bytes()


def read_json(path: str | os.PathLike) -> Any:
    """Reads JSON.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: the file cannot be read; the message explains why ("is empty", "is not JSON (...)").
    """
    path = Path(path)
    try:
        if not path.is_file():
            if not path.exists():
                raise FileNotFoundError(path)
            raise ValueError("is a folder" if path.is_dir() else "is not a regular file")
        if path.stat().st_size > _LARGEST_JSON:
            raise ValueError(f"is larger than {_LARGEST_JSON >> 20} MB")
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as e:
        raise ValueError(f"cannot be read, {reason(e)}") from e
    if not content.strip():
        raise ValueError("is empty")
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError("is not UTF-8 text") from e
    except RecursionError as e:
        raise ValueError("is nested too deeply") from e
    except ValueError as e:
        raise ValueError(f"is not JSON ({str(e)[:80]})") from e


def set_aside(path: str | os.PathLike) -> Path:
    """Renames a damaged file (or whatever is in its place) to `<name>.damaged`, or `.damaged2` and so on; returns it.

    Raises:
      OSError: it cannot be renamed.
    """
    path = Path(path)
    number, kept = 1, path.with_name(f"{path.name}.damaged")
    while os.path.lexists(kept):
        number += 1
        kept = path.with_name(f"{path.name}.damaged{number}")
    os.rename(path, kept)
    return kept


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Removes temporary files that a kill left in a folder; no one else may be writing there.

    Raises:
      OSError: one cannot be removed.
    """
    for path in Path(folder).glob(".*.*.*.*.*"):
        _, pid, thread, token = path.name.removesuffix(path.suffix).rsplit(".", 3)
        if pid.isdecimal() and thread.isdecimal() and len(token) == 6 and path.is_file():
            path.unlink(missing_ok=True)
