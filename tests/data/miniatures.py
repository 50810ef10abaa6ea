"""Miniature data sets in the layouts of the real ones."""

from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image


def write_image(path: Path, height: int = 24, width: int = 32, seed: int = 0, **save) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *path.name.encode()])
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(path, **save)
    return path


def write_label(path: Path, label: np.ndarray, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(label, np.uint8))
    if mode == "P":
        image.putpalette([c for i in range(256) for c in (i, 255 - i, i // 2)])
    image.save(path)
    return path


def write_sbd(path: Path, label: np.ndarray) -> None:
    """A class map as SBD's `cls/*.mat` hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    annotation = np.zeros((1, 1), [("Segmentation", object)])
    annotation["Segmentation"][0, 0] = label
    scipy.io.savemat(path, {"GTcls": annotation})


def blocks(*ids: int, height: int = 24, width: int = 32) -> np.ndarray:
    """A label of vertical stripes of these ids, uint8 [height, width]."""
    return np.array(ids, np.uint8)[np.arange(width) * len(ids) // width][None].repeat(height, 0)


def make_camvid(folder: Path, train: int = 6, val: int = 2) -> Path:
    for split, count in (("train", train), ("val", val)):
        names = [f"{'AB'[i % 2]}_{split}{i:03d}" for i in sorted(range(count), key=lambda i: (i % 2, i))]
        for i, name in enumerate(names):
            write_image(folder / split / f"{name}.png", seed=i)
            write_label(folder / f"{split}annot" / f"{name}.png", blocks(i % 11, 3, 11))
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


def make_voc(folder: Path, lists: dict[str, list[str]] | None = None) -> Path:
    """VOCdevkit/VOC2012 with a palette label for each listed name."""
    root = folder / "VOCdevkit" / "VOC2012"
    lists = lists or {"train": ["2007_1", "2007_2"], "val": ["2007_3"]}
    (root / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split, names in lists.items():
        (root / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names))
        for name in names:
            write_image(root / "JPEGImages" / f"{name}.jpg")
            if split != "test":
                write_label(root / "SegmentationClass" / f"{name}.png", blocks(0, 255, 15), mode="P")
    return root
