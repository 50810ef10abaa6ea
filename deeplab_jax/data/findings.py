"""The findings of the data set check: every kind, whether it stops training, and what to do."""

from deeplab_jax.imaging import files, photographs

BOUNDARY_COLOR = tuple(files.VOID_COLORS[2].tolist())  # VOC's void in a palette mask converted to RGB

# kind -> (is an error, what it means and what to do)
KINDS: dict[str, tuple[bool, str]] = {
    "image missing": (True, "the list names images that do not exist"),
    "label missing": (True, "labels do not exist"),
    "unreadable image": (True, "images cannot be decoded; replace or remove them, or set config.data.on_corrupt=skip"),
    "unreadable label": (True, "labels cannot be decoded; replace or remove them, or set config.data.on_corrupt=skip"),
    "size": (True, "labels differ in size from their images; export the labels at the image's size"),
    "rgb mask": (True, "labels are RGB pictures, not class ids; give R G B for each class in config.data.classes, or "
                       "convert them to palette or gray PNGs"),
    "unknown color": (True, "labels hold colors that no class has"),
    "boundary color": (True, f"labels hold the color {BOUNDARY_COLOR}, PASCAL's boundary: a palette mask was converted "
                             "to RGB; use the original palette PNGs, where it is 255"),
    "ids": (True, "labels hold ids outside the classes; correct the labels, or name all classes"),
    "unusable label": (True, "labels cannot be used"),
    "skipped image": (False, "images cannot be decoded; they are left out (config.data.on_corrupt=skip)"),
    "skipped label": (False, "labels cannot be decoded; they are left out with their images (config.data.on_corrupt="
                             "skip)"),
    "both splits": (False, "images are in both splits (the same bytes): the evaluation will look too good"),
    "same twice": (False, "images are in their split more than once"),
    "one class": (True, "class alone occurs in the labels: there is nothing to learn; check how the masks are read"),
    "0 and 255": (False, "labels hold 0 and 255 only: 255 means void and is ignored, so only class 0 would be "
                         "learned; if 255 marks your object, give its class the color 255 255 255 in the classes "
                         "file, or renumber it to 1"),
    "no image": (True, "split holds no image, so there is nothing to evaluate; add images or set config.data."
                       "val_fraction, or train without evaluation: python -m deeplab_jax.main --mode train"),
    "reading": (False, "the meaning of the masks"),
    "empty": (False, "labels hold one class only (often an empty mask)"),
    "all void": (False, "labels are void everywhere; they contribute nothing"),
    "much void": (False, "labels are more than half void (255)"),
    "boundary void": (False, f"labels hold the color {BOUNDARY_COLOR}, PASCAL's boundary; it is read as void"),
    "lossy mask": (False, "labels have lossy compression, which invents ids near edges; use PNG"),
    "other color": (False, "palette masks show their classes' colors under other ids; they are looked up by color"),
    "unusable image": (True, "images cannot be used"),
    **{f"{row.name} image": (False, f"images {row.note}") for row in photographs.IMAGE_KINDS if row.note},
    "frames image": (False, "images have several pages or frames; the first is read"),
    "exif": (False, "images are turned by EXIF; they are read upright, so their labels must be upright too"),
    "loose mask": (False, "masks belong to no image and are not used"),
}  # fmt: skip
