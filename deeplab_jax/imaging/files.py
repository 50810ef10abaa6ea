"""Reading any photograph or label map, and writing pictures."""

import io
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin

from deeplab_jax.console import shown
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging.decoding import IMAGE_SUFFIXES, CorruptImageError, size_of
from deeplab_jax.imaging.masks import VOID_COLORS, read_label, read_palette
from deeplab_jax.imaging.photographs import read_photograph

__all__ = [
    "CONVERTED", "IMAGE_SUFFIXES", "VOID_COLORS", "CorruptImageError", "encode_png", "is_foreign", "read_label",
    "read_note", "read_palette", "read_photograph", "refuse_foreign", "size_of", "write_palette_png", "write_png",
]  # fmt: skip

CONVERTED = "convert_labels"  # the note of its masks, which are data and no results
_PNG = b"\x89PNG\r\n\x1a\n"


def encode_png(array: np.ndarray, palette: np.ndarray | None = None, compress_level: int = 3, note: str = "") -> bytes:
    """PNG bytes of uint8 `[H, W]` (gray, or indices of `palette` `[256, 3]`) or `[H, W, 3 or 4]`; `note` as a text."""
    image = Image.fromarray(np.ascontiguousarray(array, np.uint8))
    if palette is not None:
        image = image.convert("L")
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
    out = io.BytesIO()
    texts = PngImagePlugin.PngInfo()
    if note:
        texts.add_text("Software", f"deeplab_jax {note}")
    image.save(out, "PNG", compress_level=compress_level, pnginfo=texts)
    return out.getvalue()


def write_png(path: str | os.PathLike, array: np.ndarray, palette: np.ndarray | None = None) -> None:
    """Writes a PNG atomically; see `encode_png`. Raises `UserError` if it cannot be written."""
    data = encode_png(array, palette, compress_level=6)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def write_palette_png(path: str | os.PathLike, labels: np.ndarray, palette: np.ndarray, note: str = "") -> None:
    """Writes class ids, uint8 `[H, W]`, as a palette PNG of `palette`, uint8 `[256, 3]`; for `note` see `read_note`."""
    data = encode_png(labels, palette, compress_level=6, note=note)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def is_foreign(path: str | os.PathLike) -> bool:
    """Whether there is a file that is no label map of `predict` or `refine`; part of a PNG counts as a broken one."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_PNG))
        if not start:
            return False
        if start == _PNG:
            with PngImagePlugin.PngImageFile(path):
                return read_note(path) in (None, CONVERTED)
        return not _PNG.startswith(start)
    except (OSError, SyntaxError, ValueError, EOFError):
        return False


def refuse_foreign(paths: Iterable[str | os.PathLike]) -> None:
    """Raises `UserError` for the first label map to write whose name another file has; see `is_foreign`."""
    for path in paths:
        if is_foreign(path):
            raise UserError(
                f"{shown(path)}: exists, and is no result of this program; choose another --out, or replace it with "
                "--overwrite"
            )


def read_note(path: str | os.PathLike) -> str | None:
    """The note that `write_palette_png` left in a PNG; None if there is no such file or no note in it."""
    try:
        with PngImagePlugin.PngImageFile(path) as image:  # `Image.open` refuses large ones, whose header is as small
            text = image.info.get("Software", "")
    except (OSError, SyntaxError, ValueError, EOFError):
        return None
    return text.removeprefix("deeplab_jax ") if text.startswith("deeplab_jax ") else None
