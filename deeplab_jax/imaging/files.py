"""Reading any photograph or label map, and writing pictures."""

import io
import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging.palettes import voc_palette

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")

# Formats that Pillow decodes itself; it would hand EPS, for one, to a program of the system.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "WEBP", "TIFF", "PPM", "GIF", "JPEG2000", "ICO", "TGA")

# Images above this size are refused unless the caller allows more.
MAX_PIXELS = 200_000_000

# Colors that mean void in a colored label map unless a class has them: black, white, and PASCAL's boundary color.
VOID_COLORS = np.array([[0, 0, 0], [255, 255, 255], [224, 224, 192]], np.uint8)


class CorruptImageError(UserError):
    """A file that is there but cannot be decoded."""


def read_photograph(source: str | os.PathLike | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Decodes a photograph of any kind: gray, palette, CMYK, 16 bits, with transparency, turned by EXIF.

    Args:
      source: a path, or the encoded bytes.
      name: what errors call it; default the path.
      max_pixels: larger images are refused before they are decoded.

    Returns:
      RGB, uint8 `[H, W, 3]`, upright. 16-bit values keep their high byte, unless none exceeds 255; floats up to 1 are
      taken for shares of white; transparency is laid over white.

    Raises:
      UserError: no such file, or it is too large. CorruptImageError: it cannot be decoded.
    """
    image = _upright(_open(source, name, max_pixels=max_pixels))
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        values = np.nan_to_num(np.asarray(image, np.float32))
        if values.max() > 255:
            values = values / 257.0
        elif image.mode == "F" and values.max() <= 1:
            values = values * 255.0
        gray = np.clip(np.rint(values), 0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def read_label(source: str | os.PathLike | bytes, name: str = "", colors: np.ndarray | None = None) -> np.ndarray:
    """Decodes a label map: palette PNG (its indices), gray (its values), or colors looked up in a table.

    Args:
      source: a path, or the encoded bytes.
      name: what errors call it; default the path.
      colors: uint8 `[K, 3]`, RGB of class 0..K-1; a colored map is then looked up, `VOID_COLORS` outside the table are
        void, other unknown colors are refused (in JPEGs, the nearest is taken, void's included).

    Returns:
      Class ids, uint8 `[H, W]`, 255 = void.

    Raises:
      UserError: no such file, colors without a table, or a color that the table lacks.
      CorruptImageError: it cannot be decoded.
    """
    opened = _open(source, name)
    jpeg = opened.format == "JPEG"  # which turning upright forgets
    image = _upright(opened)
    where = name or ("label" if isinstance(source, bytes) else os.fspath(source))
    if image.mode in ("L", "P") and not (colors is not None and image.mode == "P" and _is_colored(image, colors)):
        return np.array(image)
    if image.mode == "1":
        return np.array(image).astype(np.uint8)
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        values = np.asarray(image)
        if values.size and (values.max() > 255 or values.min() < 0):
            raise UserError(f"{where}: holds the id {values.max()}, and ids above 255 are not supported; renumber them")
        return values.astype(np.uint8)
    if image.mode == "LA":
        return np.array(image.getchannel(0))
    rgb = np.array(image.convert("RGB"))
    if colors is None:
        if (rgb == rgb[..., :1]).all():
            return np.ascontiguousarray(rgb[..., 0])
        raise UserError(
            f"{where}: is a color picture where class ids are expected; "
            "give R G B for each class in the classes file (config.data.classes), or save an index or palette PNG"
        )
    return _look_up(rgb, colors, where, nearest=jpeg)


def read_palette(source: str | os.PathLike | bytes, name: str = "") -> np.ndarray:
    """The palette of a palette image, uint8 `[256, 3]`, entries it lacks as in VOC's; VOC's for other images."""
    palette = voc_palette()
    image = _open(source, name, load=False)
    if image.mode == "P":
        own = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[: len(own)] = own
    return palette


def size_of(source: str | os.PathLike | bytes, name: str = "") -> tuple[int, int]:
    """(height, width) of an image after EXIF rotation, from its header alone."""
    image = _open(source, name, load=False)
    width, height = image.size
    try:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    except Exception:  # as in `_upright`
        turned = False
    return (width, height) if turned else (height, width)


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
    """Writes a PNG atomically; see `encode_png`. Raises `UserError` where it cannot be written."""
    data = encode_png(array, palette, compress_level=6)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def write_palette_png(path: str | os.PathLike, labels: np.ndarray, palette: np.ndarray, note: str = "") -> None:
    """Writes class ids, uint8 `[H, W]`, as a palette PNG of `palette`, uint8 `[256, 3]`; for `note` see `read_note`."""
    data = encode_png(labels, palette, compress_level=6, note=note)
    write_atomically(path, lambda temporary: Path(temporary).write_bytes(data))


def read_note(path: str | os.PathLike) -> str | None:
    """The note that `write_palette_png` left in a PNG; None where there is no such file or no note in it."""
    try:
        with Image.open(path) as image:
            text = image.info.get("Software", "")
    except (OSError, SyntaxError, ValueError, EOFError):
        return None
    return text.removeprefix("deeplab_jax ") if text.startswith("deeplab_jax ") else None


def _open(source: str | os.PathLike | bytes, name: str, load: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    where = name or ("image" if isinstance(source, bytes) else os.fspath(source))
    try:
        if not isinstance(source, bytes):
            if os.path.isdir(source):
                raise UserError(f"{where}: is a folder where an image is expected")
            source = Path(source).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and odd EXIF: fine for us
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)  # Pillow refuses twice as many
            Image.init()  # of formats named, only those are found that are loaded
            image = Image.open(io.BytesIO(source), formats=[f for f in _FORMATS if f in Image.OPEN])
            if image.width * image.height > max_pixels:
                raise _too_large(where, f"has {image.width * image.height / 1e6:.3g} megapixels, more than", max_pixels)
            if load:
                image.load()
        return image
    except FileNotFoundError as e:
        raise UserError(f"{where}: no such file") from e
    except PermissionError as e:
        raise UserError(f"{where}: may not be read; check its permissions") from e
    except Image.DecompressionBombError as e:
        raise _too_large(where, "has more than twice", max_pixels) from e
    except UserError:
        raise
    except Exception as e:  # decoders raise many kinds on damaged files
        why = "is empty" if not source else "cannot be decoded as an image"
        raise CorruptImageError(f"{where}: {why}; replace or remove it") from e


def _too_large(where: str, how: str, max_pixels: int) -> UserError:
    return UserError(
        f"{where}: {how} the limit of {max_pixels / 1e6:.3g} megapixels; make it smaller, or let predict or "
        "refine take it with --max_megapixels"
    )


def _upright(image: Image.Image) -> Image.Image:
    """Turned as EXIF says; where that is damaged, as it is."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's reader of EXIF raises many kinds
        return image


def _is_colored(image: Image.Image, colors: np.ndarray) -> bool:
    """Whether a palette image's used palette entries are the table's colors but in another order."""
    used = np.unique(np.asarray(image))
    used = used[used < len(colors)]
    palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    if used.size == 0 or used.max() >= len(palette):
        return False
    table = {tuple(c) for c in colors.tolist()}
    same = (palette[used] == colors[used]).all()
    return not same and all(tuple(palette[u].tolist()) in table for u in used)


def _look_up(rgb: np.ndarray, colors: np.ndarray, where: str, nearest: bool) -> np.ndarray:
    unique, inverse = np.unique(_packed(rgb), return_inverse=True)
    table = np.concatenate([colors, VOID_COLORS]).astype(np.int32)
    meaning = np.concatenate([np.arange(len(colors)), np.full(len(VOID_COLORS), 255)]).astype(np.uint8)
    known = {color: i for i, color in reversed(list(enumerate(_packed(table).tolist())))}  # classes before void
    ids = np.empty(len(unique), np.uint8)
    for n, color in enumerate(unique.tolist()):
        parts = np.array([color >> 16, color >> 8 & 255, color & 255])
        if color in known:
            ids[n] = meaning[known[color]]
        elif nearest:
            ids[n] = meaning[np.argmin(((table - parts) ** 2).sum(axis=1))]
        else:
            raise UserError(
                f"{where}: holds the color {tuple(parts.tolist())}, which no class has; add it to the classes file or "
                "repaint it"
            )
    return ids[inverse].reshape(rgb.shape[:2])


def _packed(rgb: np.ndarray) -> np.ndarray:
    return (rgb.astype(np.int32) << np.array([16, 8, 0])).sum(axis=-1)
