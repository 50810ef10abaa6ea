"""Masks of other tools: colors or palettes of PASCAL VOC's kind with a list of labels, and one mask for each class."""

from pathlib import Path

import numpy as np

from deeplab_jax.data import class_files
from deeplab_jax.data.annotations.drawing import Annotated, Annotations, Area, progress
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import masks, pairing
from deeplab_jax.imaging.decoding import IMAGE_SUFFIXES

# Folders beside each other that hold no class each: photographs, masks (of Supervisely, too), and splits.
_NO_CLASSES = pairing.IMAGE_FOLDERS | pairing.MASK_FOLDERS | {"masks_machine", "masks_human", "train", "val", "test"}
_LISTS = ("labelmap.txt", "label_colors.txt", "classes.txt", "class_dict.csv", "obj_class_to_machine_color.json")


def class_list(folder: Path) -> Path | None:
    """The list of labels beside the masks, or in the folder above them."""
    found = (place / name for place in (folder, folder.parent) for name in _LISTS)
    return next((path for path in found if path.is_file()), None)


def colored_masks(folder: Path) -> Path:
    """The folder of the masks: VOC's SegmentationClass, or the folder itself."""
    inner = folder / "SegmentationClass"
    return inner if inner.is_dir() else folder


def read_colored(
    folder: Path, classes: Path, exclude: Path | None = None
) -> tuple[tuple[str, ...], np.ndarray | None, list[tuple[str, Path]]]:
    """(names, colors, masks) of a folder of masks, each with its name without suffix; photographs are left out.

    Args:
      folder: the masks', or one with photographs among or beside them.
      classes: its list of labels.
      exclude: as of `walk`.

    Raises:
      UserError: two masks have one name, or there is a folder of photographs and none of masks.
    """
    names, colors = class_files.read_classes(classes)
    inside = pairing.stems(colored_masks(folder), exclude)
    masks = pairing.told_apart(inside, pairing.Affixes())[1] or inside
    inner = {part.casefold() for stem, _ in masks for part in stem.split("/")[:-1]}
    if inner & pairing.IMAGE_FOLDERS:
        raise UserError(f"{folder}: holds photographs beside the masks; name the folder of the masks")
    stems: dict[str, Path] = {}
    for stem, path in masks:
        if stems.setdefault(stem, path) != path:
            raise UserError(f"{stems[stem]} and {path.name}: would become one mask; rename or remove one of them")
    return names, colors, masks


def folders_of_classes(folder: Path, exclude: Path | None = None) -> list[Path]:
    """The subfolders but `exclude`, if each holds the masks of one class; otherwise []."""
    inner = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and p.resolve() != exclude)
    if any(p.name.casefold() in _NO_CLASSES for p in inner):
        return []
    stems = [{stem for stem, _ in pairing.stems(p, exclude)} for p in inner]
    shared = len(stems) > 1 and all(stems) and len(set.union(*stems)) < sum(map(len, stems))
    beside = any(p.is_file() and p.suffix.lower() in IMAGE_SUFFIXES for p in folder.iterdir())
    return inner if shared and not beside else []


def read_classes_apart(folders: list[Path], exclude: Path | None = None) -> Annotations:
    """One mask for each class: nonzero pixels belong to it; in overlaps, to the later one in alphabetical order."""
    by_image: dict[str, list[tuple[str, Path]]] = {}
    for folder in folders:
        for stem, path in pairing.stems(folder, exclude):
            by_image.setdefault(stem, []).append((folder.name, path))
    images = []
    for stem, parts in progress(sorted(by_image.items())):
        areas = [Area.of(name, _inside(path)) for name, path in parts]
        sizes = {area.size for area in areas}
        if len(sizes) > 1:
            raise UserError(f"{parts[0][1]}: differs in size from the mask of another class of its image")
        images.append(Annotated(f"{stem}.png", areas[0].size, areas))
    return Annotations([folder.name for folder in folders if folder.name != "background"], None, images)


def _inside(path: Path) -> np.ndarray:
    stored = masks.read_stored(path)
    on = stored.shown % 256 >= 128 if stored.lossy else stored.values != 0
    return on[stored.inverse]
