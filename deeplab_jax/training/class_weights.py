"""Class weights of the loss, given or drawn from the training labels."""

import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.data import reading
from deeplab_jax.errors import UserError
from deeplab_jax.training.losses import RULES, class_weights_from_counts
from deeplab_jax.training.reporting import say


def class_weights_for(config: ConfigDict, dataset) -> np.ndarray | None:
    """The loss's weight for each class [C], or None for none.

    `config.loss.class_weights` holds one number per class, or a rule of `losses.RULES` over the pixel counts of the
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
    """Pixels of each class over a whole data set, void left out.

    Raises:
      UserError: an example cannot be decoded and is not to be skipped, or none can.
    """
    counts = np.zeros(256, np.int64)
    for _, example in reading.readable(dataset):
        counts += np.bincount(example.label.ravel(), minlength=256)
    return counts[: dataset.num_classes].tolist()
