"""PASCAL-Context: VOC 2010's train and val photographs, every pixel labelled; the 59 usual classes and background."""

import types
from pathlib import Path

import numpy as np
import scipy.io

from deeplab_jax.data.builders import base
from deeplab_jax.data.builders.voc_segmentation import voc_segmentation_dataset_builder as voc
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.classes import KNOWN
from deeplab_jax.imaging.files import CorruptImageError

# Ids of the 59 classes among the 459 labels of the original annotations, both in alphabetical order of the names.
ORIGINAL_IDS = (
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
)  # fmt: skip


class Builder(base.SegmentationBuilder):
    """4,998 training and 5,105 validation images.

    `config.data.dir` is VOC2010 (or a folder above) with either the original annotations, `trainval/*.mat`, 459 labels,
    and the lists `ImageSets/Main/{train,val}.txt`; or PNGs of ids 0..59 in `SegmentationClassContext/` with the lists
    `ImageSets/SegmentationContext/{train,val}.txt`. "" downloads the photographs and the original annotations.
    """

    CLASSES = KNOWN["pascal_context"]
    # The author's page has moved here from Stanford; the known MD5 is that of the file at the old address.
    URLS = (voc.VOC2010_URL, "https://roozbehm.info/pascal-context/trainval.tar.gz")
    MD5S = types.MappingProxyType({voc.VOC2010_URL: voc.VOC2010_MD5})
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        root = voc.voc_root(self.raw_folder, "VOC2010")
        for annotations, suffix, lists in (
            (root / "SegmentationClassContext", ".png", root / "ImageSets" / "SegmentationContext"),
            (root / "trainval", ".mat", root / "ImageSets" / "Main"),
            (self.raw_folder / "trainval", ".mat", root / "ImageSets" / "Main"),
        ):
            if annotations.is_dir():
                return {
                    split: self._split(root, annotations, suffix, lists / f"{split}.txt") for split in ("train", "val")
                }
        raise UserError(
            f"{root}: has neither SegmentationClassContext/ (PNG) nor trainval/ (.mat); "
            "extract PASCAL-Context's annotations there"
        )

    def _split(self, root: Path, annotations: Path, suffix: str, names: Path) -> list[base.Source]:
        listed = dict.fromkeys(line.split()[0] for line in base.read_names(names))
        return [
            base.Source(name, root / "JPEGImages" / f"{name}.jpg", annotations / f"{name}{suffix}") for name in listed
        ]

    def read_label(self, source: base.Source) -> np.ndarray:
        if not isinstance(source.label, Path) or source.label.suffix != ".mat":
            return super().read_label(source)
        try:
            original = np.asarray(scipy.io.loadmat(source.label)["LabelMap"], np.int64)
        except FileNotFoundError as e:
            raise UserError(f"{source.label}: no such file; extract PASCAL-Context's annotations again") from e
        except Exception as e:  # scipy raises anything on damaged files
            raise CorruptImageError(
                f"{source.label}: cannot be read as a PASCAL-Context annotation; extract it again"
            ) from e
        table = np.zeros(max(int(original.max()), *ORIGINAL_IDS) + 1, np.uint8)  # all other labels are background
        table[list(ORIGINAL_IDS)] = np.arange(1, 60)
        return table[original]
