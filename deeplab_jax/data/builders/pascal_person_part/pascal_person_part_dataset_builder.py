"""PASCAL-Person-Part: six body parts and background on the VOC photographs that show people."""

import types
from pathlib import Path

from deeplab_jax.data.builders import base
from deeplab_jax.data.builders.voc_segmentation import voc_segmentation_dataset_builder as voc
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.classes import KNOWN

# The first of each is the layout of the authors' archive.
_LABEL_FOLDERS = (
    "pascal_person_part/pascal_person_part_gt", "pascal_person_part_gt", "SegmentationPart",
    "SegmentationClassPersonPart",
)  # fmt: skip
_LIST_FOLDERS = (
    "pascal_person_part/pascal_person_part_trainval_list", "pascal_person_part_trainval_list", "ImageSets/Person_Part",
    "ImageSets/SegmentationPersonPart", "lists", ".",
)  # fmt: skip


class Builder(base.SegmentationBuilder):
    """1,716 training and 1,817 validation images.

    `config.data.dir` is VOC2010 or VOC2012 (or a folder above), with the DeepLab authors' `pascal_person_part_gt/*.png`
    and lists `pascal_person_part_trainval_list/{train,val}.txt` in it or beside it, or their `pascal_person_part/` with
    both. "" downloads these and VOC 2010.
    """

    CLASSES = KNOWN["pascal_person_part"]
    URLS = (voc.VOC2010_URL, "http://liangchiehchen.com/data/pascal_person_part.zip")
    MD5S = types.MappingProxyType({voc.VOC2010_URL: voc.VOC2010_MD5})
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        try:
            root = voc.voc_root(self.raw_folder, "VOC2010")
        except UserError:
            root = voc.voc_root(self.raw_folder, "VOC2012")
        places = tuple(dict.fromkeys((self.raw_folder, root, root.parent, root.parent.parent)))
        labels = _first(places, _LABEL_FOLDERS, lambda p: p.is_dir(), self.raw_folder)
        lists = _first(places, _LIST_FOLDERS, lambda p: (p / "train.txt").is_file(), self.raw_folder)
        return {split: self._split(root, labels, lists / f"{split}.txt") for split in ("train", "val")}

    def _split(self, root: Path, labels: Path, names: Path) -> list[base.Source]:
        listed = [Path(line.split()[0]).stem for line in base.read_names(names)]
        return [base.Source(name, root / "JPEGImages" / f"{name}.jpg", labels / f"{name}.png") for name in listed]


def _first(places, names, there, raw: Path) -> Path:
    for place in places:
        for name in names:
            if there(place / name):
                return place / name
    raise UserError(f"{raw}: has none of {', '.join(names)}; see {__name__.rsplit('.', 1)[-1]}.py for the layout")
