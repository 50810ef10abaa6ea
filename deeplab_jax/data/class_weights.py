"""Class weights of the loss, given or computed from the training labels."""

from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.console import say
from deeplab_jax.data import reading
from deeplab_jax.errors import UserError

# Rules for class weights and their exponent of 1 / frequency.
RULES = {"sqrt": 0.5, "fourth_root": 0.25, "median": 1.0}


def class_weights_from_counts(counts: Sequence[float], rule: str) -> list[float]:
    """Class weights from pixel counts, scaled so that the mean weight over valid pixels is 1.

    "sqrt": 1 / sqrt(frequency). "fourth_root": 1 / frequency^(1/4). "median": median frequency / frequency (Eigen and
    Fergus 2015). Classes that never occur get weight 0.

    >>> class_weights_from_counts([75, 25], "median")
    [0.666..., 2.0]
    """
    total = float(sum(counts))
    frequency = [c / total for c in counts]
    present = sorted(f for f in frequency if f > 0)
    power = RULES[rule]
    raw = [(f**-power if f > 0 else 0.0) for f in frequency]
    if not present:
        return raw
    mean = sum(w * f for w, f in zip(raw, frequency))
    return [w / mean for w in raw]


def class_weights_for(config: ConfigDict, dataset) -> np.ndarray | None:
    """The loss's weight for each class [C], or None for none.

    `config.loss.class_weights` holds one number per class, or a rule of `RULES` over the pixel counts of the
    training labels.

    Raises:
      UserError: the number of weights is not the number of classes, or the rule is unknown.
    """
    given = tuple(config.loss.class_weights)
    if not given:
        return None
    if len(given) == 1 and isinstance(given[0], str):
        if given[0] not in RULES:
            raise UserError(
                f"config.loss.class_weights={given[0]}: must be {', '.join(RULES)}, or one number per class"
            )
        weights = class_weights_from_counts(count_pixels(dataset), given[0])
        named = ", ".join(f"{n} {w:.2f}" for n, w in zip(dataset.class_names, weights))
        say(f"class weights ({given[0]}): {named}")
        return np.asarray(weights, np.float32)
    if len(given) != dataset.num_classes:
        raise UserError(f"config.loss.class_weights: has {len(given)} numbers for {dataset.num_classes} classes")
    return np.asarray(given, np.float32)


def count_pixels(dataset) -> list[int]:
    """Pixels of each class in a whole data set, excluding void.

    Raises:
      UserError: an example cannot be decoded and is not to be skipped, or none can.
    """
    counts = np.zeros(256, np.int64)
    for _, example in reading.readable(dataset):
        if example.label is None:
            raise UserError(f"{example.name}: has no label to count; choose another config.data.train_split")
        counts += np.bincount(example.label.ravel(), minlength=256)
    return counts[: dataset.num_classes].tolist()
