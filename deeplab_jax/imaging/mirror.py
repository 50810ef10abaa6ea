"""Class ids under mirroring: left and right parts are exchanged."""

from typing import Any

import numpy as np

from deeplab_jax.errors import UserError


def checked_swaps(given: Any, num_classes: int, name: str = "config.data.mirror_swaps") -> tuple[tuple[int, int], ...]:
    """The pairs of class ids in `config.data.mirror_swaps`, or what errors call `name`; equal pairs count once.

    Raises:
      UserError: they are not pairs of whole numbers, an id is no class, or one is in two pairs.

    >>> checked_swaps([[3, 4], [4, 3]], num_classes=5)
    ((3, 4),)
    """
    where = f"{name}={given}"
    pairs = given if isinstance(given, list | tuple) else [given]
    if not all(isinstance(p, list | tuple) and len(p) == 2 and all(type(i) is int for i in p) for p in pairs):
        raise UserError(f"{where}: must be pairs of class ids, as in ((3,4),(5,6))")
    if any(not 0 <= i < num_classes for pair in pairs for i in pair):
        raise UserError(f"{where}: must name classes between 0 and {num_classes - 1}")
    different = tuple(dict.fromkeys((min(pair), max(pair)) for pair in pairs))
    ids = [i for pair in different for i in pair]
    if twice := [i for i in ids if ids.count(i) > 1]:
        raise UserError(f"{where}: names class {twice[0]} more than once; give each class one partner")
    return different


def swap_table(pairs: tuple[tuple[int, int], ...]) -> np.ndarray:
    """uint8 `[256]` that exchanges the two ids of each pair.

    >>> swap_table(((3, 4),))[:6].tolist()
    [0, 1, 2, 4, 3, 5]
    """
    table = np.arange(256, dtype=np.uint8)
    for a, b in pairs:
        table[a], table[b] = b, a
    return table
