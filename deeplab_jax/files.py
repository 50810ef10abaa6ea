"""Writing files that are never half there."""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Callable
from pathlib import Path

from deeplab_jax.errors import UserError


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text atomically."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_atomically(path: str | os.PathLike, write: Callable[[Path], object]) -> None:
    """Calls `write(temporary path)` and renames the result to `path`: readers see the old file or the whole new one.

    Args:
      path: the file to write; its folder is made.
      write: writes the temporary file, which has the same suffix and folder.

    Raises:
      UserError: the folder cannot be made or written to.
    """
    path = Path(path)
    start = os.fsencode(path.stem)[:100].decode(errors="ignore")  # a name has at most 255 bytes
    temporary = path.with_name(f".{start}.{os.getpid()}.{threading.get_ident()}.{secrets.token_hex(3)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror or e}); choose a folder you may write to") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, value: object) -> None:
    """Writes JSON atomically; an `OSError` is the caller's, who knows what a full disk means here."""
    path = Path(path)
    temporary = path.with_suffix(f".tmp{os.getpid()}")
    try:
        temporary.write_text(json.dumps(value, indent=1))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
