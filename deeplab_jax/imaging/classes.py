"""The names and colors of a data set's classes, defined once."""

import dataclasses

import numpy as np

from deeplab_jax.imaging.palettes import camvid_palette, cityscapes_palette, voc_palette


@dataclasses.dataclass(frozen=True)
class Classes:
    """Names and colors.

    Attributes:
      names: one for each class, including the background if it is a class, excluding void.
      palette: uint8 `[256, 3]` RGB.
    """

    names: tuple[str, ...] = ()
    palette: np.ndarray = dataclasses.field(default_factory=voc_palette)


_VOC = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
_CONTEXT = (
    "background", "aeroplane", "bag", "bed", "bedclothes", "bench", "bicycle", "bird", "boat", "book", "bottle",
    "building", "bus", "cabinet", "car", "cat", "ceiling", "chair", "cloth", "computer", "cow", "cup", "curtain",
    "dog", "door", "fence", "floor", "flower", "food", "grass", "ground", "horse", "keyboard", "light", "motorbike",
    "mountain", "mouse", "person", "plate", "platform", "pottedplant", "road", "rock", "sheep", "shelves", "sidewalk",
    "sign", "sky", "snow", "sofa", "table", "track", "train", "tree", "truck", "tvmonitor", "wall", "water", "window",
    "wood",
)  # fmt: skip
_PERSON_PART = (
    "background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs",
)  # fmt: skip
_CITYSCAPES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
_CAMVID = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
_SHAPES = (
    "background", "ball", "melon", "box", "star", "ring", "tree",
)  # fmt: skip

# The data sets of this package by `config.data.name`. `folder` is not among them: its files define the classes.
KNOWN: dict[str, Classes] = {
    "voc_segmentation": Classes(_VOC),
    "coco_voc": Classes(_VOC),
    "pascal_context": Classes(_CONTEXT),
    "pascal_person_part": Classes(_PERSON_PART),
    "cityscapes": Classes(_CITYSCAPES, cityscapes_palette()),
    "camvid": Classes(_CAMVID, camvid_palette()),
    "shapes": Classes(_SHAPES),
}
