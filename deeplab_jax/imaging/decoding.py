"""Opening encoded images of any format that Pillow itself decodes; the formats and their suffixes."""

import io
import os
import warnings

from PIL import Image, ImageFile, ImageOps, TiffImagePlugin, features

from deeplab_jax.errors import UserError
from deeplab_jax.files import read_file
from deeplab_jax.limits import REFUSE_ABOVE

# Pillow's name of a format -> suffixes, and the feature of the library that decodes it ("" = always available).
# Other formats are not opened: Pillow would pass EPS, for example, to an external program.
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "JPEG": ((".jpg", ".jpeg", ".jpe", ".jfif"), ""),
    "PNG": ((".png",), ""),
    "BMP": ((".bmp", ".dib"), ""),
    "DIB": ((), ""),
    "TIFF": ((".tif", ".tiff"), ""),
    "PPM": ((".ppm", ".pgm", ".pbm", ".pnm"), ""),
    "GIF": ((".gif",), ""),
    "TGA": ((".tga",), ""),
    "ICO": ((".ico",), ""),
    "WEBP": ((".webp",), "webp"),
    "JPEG2000": ((".jp2", ".j2k"), "jpg_2000"),
    "AVIF": ((".avif",), "avif"),
}
READABLE = {name: suffixes for name, (suffixes, need) in FORMATS.items() if not need or features.check(need)}
IMAGE_SUFFIXES = tuple(suffix for suffixes in READABLE.values() for suffix in suffixes)

# Pillow's name for the packing of gray samples -> how it shows a stored sample s: (factor, largest sample) if it
# shows factor * s; the factor is negative if white is zero and it shows factor * (largest - s).
_PACKED = {
    "1": (1, 1), "1;R": (1, 1), "1;I": (-1, 1), "1;IR": (-1, 1),
    "L;2": (85, 3), "L;2R": (85, 3), "L;2I": (-85, 3), "L;2IR": (-85, 3),
    "L;4": (17, 15), "L;4R": (17, 15), "L;4I": (-17, 15), "L;4IR": (-17, 15),
    "L;I": (-1, 255), "L;IR": (-1, 255),
}  # fmt: skip


class CorruptImageError(UserError):
    """A file that exists but cannot be decoded."""


def named(source: str | os.PathLike | bytes, name: str, kind: str = "image") -> str:
    """The name of a source in errors."""
    return name or (kind if isinstance(source, bytes) else os.fspath(source))


def read_source(source: str | os.PathLike | bytes, name: str = "") -> bytes:
    """The encoded bytes at a path, or the given bytes; raises `UserError` if no file can be read."""
    if isinstance(source, bytes):
        return source
    where = named(source, name)
    try:
        if os.path.isdir(source):
            raise UserError(f"{where}: is a folder where an image is expected")
        return read_file(source)
    except FileNotFoundError as e:
        raise UserError(f"{where}: no such file") from e
    except PermissionError as e:
        raise UserError(f"{where}: cannot be read; check its permissions") from e
    except OSError as e:
        raise UserError(f"{where}: cannot be read ({e.strerror or e})") from e


def open_image(
    source: str | os.PathLike | bytes, name: str = "", load: bool = True, refuse_above: int = REFUSE_ABOVE
) -> Image.Image:
    """Opens an image, or the first of its frames.

    Args:
      source: a path, or the encoded bytes.
      name: its name in errors; default the path.
      load: decodes the pixels; otherwise only the header is read.
      refuse_above: images of more pixels are refused before they are decoded.

    Raises:
      UserError: the file does not exist, is too large, or has bands that no photograph has.
      CorruptImageError: it cannot be decoded.
    """
    where = named(source, name)
    data = read_source(source, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images and unusual EXIF are accepted
            Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, refuse_above)  # Pillow refuses twice as many
            Image.init()  # only loaded formats are found by name
            image = Image.open(io.BytesIO(data), formats=[f for f in READABLE if f in Image.OPEN])
            if image.width * image.height > refuse_above:
                raise _too_large(
                    where, f"has {image.width * image.height / 1e6:.3g} megapixels, more than", refuse_above
                )
        return loaded(image, data, where) if load else image
    except Image.DecompressionBombError as e:
        raise _too_large(where, "has more than twice", refuse_above) from e
    except UserError:
        raise
    except Exception as e:  # decoders raise many exceptions on damaged files
        raise _undecodable(data, where) from e


