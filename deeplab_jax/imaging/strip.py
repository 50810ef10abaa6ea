"""The picture of a mean field at work: the marginals after each iteration (v1, Figure 2)."""

from collections.abc import Sequence

import numpy as np

from deeplab_jax.imaging.overlay import heat, side_by_side, stack

_COLUMNS = 11  # 0 to 10 iterations side by side; more go to further rows


def iterations_strip(
    frames: np.ndarray,
    palette: np.ndarray,
    ids: Sequence[int] | np.ndarray,
    names: Sequence[str],
    max_labels: int = 3,
) -> np.ndarray:
    """Draws marginals after 0, 1, ..., T iterations.

    The first row shows each pixel in the mean of the label colors weighted by its marginals, so that uncertain pixels
    look mixed. The rows below show the marginals of the labels with the largest area, dark blue for 0, yellow for 1.

    Args:
      frames: [T + 1, h, w, C] marginals.
      palette: uint8 [256, 3].
      ids: the class ids of the C channels.
      names: by class id.
      max_labels: the maximum number of labels with a row.

    Returns:
      RGB, uint8 [H, W, 3].
    """
    colors = palette[np.asarray(ids)].astype(np.float32)
    covers = frames.mean((1, 2), dtype=np.float32).max(0)
    shown = np.sort(np.argsort(-covers, kind="stable")[:max_labels])
    rows = []
    for start in range(0, len(frames), _COLUMNS):
        block = frames[start : start + _COLUMNS].astype(np.float32)
        titles = [f"{start + n}" if start + n else "0 iterations" for n in range(len(block))]
        mixed = [np.rint(np.clip(q @ colors, 0, 255)).astype(np.uint8) for q in block]
        rows.append(side_by_side(mixed, titles))
        for channel in shown:
            maps = [heat(q[..., channel]) for q in block]
            rows.append(side_by_side(maps, [names[ids[channel]], *[""] * (len(block) - 1)]))
    return stack(rows)
