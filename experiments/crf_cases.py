"""Scores to refine without a trained network, and pydensecrf2 to compare with."""

import numpy as np
from PIL import Image

from deeplab_jax.crf import CRFParams


def scores(image: np.ndarray, labels: int = 11, seed: int = 0) -> np.ndarray:
    """-log P [H, W, labels], float32: color clusters, as a network of stride 8 might see them."""
    rng = np.random.default_rng(seed)
    pixels = image.reshape(-1, 3).astype(np.float32)
    centers = pixels[rng.choice(len(pixels), labels, replace=False)]
    for _ in range(8):
        nearest = ((pixels[:, None] - centers) ** 2).sum(-1).argmin(1)
        centers = np.stack(
            [pixels[nearest == c].mean(0) if (nearest == c).any() else centers[c] for c in range(labels)]
        )
    height, width = image.shape[:2]
    sampled = nearest.reshape(height, width)[4::8, 4::8]
    logits = 4.0 * np.eye(labels)[sampled] + rng.normal(0, 0.7, (*sampled.shape, labels))
    grow = lambda x: Image.fromarray(x.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)  # noqa: E731
    grown = [np.asarray(grow(logits[..., c])) for c in range(labels)]
    logits = np.stack(grown, -1)
    logits -= logits.max(-1, keepdims=True)
    return (np.log(np.exp(logits).sum(-1, keepdims=True)) - logits).astype(np.float32)


def peer(
    unary: np.ndarray, image: np.ndarray, params: CRFParams, normalization: str = "symmetric", iterations: int = 10
) -> np.ndarray | None:
    """pydensecrf2's marginals [H, W, C], or None if it is not installed."""
    try:
        from pydensecrf import densecrf
    except ImportError:
        return None
    height, width, labels = unary.shape
    kind = {"symmetric": densecrf.NORMALIZE_SYMMETRIC, "after": densecrf.NORMALIZE_AFTER}[normalization]
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(-1, labels).T))
    crf.addPairwiseGaussian(sxy=params.gaussian_xy_std, compat=params.gaussian_weight, normalization=kind)
    crf.addPairwiseBilateral(
        sxy=params.bilateral_xy_std,
        srgb=params.bilateral_rgb_std,
        rgbim=np.array(image),
        compat=params.bilateral_weight,
        normalization=kind,
    )
    return np.array(crf.inference(iterations)).T.reshape(unary.shape)