def loaded(image: Image.Image, data: bytes, where: str) -> Image.Image:
    """An opened image with its pixels decoded; raises like `open_image`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
        return image
    except Exception as e:  # as in `open_image`
        raise _undecodable(data, where) from e


def _undecodable(data: bytes, where: str) -> UserError:
    bands = _tiff_bands(data)
    if bands:
        return UserError(f"{where}: {bands}; export its visible bands as RGB, or one of them as gray")
    why = "is empty" if not data else "cannot be decoded as an image"
    return CorruptImageError(f"{where}: {why}; replace or remove it")


def upright(image: Image.Image) -> Image.Image:
    """The image turned according to EXIF; unchanged if its EXIF is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # Pillow's EXIF reader raises many exceptions
        return image


def is_turned(image: Image.Image) -> bool:
    """Whether EXIF requires the image to be turned or mirrored."""
    return orientation(image) in range(2, 9)


def orientation(image: Image.Image) -> int:
    """EXIF's orientation; 1 if it is absent or damaged."""
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # as in `upright`
        return 1


def size_of(source: str | os.PathLike | bytes, name: str = "") -> tuple[int, int]:
    """(height, width) of an image after EXIF rotation, from its header only."""
    return upright_size(open_image(source, name, load=False))


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(height, width) of an image whose header has been read, after EXIF rotation."""
    width, height = image.size
    turned = orientation(image) in (5, 6, 7, 8) and image.format != "TIFF"  # of which Pillow gives the size turned
    return (width, height) if turned else (height, width)


def is_lossy(image: Image.Image, data: bytes) -> bool:
    """Whether samples may differ from those that were saved; of an AVIF in color it is not known, and False."""
    if image.format == "WEBP":
        return b"VP8 " in _webp_chunks(data)
    return image.format == "JPEG" or (image.format in ("AVIF", "JPEG2000") and image.mode.startswith(("L", "I")))


def _webp_chunks(data: bytes) -> set[bytes]:
    """The names of a WebP file's chunks: "VP8 " is the lossy compression, "VP8L" the lossless one."""
    names, at = set(), 12
    while at + 8 <= len(data):
        names.add(data[at : at + 4])
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        at += 8 + size + size % 2
    return names


def frames_of(image: Image.Image) -> int:
    """The number of pages or frames of a file; the second picture in a camera's JPEG does not count."""
    if image.format not in ("TIFF", "GIF", "PNG", "WEBP", "AVIF"):
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except Exception:  # a damaged chain of pages: the first page was read
        return 1


def gray_packing(image: Image.Image) -> tuple[float, int]:
    """(factor, largest sample) by which Pillow shows the gray samples of a file; (1, 255) = unchanged."""
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    arguments: tuple | str | None = tile[3] if tile else ()
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    if (
        image.format == "PPM"
        and tile
        and isinstance(arguments, tuple)
        and tile[0].startswith("ppm")
        and image.mode in ("L", "I")
    ):
        largest = int(arguments[1])  # Pillow stretches 0..largest to 8 or 16 bits
        return (255 if image.mode == "L" else 65535) / largest, largest
    return _PACKED.get(first, (1, 255)) if isinstance(first, str) else (1, 255)


def tiff_tags(data: bytes) -> TiffImagePlugin.ImageFileDirectory_v2 | None:
    """The tags of a TIFF's first page; None for other formats."""
    if data[:4] not in (b"II*\0", b"MM\0*"):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about damaged tags
            tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
            file = io.BytesIO(data)
            file.seek(tags.next)
            tags.load(file)
        return tags
    except Exception:  # damaged
        return None


def _tiff_bands(data: bytes) -> str:
    """A description of a TIFF that Pillow does not accept; "" if its bands and bits are a photograph's."""
    tags = tiff_tags(data)
    if tags is None:
        return ""
    try:
        bits, bands = tags.get(258, (1,)), int(tags.get(277, 1))
        bits = bits if isinstance(bits, tuple) else (bits,)
        number = {1: "unsigned", 2: "signed", 3: "float"}.get((tags.get(339, (1,)) or (1,))[0], "unknown")
    except Exception:  # damaged tags
        return ""
    if bands in (1, 3, 4) and set(bits) <= {1, 2, 4, 8, 16} and number == "unsigned":
        return ""
    if bands == 1 and set(bits) == {32} and number in ("float", "signed"):
        return ""
    return f"is a TIFF of {bands} band{'s' * (bands != 1)} of {max(bits)} bits ({number}), which is not supported"


def _too_large(where: str, how: str, refuse_above: int) -> UserError:
    return UserError(
        f"{where}: {how} the limit of {refuse_above / 1e6:.3g} megapixels; make it smaller, or raise "
        "--refuse_above of predict or refine"
    )
