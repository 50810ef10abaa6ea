"""PASCAL VOC 2012 segmentation: train, val, trainval, test; with SBD's extra annotations train_aug and trainval_aug."""

import types
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import scipy.io

from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.classes import KNOWN
from deeplab_jax.imaging.files import CorruptImageError

VOC_URL = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar"
SBD_URL = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz"
# The photographs of PASCAL-Context and PASCAL-Person-Part. As for SBD, only the MD5 is published.
VOC2010_URL = "https://thor.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar"
VOC2010_MD5 = "da459979d0c395079b5c75ee67908abb"


class Builder(base.SegmentationBuilder):
    """20 classes and background. `config.data.dir` is VOC2012, VOCdevkit, or the folder above; "" downloads.

    The augmented splits hold the images that `ImageSets/Segmentation/train_aug.txt` (or `trainaug.txt`) names, else
    VOC's train and SBD's, else VOC's train and those of `SegmentationClassAug/`. Their labels come from
    `SegmentationClassAug/` where that folder exists (the published PNGs); otherwise VOC's own labels for VOC's images
    and SBD's `.mat` files for the others, found in `benchmark_RELEASE`, `sbd` or `SBD` beside or within
    `config.data.dir`. No image of VOC's val is ever in train_aug.
    """

    CLASSES = KNOWN["voc_segmentation"]
    URLS = (VOC_URL, SBD_URL)
    MD5S = types.MappingProxyType({SBD_URL: "82b4d87ceb2ed10f6038a1cba92111cb"})
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        root = voc_root(self.raw_folder, "VOC2012")
        lists = root / "ImageSets" / "Segmentation"
        splits = {}
        for split in ("train", "val"):
            if (lists / f"{split}.txt").is_file():
                names = base.read_names(lists / f"{split}.txt")
                splits[split] = [self._source(root, name, root / "SegmentationClass" / f"{name}.png") for name in names]
        if not splits:
            raise UserError(f"{lists}: has neither train.txt nor val.txt; config.data.dir must name the VOC2012 folder")
        augmented = self._augmented(root, lists, splits)
        if augmented:
            splits["train_aug"] = augmented
        if (lists / "test.txt").is_file():
            test = [self._source(root, name, None) for name in base.read_names(lists / "test.txt")]
            splits["test"] = [
                s for s in test if isinstance(s.image, Path) and s.image.is_file()
            ]  # the test photographs are a separate download
        return splits

    def _augmented(self, root: Path, lists: Path, splits: dict[str, list[base.Source]]) -> list[base.Source]:
        sbd = find_sbd(self.raw_folder, root)
        published = root / "SegmentationClassAug"
        train = [s.name for s in splits.get("train", [])]
        names = self._augmented_names(lists, sbd, published, train, "val" in splits)
        held = {s.name for s in splits.get("val", [])}
        sources = []
        for name in dict.fromkeys(names):
            if name in held:
                continue
            own = root / "SegmentationClass" / f"{name}.png"
            if (published / f"{name}.png").is_file():
                label = published / f"{name}.png"
            elif own.is_file():
                label = own
            elif sbd is not None and (sbd / "cls" / f"{name}.mat").is_file():
                label = sbd / "cls" / f"{name}.mat"
            else:
                raise UserError(
                    f"{root}: train_aug has '{name}', but neither SegmentationClassAug/{name}.png nor SBD's "
                    f"cls/{name}.mat is there; add either beside VOC2012, or use config.data.train_split=train"
                )
            sources.append(self._source(root, name, label))
        return sources

    def _augmented_names(
        self, lists: Path, sbd: Path | None, published: Path, train: list[str], has_val: bool
    ) -> list[str]:
        """The names in train_aug before val's are removed; empty without extra annotations."""
        for listed in (lists / "train_aug.txt", lists / "trainaug.txt"):
            if listed.is_file():
                return [Path(line.split()[0]).stem for line in base.read_names(listed)]
        if sbd is not None:
            more = {n for f in ("train.txt", "val.txt") for n in base.read_names(sbd / f)}
        elif published.is_dir():
            more = {p.stem for p in published.glob("[!.]*.png")}
        else:
            return []
        if not has_val:  # both hold images of VOC's val, which would then be used for training
            raise UserError(
                f"{lists / 'val.txt'}: no such file, so the images of val cannot be kept out of train_aug; restore "
                f"it from VOC 2012, or name the images to train on in {lists / 'train_aug.txt'}"
            )
        return train + sorted(more - set(train))

    def _source(self, root: Path, name: str, label: Path | None) -> base.Source:
        return base.Source(name, root / "JPEGImages" / f"{name}.jpg", label)

    def read_label(self, source: base.Source) -> np.ndarray:
        if isinstance(source.label, Path) and source.label.suffix == ".mat":
            return read_sbd(source.label)
        return super().read_label(source)

    def split_expression(self, split: str) -> str:
        return {"trainval": "train+val", "trainval_aug": "train_aug+val"}.get(split, split)

    def available_splits(self, stored: Sequence[str] | None = None) -> list[str]:
        stored = super().available_splits(stored)
        unions = [
            u for u in ("trainval", "trainval_aug") if all(s in stored for s in self.split_expression(u).split("+"))
        ]
        return [*stored, *unions]


def voc_root(folder: Path, year: str) -> Path:
    """The folder that holds JPEGImages, if `folder` is it, VOCdevkit, or the folder above."""
    for root in (folder, folder / year, folder / "VOCdevkit" / year):
        if (root / "JPEGImages").is_dir():
            return root
    raise UserError(f"{folder}: has no JPEGImages, nor {year} or VOCdevkit/{year} with it; check config.data.dir")


def find_sbd(folder: Path, root: Path) -> Path | None:
    """SBD's `dataset` folder (with `cls/`) in, beside or above the VOC folder; None if there is none."""
    for place in dict.fromkeys((folder, root, root.parent, root.parent.parent, folder.parent)):
        for name in ("benchmark_RELEASE/dataset", "sbd", "SBD", "SBD/dataset", "sbd/dataset", "dataset"):
            if (place / name / "cls").is_dir() and (place / name / "train.txt").is_file():
                return place / name
    return None


def read_sbd(path: Path) -> np.ndarray:
    """The class map of one SBD `.mat` file: `GTcls.Segmentation`, uint8 `[H, W]`."""
    try:
        return np.asarray(scipy.io.loadmat(path)["GTcls"]["Segmentation"][0, 0], np.uint8)
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file") from e
    except Exception as e:  # scipy raises anything on damaged files
        raise CorruptImageError(
            f"{path}: cannot be read as an SBD annotation ({type(e).__name__}); download it again"
        ) from e
