"""MS-COCO with VOC's 20 classes, for pretraining: instances painted into class maps, poorly covered images left out."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data.annotations.coco import mask_of
from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files
from deeplab_jax.imaging.classes import KNOWN

# COCO's category id -> VOC's class id.
CATEGORIES = {
    5: 1, 2: 2, 16: 3, 9: 4, 44: 5, 6: 6, 3: 7, 17: 8, 62: 9, 21: 10, 67: 11, 18: 12, 19: 13, 4: 14, 1: 15, 64: 16,
    20: 17, 63: 18, 7: 19, 72: 20,
}  # fmt: skip
MIN_PIXELS = 200 * 200  # images in which VOC's classes cover less are left out (Zheng et al. 2015, section 7.1)


class Builder(base.SegmentationBuilder):
    """Splits train, val and trainval of COCO 2017 or 2014.

    `config.data.dir` holds `annotations/instances_{train,val}{2017,2014}.json` and the folders `train2017/` and so on;
    "" downloads 2017.
    """

    VERSION = tfds.core.Version("1.1.0")
    CLASSES = KNOWN["coco_voc"]
    URLS = (
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
        "http://images.cocodataset.org/zips/train2017.zip",
        "http://images.cocodataset.org/zips/val2017.zip",
    )
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        for year in ("2017", "2014"):
            lists = {s: self.raw_folder / "annotations" / f"instances_{s}{year}.json" for s in ("train", "val")}
            found = {split: path for split, path in lists.items() if path.is_file()}
            if found:
                self._instances: dict[str, list[dict]] = {}
                return {split: self._split(path, self.raw_folder / f"{split}{year}") for split, path in found.items()}
        raise UserError(
            f"{self.raw_folder / 'annotations'}: holds no instances_train2017.json (or 2014); check config.data.dir"
        )

    def _split(self, path: Path, folder: Path) -> list[base.Source]:
        try:
            content = json.loads(path.read_text())
            images = {image["id"]: image["file_name"] for image in content["images"]}
            instances: dict[int, list[dict]] = {}
            for annotation in content["annotations"]:
                if annotation["category_id"] in CATEGORIES:
                    kept = {name: annotation[name] for name in ("category_id", "segmentation")}
                    kept |= {"area": float(annotation["area"]), "iscrowd": bool(annotation.get("iscrowd"))}
                    instances.setdefault(annotation["image_id"], []).append(kept)
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(
                f"{path}: cannot be read as COCO's instances ({type(e).__name__}); download it again"
            ) from e
        sources = []
        for image_id, file_name in sorted(images.items()):
            mine = instances.get(image_id, [])
            if sum(a["area"] for a in mine if not a.get("iscrowd")) >= MIN_PIXELS:
                source = base.Source(Path(file_name).stem, folder / file_name, path)
                self._instances[source.name] = mine
                sources.append(source)
        return sources

    def read_label(self, source: base.Source) -> np.ndarray:
        height, width = files.size_of(str(source.image))
        try:
            return paint(self._instances[source.name], height, width)
        except (LookupError, TypeError, ValueError, OverflowError) as e:
            raise files.CorruptImageError(
                f"{source.label}: an instance of {source.name} cannot be read ({e}); download it again"
            ) from e

    def split_expression(self, split: str) -> str:
        return "train+val" if split == "trainval" else split

    def available_splits(self, stored: Sequence[str] | None = None) -> list[str]:
        stored = super().available_splits(stored)
        return [*stored, "trainval"] if len(stored) == 2 else stored


def paint(annotations: list[dict], height: int, width: int) -> np.ndarray:
    """Class map of COCO instances, uint8 `[height, width]`: large ones first, crowds are void.

    Raises:
      ValueError: an instance's outline or run lengths are damaged, or of another size.
    """
    label = np.zeros((height, width), np.uint8)
    for annotation in sorted(annotations, key=lambda a: (not a.get("iscrowd"), -a["area"])):
        value = base.VOID if annotation.get("iscrowd") else CATEGORIES[annotation["category_id"]]
        label[mask_of(annotation["segmentation"], (height, width))] = value
    return label
