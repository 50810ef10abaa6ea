"""The confusion matrix and the metrics derived from it.

Mean IoU comes from one matrix summed over the whole set, never from averages of images or batches.
"""

import numpy as np

from deeplab_jax.imaging.palettes import VOID


def confusion_matrix(
    truth: np.ndarray,
    prediction: np.ndarray,
    num_classes: int,
    group: np.ndarray | None = None,
    num_groups: int = 1,
) -> np.ndarray:
    """Counts the pixels of every (true class, predicted class), in separate groups of pixels if requested.

    Args:
      truth: [H, W] uint8, class ids; 255 is void and not counted.
      prediction: [H, W] integers in 0..num_classes-1.
      num_classes: C.
      group: [H, W] integers in 0..num_groups-1, the matrix in which a pixel counts; None = all in the first.
      num_groups: G.

    Returns:
      [G, C, C] int64, rows are the truth.

    Raises:
      ValueError: a class id is outside 0..C-1, a group outside 0..G-1, the shapes differ, or one is not of integers.
    """
    for name, values in (("truth", truth), ("prediction", prediction), ("group", group)):
        if values is not None and values.shape != truth.shape:
            raise ValueError(f"truth is {truth.shape} and the {name} is {values.shape}; they must be equal")
        if values is not None and not np.issubdtype(values.dtype, np.integer) and values.dtype != bool:
            raise ValueError(f"the {name} must consist of integers, not {values.dtype}")
    valid = truth != VOID
    t, p = truth[valid].astype(np.int64), prediction[valid].astype(np.int64)
    if t.size and (t.max() >= num_classes or t.min() < 0):
        odd = t.max() if t.max() >= num_classes else t.min()
        raise ValueError(f"the label holds class id {odd}, but there are {num_classes} classes")
    if p.size and (p.max() >= num_classes or p.min() < 0):
        raise ValueError(f"the prediction holds an id outside 0..{num_classes - 1}")
    cell = t * num_classes + p
    if group is not None:
        g = group[valid].astype(np.int64)
        if g.size and (g.max() >= num_groups or g.min() < 0):
            raise ValueError(f"the group holds an id outside 0..{num_groups - 1}")
        cell += g * num_classes**2
    counts = np.bincount(cell, minlength=num_groups * num_classes**2)
    return counts.reshape(num_groups, num_classes, num_classes).astype(np.int64)


def class_iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union per class, [C] float64; NaN for a class neither in the truth nor predicted."""
    hit = np.diagonal(confusion).astype(np.float64)
    union = confusion.sum(0) + confusion.sum(1) - hit
    return np.divide(hit, union, out=np.full(hit.shape, np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> float:
    """Mean of `class_iou` over the classes that occur in the truth or in the prediction; NaN if none does."""
    iou = class_iou(confusion)
    return float(iou[~np.isnan(iou)].mean()) if not np.isnan(iou).all() else float("nan")


def pixel_accuracy(confusion: np.ndarray) -> float:
    """The fraction of valid pixels that are correct; NaN if there are none."""
    total = confusion.sum()
    return float(np.diagonal(confusion).sum() / total) if total else float("nan")


def mean_accuracy(confusion: np.ndarray) -> float:
    """Mean, over the classes that occur in the truth, of the fraction of their pixels that are correct."""
    pixels = confusion.sum(1)
    occurs = pixels > 0
    return float((np.diagonal(confusion)[occurs] / pixels[occurs]).mean()) if occurs.any() else float("nan")


def frequency_weighted_iou(confusion: np.ndarray) -> float:
    """Mean of `class_iou`, each class weighted by its share of the true pixels."""
    pixels = confusion.sum(1)
    occurs = pixels > 0
    if not occurs.any():
        return float("nan")
    return float((class_iou(confusion)[occurs] * pixels[occurs]).sum() / pixels.sum())
