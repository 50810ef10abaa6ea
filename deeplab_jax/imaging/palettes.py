"""The colors of the data sets' classes: uint8 `[256, 3]` RGB, entry 255 for void."""

import numpy as np

VOID = 255


def voc_palette() -> np.ndarray:
    """PASCAL VOC's 256 colors: the id's bits, lowest first, go in turn to R, G, B from their highest bit down."""
    palette = np.zeros((256, 3), np.uint8)
    ids = np.arange(256)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((ids >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def camvid_palette() -> np.ndarray:
    """CamVid's published colors of the 11 classes in SegNet's order; void black."""
    return _extend(
        [
            (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0),
            (192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192),
        ]
    )  # fmt: skip


def cityscapes_palette() -> np.ndarray:
    """Cityscapes' published colors of the 19 training classes; void black."""
    return _extend(
        [
            (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
            (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
            (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
        ]
    )  # fmt: skip


def from_colors(colors: np.ndarray) -> np.ndarray:
    """A palette that starts with `colors`, uint8 `[K, 3]`."""
    return _extend(np.asarray(colors))


def _extend(colors) -> np.ndarray:
    palette = voc_palette()
    palette[: len(colors)] = np.asarray(colors, np.uint8)
    if len(colors) <= VOID:
        palette[VOID] = (0, 0, 0)
    return palette
