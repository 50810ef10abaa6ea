"""A photograph's light: mean and deviation of its pixels."""

import numpy as np

_SAMPLE = 65_536  # pixels that tell it


def mean_and_deviation(photograph: np.ndarray) -> tuple[float, float]:
    """Over all channels, of at least 65,536 pixels evenly spread; the deviation at least 1.

    Args:
      photograph: uint8 `[H, W, 3]`.

    >>> mean_and_deviation(np.uint8([[[10, 20, 30], [30, 20, 10]]]))
    (20.0, 8.16496580927726)
    """
    step = max(1, int(np.sqrt(photograph.size / 3 / _SAMPLE)))
    counts = np.bincount(photograph[::step, ::step].reshape(-1), minlength=256)
    values = np.arange(256)
    mean = np.average(values, weights=counts)
    return float(mean), max(1.0, float(np.sqrt(np.average((values - mean) ** 2, weights=counts))))
