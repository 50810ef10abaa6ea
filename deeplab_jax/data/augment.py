"""Augmentation with the released semantics: scale, pad, crop, mirror; and photometric: jitter, other light, blur.

Scaling is bilinear with aligned corners for the image and nearest for the label (recipes of DeepLab v2, "Aug"): `n`
pixels become `round((n - 1) * s) + 1`, and pixel `i` of the result is at `i * (n - 1) / (m - 1)` in the source.
"""

import dataclasses
from collections.abc import Sequence
from typing import cast

import numpy as np
from PIL import Image, ImageFilter

from deeplab_jax.imaging.light import mean_and_deviation
from deeplab_jax.imaging.mirror import swap_table
from deeplab_jax.imaging.palettes import VOID

# R, G, B of the mean color that the networks subtract, rounded: padding is about zero after preprocessing.
MEAN_COLOR = np.array([123, 117, 104], np.uint8)
# Mean and deviation, over all pixels and channels, of photographs whose light was evened: as in `models.deeplab`.
EVEN_MEAN, EVEN_DEVIATION = 115.0, 58.0
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
# Rows processed at a time: intermediate results stay in the cache, and are too small for the allocator to return to
# the system and fault in again each time (otherwise two thirds of the cost).
_BAND = 32


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The random choices for each example. See `configs/base.py`, `config.data`.

    `even` brings each photograph to the same light first, for networks that do so themselves in testing.
    """

    crop: tuple[int, int]
    scales: tuple[float, ...] = (1.0,)
    continuous_scale: bool = False
    mirror: bool = False
    mirror_swaps: tuple[tuple[int, int], ...] = ()
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    gamma: float = 0.0
    color_cast: float = 0.0
    blur: float = 0.0
    even: bool = False

    @classmethod
    def from_config(cls, data, even: bool = False) -> "Augmentation":
        """From `config.data`."""
        return cls(
            cast("tuple[int, int]", tuple(int(n) for n in data.crop)), tuple(float(s) for s in data.scales),
            data.continuous_scale, data.mirror,
            tuple(tuple(pair) for pair in data.mirror_swaps), data.brightness, data.contrast, data.saturation,
            data.gamma, data.color_cast, data.blur, even,
        )  # fmt: skip


def scaled_size(n: int, scale: float) -> int:
    """Pixels of a side of `n` pixels after scaling, corners aligned."""
    return max(1, int(np.floor((n - 1) * scale + 0.5)) + 1)


def augment(
    image: np.ndarray, label: np.ndarray, spec: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scales, pads, crops, mirrors and relights one example.

    Only the part of the source that the crop shows is read, so the cost does not depend on the photograph's size.

    Args:
      image: uint8 `[H, W, 3]` RGB.
      label: uint8 `[H, W]`, 255 = void.
      spec: the augmentation.
      rng: all randomness comes from here, in a fixed order.

    Returns:
      image uint8 `[h, w, 3]`, label uint8 `[h, w]`, valid bool `[h, w]` (False = padding at the bottom and right before
      mirroring), with `(h, w) = spec.crop`.
    """
    uniform = rng.random(7)  # drawn at once: switching one option off does not change the others
    if spec.continuous_scale:
        low, high = spec.scales[0], spec.scales[-1]
        scale = low + (high - low) * uniform[0]
    else:
        scale = spec.scales[int(uniform[0] * len(spec.scales))]
    size = scaled_size(image.shape[0], scale), scaled_size(image.shape[1], scale)
    top, left = (int(u * (max(n - c, 0) + 1)) for u, n, c in zip(uniform[1:3], size, spec.crop))
    height, width = min(spec.crop[0], size[0]), min(spec.crop[1], size[1])

    out_image = np.empty((*spec.crop, 3), np.uint8)
    out_label = np.full(spec.crop, VOID, np.uint8)
    valid = np.zeros(spec.crop, bool)
    window = (top, left, height, width)
    out_image[:height, :width] = resize_window(image, size, window)
    out_label[:height, :width] = resize_label_window(label, size, window)
    valid[:height, :width] = True
    if spec.even:
        part = out_image[:height, :width]
        out_image[:height, :width] = even_light(image)[part]
    if spec.brightness or spec.contrast or spec.saturation:
        part = out_image[:height, :width]
        factors = 1 + (2 * uniform[4:7] - 1) * (spec.brightness, spec.contrast, spec.saturation)
        out_image[:height, :width] = jitter(part, *factors)
    if spec.gamma or spec.color_cast or spec.blur:
        part = out_image[:height, :width]
        drawn = 2 * rng.random(5) - 1  # after the others, which older runs drew alone
        part = relight(part, 2.0 ** (spec.gamma * drawn[0]), 1 + spec.color_cast * drawn[1:4])
        # Half of the examples stay sharp.
        out_image[:height, :width] = blur(part, max(0.0, float(spec.blur * drawn[4])))
    out_image[height:] = MEAN_COLOR
    out_image[:, width:] = MEAN_COLOR
    if spec.mirror and uniform[3] < 0.5:
        out_image, out_label, valid = out_image[:, ::-1], out_label[:, ::-1], valid[:, ::-1]
        if spec.mirror_swaps:
            out_label = swap_table(spec.mirror_swaps)[out_label]
    return out_image, out_label, valid


