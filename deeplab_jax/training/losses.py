"""Cross-entropy over score positions, as sums and counts that add up over devices and micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from deeplab_jax.imaging.palettes import VOID
from deeplab_jax.models.layers import resize_bilinear

STRIDES = (1, 2, 4, 8, 16, 32)  # of score maps over labels


def subsample_labels(labels: Array, size: tuple[int, int], resize: str = "corners") -> Array:
    """Labels at the positions of a smaller score map: `label[::s, ::s]`.

    With half-pixel centres it is the label nearest to each position's centre, floor((i + 1/2) H / h), as in
    deeplab-pytorch.

    Never interpolated, so void (255) cannot blend with a class.

    Args:
      labels: [B, H, W] integers.
      size: (h, w) of the score map; with "corners" h = (H - 1) // s + 1 for a whole stride s, and w likewise.
      resize: `config.model.resize`.

    Returns:
      [B, h, w], labels unchanged.

    Raises:
      ValueError: no whole stride takes H, W to h, w.
    """
    height, width = labels.shape[1:3]
    if resize == "half_pixel":
        rows, columns = (((2 * np.arange(m) + 1) * n) // (2 * m) for n, m in zip((height, width), size))
        return labels[:, rows][:, :, columns]
    for stride in STRIDES:
        if ((height - 1) // stride + 1, (width - 1) // stride + 1) == tuple(size):
            return labels[:, ::stride, ::stride]
    raise ValueError(f"no whole stride takes labels of {height} x {width} to scores of {size[0]} x {size[1]}")


def cross_entropy_sum(log_probs: Array, labels: Array, class_weights: Array | None = None) -> Array:
    """Sum over valid positions of -log P(label), weighted by class.

    Args:
      log_probs: [B, h, w, C] log-probabilities.
      labels: [B, h, w] integers, 255 = void.
      class_weights: [C] or None.

    Returns:
      A float32 scalar; 0 if nothing is valid.
    """
    valid = labels != VOID
    target = jnp.where(valid, labels, 0).astype(jnp.int32)
    # A one-hot product instead of a gather: its gradient is dense, where a gather's is a slow scatter.
    one_hot = jax.nn.one_hot(target, log_probs.shape[-1], dtype=log_probs.dtype)
    weight = valid.astype(jnp.float32)
    if class_weights is not None:
        weight = weight * class_weights[target]
    return -jnp.sum(jnp.sum(one_hot * log_probs, axis=-1) * weight)


def valid_count(labels: Array) -> Array:
    """Number of positions of `labels` [B, h, w] that are not void, as float32."""
    return jnp.sum(labels != VOID).astype(jnp.float32)


def named_score_maps(logits: Array, out: dict) -> dict[str, Array]:
    """The score maps that carry a loss, as log-probabilities [B, h, w, C], by their names in the log.

    The papers' multi-scale networks have four losses: fused, and one for each of the scales 1, 0.75, 0.5 (v2
    section 4.1). With a mean-field CRF inside the model, "crf" is the loss after the unrolled iterations.
    """
    maps = {"fused" if len(out.get("scales", ())) > 1 else "scores": jax.nn.log_softmax(logits)}
    if len(out.get("scales", ())) > 1:
        maps |= {f"scale_{i}": jax.nn.log_softmax(scores) for i, scores in enumerate(out["scales"])}
    if "log_marginals" in out:
        maps["crf"] = out["log_marginals"]
    return maps


def labels_for(name: str, labels: Array, size: tuple[int, int], at: str, resize: str = "corners") -> Array:
    """Labels [B, H, W] for the map `name` of (h, w): subsampled to it (`at` "scores"), or whole (`at` "pixels").

    The CRF's map has the positions of the image sampled at its stride, however scores are resized.
    """
    return labels if at == "pixels" else subsample_labels(labels, size, "corners" if name == "crf" else resize)


def at_pixels(scores: Array, size: tuple[int, int], resize: str = "corners") -> Array:
    """Scores [B, h, w, C] enlarged to the labels' size, each position at its own pixel.

    With "corners" a map of stride s has the pixels 0, s, 2 s, ... If s does not divide the last pixel's number, the map
    ends before it, and its last scores are repeated, or beyond it, and is cut off. Where no whole stride takes one size
    to the other, the corners coincide.
    """
    if resize == "half_pixel":
        return resize_bilinear(scores, size, resize)
    reached = tuple(_reached(m, n) for m, n in zip(scores.shape[1:3], size, strict=True))
    whole = resize_bilinear(scores, reached, resize)[:, : size[0], : size[1]]
    lacking = [(0, n - m) for m, n in zip(whole.shape[1:3], size, strict=True)]
    return jnp.pad(whole, ((0, 0), *lacking, (0, 0)), mode="edge") if any(n for _, n in lacking) else whole


def _reached(positions: int, pixels: int) -> int:
    """Pixels from the first to the last of a map's positions along a side.

    On sides 8 k + 2 the positions of v1's base pools lie half a pixel further (v1 section 3): the corners coincide.
    """
    last = pixels - 1
    stride = next((s for s in STRIDES if positions - 1 in (last // s, -(-last // s))), None)
    if stride is None or last % stride < 2:
        return pixels
    return (positions - 1) * stride + 1


def loss_sums(
    maps: dict[str, Array],
    labels: Array,
    at: str,
    class_weights: Array | None = None,
    crf_class_weights: bool = True,
    resize: str = "corners",
) -> dict[str, Array]:
    """Cross-entropy sum of each score map against its labels; see `labels_for` and `cross_entropy_sum`.

    Class weights already shift the scores, and so the CRF's unary, towards rare classes; `crf_class_weights` decides
    whether they also count in the loss after the CRF.
    """
    sums = {}
    for name, log_probs in maps.items():
        if at == "pixels":
            whole = at_pixels(log_probs, (labels.shape[1], labels.shape[2]), "corners" if name == "crf" else resize)
            log_probs = jax.nn.log_softmax(whole)
        target = labels_for(name, labels, (log_probs.shape[1], log_probs.shape[2]), at, resize)
        sums[name] = cross_entropy_sum(log_probs, target, class_weights if name != "crf" or crf_class_weights else None)
    return sums
