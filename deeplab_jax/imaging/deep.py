"""16-bit samples of color, of which Pillow keeps the high byte, put together again."""

import io

import numpy as np
from PIL import Image, ImageFile

from deeplab_jax.imaging import decoding

# The low byte of each 16-bit sample: Pillow keeps the high byte; these packings make it read the low one.
_LOW_BYTE = {
    "RGB;16B": "RGB;16L", "RGB;16L": "RGB;16B", "RGB;16N": "RGB;16B", "RGBA;16B": "RGBA;16L", "RGBA;16L": "RGBA;16B",
    "RGBA;16N": "RGBA;16B", "RGBX;16B": "RGBX;16L", "RGBX;16L": "RGBX;16B", "RGBX;16N": "RGBX;16B",
}  # fmt: skip
_GRAY_AND_OPACITY = "LA;16B"  # of PNG; four bytes a pixel


def deep_color(image: Image.Image, data: bytes) -> np.ndarray:
    """The 16-bit samples of a picture of which Pillow keeps the high bytes, uint16 `[H, W, C]`."""
    packing = rawmode(decoding.open_image(data, load=False))
    if packing == _GRAY_AND_OPACITY:
        parts = np.asarray(_load_as(data, "RGBA")).astype(np.uint16)  # the high and low byte of each
        return (parts[..., ::2] << 8 | parts[..., 1::2])[..., [0, 0, 0, 1]]
    high, low = np.asarray(image), np.asarray(_load_as(data, _LOW_BYTE[packing]))
    return high.astype(np.uint16) << 8 | low


def rawmode(image: Image.Image) -> str:
    """Pillow's name for the packing of the file's samples; "" if it is unknown or the pixels are already read."""
    if not isinstance(image, ImageFile.ImageFile) or not image.tile:
        return ""
    arguments = image.tile[0][3]
    first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return first if isinstance(first, str) else ""


def _load_as(data: bytes, rawmode: str) -> Image.Image:
    """The image decoded as if its samples were packed in another way."""
    image = Image.open(io.BytesIO(data))
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]
    image.load()
    return image


def is_deep_color(image: Image.Image) -> bool:
    """Whether a file, whose pixels have not been read, has 16-bit samples of color, or of gray and opacity."""
    return rawmode(image) in (*_LOW_BYTE, _GRAY_AND_OPACITY)


def labels_of(image: Image.Image, data: bytes) -> Image.Image:
    """A mask of 16-bit samples of color, or of gray and opacity, as a gray or color image of the values it means.

    Colors and ids of 8 bits are found in the high byte, in both, or in the low one; other gray is ids of 16 bits.
    """
    samples = deep_color(image, data)[..., :3]
    high, low = samples >> 8, samples & 255
    opacity = rawmode(decoding.open_image(data, load=False)) == _GRAY_AND_OPACITY
    gray = bool((samples[..., :1] == samples).all())
    if not high.any() and not opacity:
        found = Image.fromarray(low.astype(np.uint8))
    elif gray and (opacity or not ((low == high) | (low == 0)).all()):
        found = Image.fromarray(np.ascontiguousarray(samples[..., 0]))
    else:
        found = Image.fromarray(high.astype(np.uint8))
    found.info.update(image.info)
    return found