def even_light(photograph: np.ndarray) -> np.ndarray:
    """The table that brings a photograph to `EVEN_MEAN` and `EVEN_DEVIATION`.

    Args:
      photograph: uint8 `[H, W, 3]` RGB, the whole one: a part says less about the light.

    Returns:
      uint8 `[256]`, new values by old ones, the same for R, G and B.
    """
    mean, deviation = mean_and_deviation(photograph)
    return np.clip((np.arange(256) - mean) * (EVEN_DEVIATION / deviation) + EVEN_MEAN + 0.5, 0, 255).astype(np.uint8)


def resize_window(image: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """A window of the image resized bilinearly with aligned corners, without computing the rest.

    Args:
      image: uint8 `[H, W, 3]`.
      size: (height, width) of the whole resized image.
      window: (top, left, height, width) within it.

    Returns:
      uint8 `[height, width, 3]`, rounded.
    """
    top, left, height, width = window
    if size == image.shape[:2]:
        return image[top : top + height, left : left + width]
    y0, y1, wy = _taps(image.shape[0], size[0], top, height)
    x0, x1, wx = _taps(image.shape[1], size[1], left, width)
    first = x0[0]
    columns = image[:, first : x1[-1] + 1]
    x0, x1 = x0 - first, x1 - first
    out = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, _BAND):
        band = slice(start, start + _BAND)
        upper = columns[y0[band]].astype(np.float32)
        rows = columns[y1[band]].astype(np.float32)
        rows -= upper
        rows *= wy[band, None, None]
        rows += upper
        left_part = np.take(rows, x0, axis=1)
        right_part = np.take(rows, x1, axis=1)
        right_part -= left_part
        right_part *= wx[:, None]
        right_part += left_part
        right_part += 0.5
        out[band] = right_part
    return out


def resize_label_window(label: np.ndarray, size: tuple[int, int], window: tuple[int, int, int, int]) -> np.ndarray:
    """The same window of a label, each pixel from the nearest one: ids never blend. uint8 `[height, width]`."""
    top, left, height, width = window
    if size == label.shape:
        return label[top : top + height, left : left + width]
    rows = _nearest(label.shape[0], size[0], top, height)
    columns = _nearest(label.shape[1], size[1], left, width)
    return label[rows][:, columns]


def jitter(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Multiplies brightness, contrast (about the mean gray) and saturation (about each pixel's gray) by factors.

    Args:
      image: uint8 `[H, W, 3]` RGB.
      brightness, contrast, saturation: factors, 1 = unchanged.

    Returns:
      uint8 `[H, W, 3]`, clipped.
    """
    columns = image.reshape(len(image), -1).sum(axis=0, dtype=np.uint32)  # far faster than a mean over both axes
    mean = float(columns.reshape(-1, 3).sum(axis=0) @ _LUMA) / columns.size * 3 / len(image)
    # y = b * (c * (M x - mean) + mean), M x = s * x + (1 - s) * gray
    gray = np.float32(brightness * contrast * (1 - saturation)) * _LUMA
    own = np.float32(brightness * contrast * saturation)
    shift = np.float32(brightness * (1 - contrast) * mean + 0.5)
    out = np.empty_like(image)
    for start in range(0, len(image), _BAND):
        band = slice(start, start + _BAND)
        pixels = image[band].astype(np.float32)
        grays = pixels @ gray
        grays += shift
        pixels *= own
        pixels += grays[..., None]
        np.clip(pixels, 0, 255, out=pixels)
        out[band] = pixels
    return out


def relight(image: np.ndarray, gamma: float, gains: np.ndarray | Sequence[float]) -> np.ndarray:
    """The photograph under other light: an exposure's curve, then a color cast.

    Args:
      image: uint8 `[H, W, 3]` RGB.
      gamma: exponent of values in 0..1: below 1 lifts shadows, above 1 deepens them.
      gains: factors of R, G and B.

    Returns:
      uint8 `[H, W, 3]`, clipped.
    """
    curve = 255 * (np.arange(256) / 255) ** gamma
    tables = np.clip(np.multiply.outer(gains, curve) + 0.5, 0, 255).astype(np.uint8)
    return np.stack([table[image[..., channel]] for channel, table in enumerate(tables)], axis=-1)


def blur(image: np.ndarray, std: float) -> np.ndarray:
    """The photograph out of focus.

    Args:
      image: uint8 `[H, W, 3]` RGB.
      std: of the Gaussian, in pixels; 0 = unchanged.

    Returns:
      uint8 `[H, W, 3]`; at the border the outermost pixels are repeated.
    """
    if std <= 0:
        return image
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(std)))


def _taps(n: int, m: int, start: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Lower and upper source index and the upper's weight, for results `start .. start + count - 1` of `m`."""
    at = np.arange(start, start + count) * ((n - 1) / (m - 1) if m > 1 else 0.0)
    lower = np.minimum(at.astype(np.int64), n - 1)
    return lower, np.minimum(lower + 1, n - 1), (at - lower).astype(np.float32)


def _nearest(n: int, m: int, start: int, count: int) -> np.ndarray:
    at = np.arange(start, start + count) * ((n - 1) / (m - 1) if m > 1 else 0.0)
    return np.minimum((at + 0.5).astype(np.int64), n - 1)
