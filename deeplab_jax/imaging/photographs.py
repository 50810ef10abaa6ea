"""How a photograph's samples are read: one table of kinds, each with its reader and the note for the user."""

import os
import struct
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, TiffImagePlugin

from deeplab_jax.errors import UserError
from deeplab_jax.imaging import decoding
from deeplab_jax.imaging.decoding import CorruptImageError
from deeplab_jax.imaging.deep import deep_color, is_deep_color, rawmode
from deeplab_jax.limits import REFUSE_ABOVE


class ImageKind(NamedTuple):
    """A row of `IMAGE_KINDS`.

    Attributes:
      name: its name in tests and in the check.
      reads: how it is read; the row of docs/own_data.md.
      fits: whether an image (opened, encoded) is of this kind.
      read: (decoded image, encoded, its name in errors) to RGB uint8 `[H, W, 3]`, before it is turned upright.
      note: the check's note on such images; "" = none.
    """

    name: str
    reads: str
    fits: Callable[[Image.Image, bytes], bool]
    read: Callable[[Image.Image, bytes, str], np.ndarray]
    note: str = ""


def _read_deep_gray(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    return _gray(scaled_to_8_bits(np.asarray(image), where))


def _read_deep_color(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    return scaled_to_8_bits(deep_color(image, data), where)


def _read_deep_transparent(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    samples = _gray(np.asarray(image)) if image.mode.startswith("I") else deep_color(image, data)
    key = image.info.get("transparency", -1)  # PNG's transparent color; no sample is -1
    hidden = (samples == np.asarray(key)).all(-1, keepdims=True)
    seen = _deep_over_white(np.where(hidden, 0, samples), where)
    return np.where(hidden, np.uint8(255), seen)


def _read_planar(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    planes = [np.asarray(decoding.open_image(plane, where)) for plane in _planes(data)]
    return _deep_over_white(np.stack(planes, -1), where)


def _read_transparent(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    image = image.convert("RGBA")
    return np.array(Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB"))


def _read_plain(image: Image.Image, data: bytes, where: str) -> np.ndarray:
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


IMAGE_KINDS = (
    ImageKind(
        "planar 16 bits", "TIFF of 16 bits with one plane for each band: as 16-bit color; a note",
        lambda image, data: _is_planar_16(image), _read_planar,
        "have 16 bits; of the bits in use, the highest 8 are taken",
    ),
    ImageKind(
        "16-bit transparent", "as 16-bit color or gray, then blended with white; a note",
        lambda image, data: _is_deep(image) and (image.mode == "RGBA" or "transparency" in image.info),
        _read_deep_transparent,
        "have 16 bits and transparency; of the bits in use, the highest 8 are taken and blended with white",
    ),
    ImageKind(
        "16-bit color", "the most bits in use in the image (8, 10, 12, 14 or 16) are white; a note",
        lambda image, data: is_deep_color(image), _read_deep_color,
        "have 16 bits; of the bits in use, the highest 8 are taken",
    ),
    ImageKind(
        "16-bit gray", "the same, as three equal channels; a note",
        lambda image, data: image.mode.startswith("I"), _read_deep_gray,
        "have 16 bits; of the bits in use, the highest 8 are taken",
    ),
    ImageKind(
        "float", "values up to 1 as fractions of white, others as integers; a note; negative values, NaN are an error",
        lambda image, data: image.mode == "F", _read_deep_gray,
        "hold floats: values up to 1 are read as fractions of white, others as integers",
    ),
    ImageKind(
        "transparent", "blended with white; a note",
        lambda image, data: image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info,
        _read_transparent, "have transparency; they are blended with white",
    ),
    ImageKind(
        "other bands", "a TIFF's fourth band that is not opacity is left out; a note",
        lambda image, data: rawmode(image).startswith("RGBX") and image.format == "TIFF", _read_plain,
        "have a fourth band that is not opacity; it is left out",
    ),
    ImageKind(
        "cmyk", "converted to RGB; a note", lambda image, data: image.mode == "CMYK", _read_plain,
        "are CMYK; they are converted to RGB",
    ),
    ImageKind(
        "gray", "1 to 8 bits, as three equal channels; a note",
        lambda image, data: image.mode in ("1", "L"), _read_plain,
        "are gray; they are read as three equal channels",
    ),
    ImageKind("palette", "its colors", lambda image, data: image.mode == "P", _read_plain),
    ImageKind("color", "as it is", lambda image, data: True, _read_plain),
)  # fmt: skip


def kind_of(image: Image.Image, data: bytes) -> ImageKind:
    """The row of `IMAGE_KINDS` of an image whose header has been read, not its pixels."""
    return next(kind for kind in IMAGE_KINDS if kind.fits(image, data))


def read_photograph(
    source: str | os.PathLike | bytes,
    name: str = "",
    refuse_above: int = REFUSE_ABOVE,
    remark: Callable[[str], object] | None = None,
) -> np.ndarray:
    """Decodes a photograph of any kind in `IMAGE_KINDS`, turned according to EXIF; the first of several frames.

    Args:
      source: a path, or the encoded bytes.
      name: its name in errors; default the path.
      refuse_above: images of more pixels are refused before they are decoded.
      remark: called with a sentence about further frames, which are left out.

    Returns:
      RGB, uint8 `[H, W, 3]`, upright.

    Raises:
      UserError: the file does not exist, is too large, or its samples cannot be a photograph's.
      CorruptImageError: it cannot be decoded.
    """
    data = decoding.read_source(source, name)
    where = decoding.named(source, name)
    image = decoding.open_image(data, where, load=False, refuse_above=refuse_above)
    kind = kind_of(image, data)
    if remark and decoding.frames_of(image) > 1:
        remark(f"{where}: has {decoding.frames_of(image)} frames; the first is read")
        image.seek(0)
    if kind.name != "planar 16 bits":
        image = decoding.open_image(data, where, refuse_above=refuse_above)
    turn = decoding.orientation(image)
    try:
        rgb = kind.read(image, data, where)
    except UserError:
        raise
    except Exception as e:  # a color space that Pillow does not convert, a damaged profile
        raise CorruptImageError(f"{where}: cannot be decoded as an image; replace or remove it") from e
    return _turned(rgb, turn)


def scaled_to_8_bits(values: np.ndarray, where: str) -> np.ndarray:
    """Deep samples as 8 bits: white is the maximum of the smallest of 8, 10, 12, 14 and 16 bits that holds all samples.

    Floats up to 1 are fractions of white.

    Args:
      values: integers or floats of any shape.
      where: the image's name in errors.

    Returns:
      uint8, of the same shape.

    Raises:
      UserError: NaN, infinite, negative or above 16 bits.
    """
    low, high = (float(values.min()), float(values.max())) if values.size else (0.0, 0.0)
    if not np.isfinite([low, high]).all():
        raise UserError(f"{where}: holds NaN or infinite values; replace them, and export 8 or 16 bits")
    if low < 0 or high > 65535:
        raise UserError(f"{where}: holds values from {low:.6g} to {high:.6g}; scale them to 0..255 or 0..65535")
    if values.dtype.kind == "f" and high <= 1:
        white = 1.0
    else:
        white = next(2.0**bits - 1 for bits in (8, 10, 12, 14, 16) if high <= 2**bits - 1)
    return (
        np.rint(values * np.float32(255 / white)).astype(np.uint8) if white != 255 else np.rint(values).astype(np.uint8)
    )


def _gray(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def _deep_over_white(samples: np.ndarray, where: str) -> np.ndarray:
    """RGB of deep samples `[H, W, 3 or 4]`. An opaque fourth channel says nothing about the bits that colors use."""
    color = scaled_to_8_bits(samples[..., :3], where)
    opacity = scaled_to_8_bits(samples, where)[..., 3:]  # in no fewer bits than the colors
    return _over_white(np.concatenate([color, opacity], -1))


def _over_white(samples: np.ndarray) -> np.ndarray:
    """RGB of uint8 `[H, W, 3 or 4]`, a fourth channel being opacity."""
    if samples.shape[-1] == 3:
        return samples
    alpha = samples[..., 3:].astype(np.float32) / 255
    return np.rint(samples[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def _turned(rgb: np.ndarray, turn: int) -> np.ndarray:
    """`ImageOps.exif_transpose` for an array."""
    if turn in (5, 6, 7, 8):
        rgb = rgb.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if turn in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return np.ascontiguousarray(rgb)


def _is_deep(image: Image.Image) -> bool:
    return image.mode.startswith("I") or is_deep_color(image)


def _is_planar_16(image: Image.Image) -> bool:
    if image.format != "TIFF" or not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    tags = image.tag_v2
    return tags.get(284, 1) == 2 and set(tags.get(258, (1,))) == {16} and tags.get(277, 1) in (3, 4)


def _planes(data: bytes) -> list[bytes]:
    """Each plane of a planar TIFF as a gray TIFF of its own, their strips or tiles assigned in order."""
    tags = decoding.tiff_tags(data)
    if tags is None:
        raise CorruptImageError("has no readable list of tags")
    count = int(tags[277])
    offset_tag, size_tag = (324, 325) if 324 in tags else (273, 279)
    planes = []
    for plane in range(count):
        share = slice(len(tags[offset_tag]) * plane // count, len(tags[offset_tag]) * (plane + 1) // count)
        pieces = [data[o : o + n] for o, n in zip(tags[offset_tag][share], tags[size_tag][share], strict=True)]
        kept: dict[int, tuple[int, ...]] = {
            tag: (int(tags[tag]),) for tag in (256, 257, 259, 266, 278, 317, 322, 323) if tag in tags
        }
        planes.append(gray_tiff(data[:2], kept, offset_tag, size_tag, pieces))
    return planes


def gray_tiff(
    order: bytes, tags: dict[int, tuple[int, ...]], offset_tag: int, size_tag: int, pieces: list[bytes]
) -> bytes:
    """A TIFF of one 16-bit gray plane: its byte order (II or MM), its other tags, and its strips or tiles."""
    long, head = ("<I", "<HHI") if order == b"II" else (">I", ">HHI")
    tags = tags | {258: (16,), 262: (1,), 277: (1,), size_tag: tuple(map(len, pieces)), offset_tag: (0,) * len(pieces)}
    values_at = 8 + 2 + 12 * len(tags) + 4
    pieces_at = values_at + sum(4 * len(v) for v in tags.values() if len(v) > 1)
    tags[offset_tag] = tuple(pieces_at + sum(map(len, pieces[:n])) for n in range(len(pieces)))
    entries, values = b"", b""
    for tag, numbers in sorted(tags.items()):
        packed = b"".join(struct.pack(long, n) for n in numbers)
        entries += struct.pack(head, tag, 4, len(numbers))
        entries += packed if len(numbers) == 1 else struct.pack(long, values_at + len(values))
        values += packed if len(numbers) > 1 else b""
    start = order + struct.pack(head[0] + "HI", 42, 8) + struct.pack(head[0] + "H", len(tags))
    return start + entries + bytes(4) + values + b"".join(pieces)
