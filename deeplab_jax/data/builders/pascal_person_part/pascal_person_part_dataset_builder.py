"""PASCAL-Person-Part: six body parts and background on the VOC photographs that show people."""

from pathlib import Path

from deeplab_jax.data.builders import base
from deeplab_jax.data.builders.voc_segmentation.voc_segmentation_dataset_builder import voc_root
from deeplab_jax.errors import UserError

_LABEL_FOLDERS = ("pascal_person_part_gt", "SegmentationPart", "SegmentationClassPersonPart")
_LIST_FOLDERS = (
    "pascal_person_part_trainval_list", "ImageSets/Person_Part", "ImageSets/SegmentationPersonPart", "lists", ".",
)  # fmt: skip


class Builder(base.SegmentationBuilder):
    """1,716 training and 1,817 validation images.

    `config.data.dir` is VOC2010 or VOC2012 (or a folder above), with the DeepLab authors' `pascal_person_part_gt/*.png`
    and lists `pascal_person_part_trainval_list/{train,val}.txt` in it or beside it.
    """

    CLASS_NAMES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    VOC trainval (http://host.robots.ox.ac.uk/pascal/VOC/) and the person-part labels and lists of
    http://liangchiehchen.com/projects/DeepLab.html (pascal_person_part_gt.zip, pascal_person_part_trainval_list.zip).
    """

    def sources(self) -> dict[str, list[base.Source]]:
        try:
            root = voc_root(self.raw, "VOC2010")
        except UserError:
            root = voc_root(self.raw, "VOC2012")
        places = tuple(dict.fromkeys((self.raw, root, root.parent, root.parent.parent)))
        labels = _first(places, _LABEL_FOLDERS, lambda p: p.is_dir(), self.raw)
        lists = _first(places, _LIST_FOLDERS, lambda p: (p / "train.txt").is_file(), self.raw)
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
