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


def check_class_weights(given: Sequence[object], num_classes: int) -> None:
    """Checks `config.loss.class_weights`: nothing, a rule of `RULES`, or one number per class.

    Raises:
      UserError: the rule is unknown, or the number of weights is not the number of classes.
    """
    if not given or (len(given) == 1 and isinstance(given[0], str) and given[0] in RULES):
        return
    if not all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in given):
        shown = ",".join(map(str, given))
        raise UserError(f"config.loss.class_weights={shown}: must be {', '.join(RULES)}, or one number per class")
    if len(given) != num_classes:
        raise UserError(f"config.loss.class_weights: has {len(given)} numbers for {num_classes} classes")


def class_weights_for(config: ConfigDict, dataset) -> np.ndarray | None:
    """The loss's weight for each class [C], or None for none.

    `config.loss.class_weights` holds one number per class, or a rule of `RULES` over the pixel counts of the
    training labels.

    Raises:
      UserError: see `check_class_weights`.
    """
    given = tuple(config.loss.class_weights)
    check_class_weights(given, dataset.num_classes)
    if not given:
        return None
    if isinstance(given[0], str):
        weights = class_weights_from_counts(count_pixels(dataset), given[0])
        named = ", ".join(f"{n} {w:.2f}" for n, w in zip(dataset.class_names, weights))
        say(f"class weights ({given[0]}): {named}")
        return np.asarray(weights, np.float32)
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
