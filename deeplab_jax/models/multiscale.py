"""v2's multi-scale inputs: one network on the image at several sizes, score maps fused by max (v2 section 4.1)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from deeplab_jax.models.layers import resize_bilinear


def scaled_size(size: Sequence[int], scale: float, extra: int = 1) -> tuple[int, ...]:
    """Size of the image at a scale: (n - extra) * scale + extra, so 321 -> 241 at 0.75 and 161 at 0.5.

    If `extra` is the network's `Architecture.size_extra`, a side of 8k + extra keeps that form wherever k * scale is
    whole: 306 -> 154 with v1's base pools, whose 20 scores coincide with every second one of the 39.
    """
    return tuple(int((n - extra) * scale + 1e-6) + extra for n in size)


def half_pixel_size(size: Sequence[int], scale: float) -> tuple[int, ...]:
    """Size of the image at a scale with half-pixel centres, as in PyTorch: n * scale rounded down, 321 -> 240."""
    return tuple(max(1, int(n * scale + 1e-6)) for n in size)


def is_own_size(first: float, scale: float) -> bool:
    """Whether a scale's map stays at its own size: the first scale is a whole multiple of it."""
    return abs(first / scale - round(first / scale)) < 1e-6


def fuse_scales(
    network: Callable[[jax.Array, int], jax.Array],
    images: jax.Array,
    scales: Sequence[float],
    extra: int = 1,
    resize: str = "corners",
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs a network at several scales of its input.

    Args:
      network: takes a preprocessed image [B, H, W, 3] and the number of the scale; returns scores [B, h, w, C]. It is
        called once for each scale, with the same weights.
      images: [B, H, W, 3], preprocessed.
      scales: the largest first.
      extra: see `scaled_size`; "corners" only.
      resize: "corners", or "half_pixel" as deeplab-pytorch resizes images and scores. There an image at scale s reads
        exactly every (1/s)-th pixel, however its size is rounded.

    Returns:
      The maximum over scales, [B, h, w, C] at the first scale's size, and the maps one by one. With "corners" each map
      is resized to that size, except those whose scale is one over a whole number (0.5), which keep their own size,
      where the labels can be subsampled; with "half_pixel" all keep their own size.
    """
    if len(scales) == 1 and scales[0] == 1:
        return network(images, 0), ()
    own = [network(_scaled(images, s, extra, resize), i) for i, s in enumerate(scales)]
    size = own[0].shape[1:3]
    finest = [resize_bilinear(scores, size, resize) for scores in own]
    fused = finest[0]
    for scores in finest[1:]:
        fused = jnp.maximum(fused, scores)
    whole = [resize == "half_pixel" or is_own_size(scales[0], s) for s in scales]
    return fused, tuple(o if w else f for o, f, w in zip(own, finest, whole))


def _scaled(images: jax.Array, scale: float, extra: int, resize: str) -> jax.Array:
    size = images.shape[1:3]
    if resize == "corners":
        return resize_bilinear(images, scaled_size(size, scale, extra))
    return resize_bilinear(images, half_pixel_size(size, scale), resize, step=1 / scale)
