"""v2's multi-scale inputs: one network on the image at several sizes, score maps fused by max (v2 section 4.1)."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from deeplab_jax.models.layers import resize_bilinear


def scaled_size(size: Sequence[int], scale: float) -> tuple[int, int]:
    """Size of the image at a scale, aligned corners: (n - 1) * scale + 1, so 321 -> 241 at 0.75 and 161 at 0.5."""
    return tuple(int((n - 1) * scale + 1e-6) + 1 for n in size)


def fuse_scales(
    network: Callable[[jax.Array, int], jax.Array], images: jax.Array, scales: Sequence[float]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Runs a network at several scales of its input.

    Args:
      network: takes a preprocessed image [B, H, W, 3] and the number of the scale; returns scores [B, h, w, C]. It is
        called once for each scale, with the same weights.
      images: [B, H, W, 3], preprocessed.
      scales: the largest first.

    Returns:
      The maximum over scales, [B, h, w, C] at the first scale's size, and the maps one by one: each brought to that
      size, but those whose scale is one over a whole number (0.5) at their own, where the labels can be subsampled.
    """
    if len(scales) == 1 and scales[0] == 1:
        return network(images, 0), ()
    own = [network(resize_bilinear(images, scaled_size(images.shape[1:3], s)), i) for i, s in enumerate(scales)]
    size = own[0].shape[1:3]
    finest = [resize_bilinear(scores, size) for scores in own]
    fused = finest[0]
    for scores in finest[1:]:
        fused = jnp.maximum(fused, scores)
    whole = [abs(scales[0] / s - round(scales[0] / s)) < 1e-6 for s in scales]
    return fused, tuple(o if w else f for o, f, w in zip(own, finest, whole))
