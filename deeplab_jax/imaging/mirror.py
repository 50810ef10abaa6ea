"""Class ids under mirroring: left and right parts are exchanged."""

import numpy as np


def swap_table(pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """uint8 `[256]` that exchanges the two ids of each pair.

    >>> swap_table(((3, 4),))[:6].tolist()
    [0, 1, 2, 4, 3, 5]
    """
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a], table[b] = b, a
    return table
