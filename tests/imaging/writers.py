"""Encoders of kinds that Pillow reads but does not write: shallow gray PNGs, white as zero, 16-bit color."""

import io
import struct
import zlib

import numpy as np
from PIL import Image


def gray_png(samples: np.ndarray, bits: int, hidden: int | None = None) -> bytes:
    """Stored samples `[H, W]` as a gray PNG of 1, 2, 4, 8 or 16 bits; `hidden`: the sample that is transparent."""
    return _png(samples, bits, 0, None if hidden is None else (hidden,))


def rgb16_png(samples: np.ndarray, hidden: tuple[int, ...] | None = None) -> bytes:
    """uint16 `[H, W, 3 or 4]` as a PNG; `hidden`: the color that is transparent."""
    return _png(samples, 16, 2 if samples.shape[2] == 3 else 6, hidden)


def gray_and_opacity16_png(samples: np.ndarray) -> bytes:
    """uint16 `[H, W, 2]`, gray and opacity, as a PNG."""
    return _png(samples, 16, 4)


def _png(samples: np.ndarray, bits: int, color: int, hidden: tuple[int, ...] | None = None) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + _row(row, bits) for row in samples)
    header = struct.pack(">IIBBBBB", samples.shape[1], samples.shape[0], bits, color, 0, 0, 0)
    key = b"" if hidden is None else chunk(b"tRNS", np.array(hidden, ">u2").tobytes())
    content = chunk(b"IHDR", header) + key + chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def _row(row: np.ndarray, bits: int) -> bytes:
    if bits == 16:
        return row.astype(">u2").tobytes()
    spread = (row.astype(np.uint8).ravel()[:, None] >> np.arange(bits - 1, -1, -1)) & 1
    return np.packbits(spread.ravel()).tobytes()


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int = 1,
    planar: bool = False,
    order: bytes = b"II",
    extra: int | None = None,
) -> bytes:
    """Stored samples `[H, W]` or `[H, W, C]` as an uncompressed TIFF of one strip a plane.

    Args:
      extra: the kind of a fourth band, in TIFF's numbers: 0 unspecified, 2 opacity; None = not stated in the file.
    """
    long, short = ("<I", "<H") if order == b"II" else (">I", ">H")
    bands = 1 if samples.ndim == 2 else samples.shape[2]
    planes = [samples] if bands == 1 or not planar else [samples[..., k] for k in range(bands)]
    kind = (short[0] + "u2") if bits == 16 else None
    strips = [
        p.astype(kind).tobytes() if kind else b"".join(_row(row, bits) for row in p.reshape(p.shape[0], -1))
        for p in planes
    ]
    tags = {
        256: (samples.shape[1],), 257: (samples.shape[0],), 258: (bits,) * bands, 259: (1,), 262: (photometric,),
        273: (0,) * len(strips), 277: (bands,), 278: (samples.shape[0],), 279: tuple(map(len, strips)),
        284: (2 if planar else 1,),
    }  # fmt: skip
    if extra is not None:
        tags[338] = (extra,)
    values_at = 8 + 2 + 12 * len(tags) + 4
    data_at = values_at + sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[273] = tuple(data_at + sum(map(len, strips[:n])) for n in range(len(strips)))
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = b"".join(struct.pack(long, n) for n in numbers)
        entries += struct.pack(short, tag) + struct.pack(short, 4) + struct.pack(long, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack(long, values_at + len(values))
        values += packed if len(numbers) > 1 else b""
    start = order + struct.pack(short, 42) + struct.pack(long, 8) + struct.pack(short, len(tags))
    return start + entries + bytes(4) + values + b"".join(strips)


def pillow(array: np.ndarray, kind: str, palette: np.ndarray | None = None, **options) -> bytes:
    """An array as Pillow writes it, with a palette `[K, 3]` as indices of it."""
    image = Image.fromarray(array)
    if palette is not None:
        image = image.convert("L")
        image.putpalette(np.asarray(palette, np.uint8).tobytes())
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
