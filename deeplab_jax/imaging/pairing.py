"""Matching masks to photographs by name, for data sets and `refine`."""

import sys
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.decoding import IMAGE_SUFFIXES
from deeplab_jax.imaging.listing import walk

# Endings and prefixes that tools give to masks' names, and endings of photographs' names.
MASK_ENDINGS = (
    "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation", "_annotation", "_groundtruth",
    "-mask", "-label", "_gtfine_labelids", "_gtfine_labeltrainids",
)  # fmt: skip
PROBABILITY_ENDINGS = ("_probs", "_prob", "_probabilities")
MASK_BEGINNINGS = ("mask_", "label_", "seg_", "gt_", "mask-")
IMAGE_ENDINGS = ("_image", "_img", "_rgb", "_sat", "_leftimg8bit")
# Folders of photographs or of masks within one folder of data: `train/images/a.jpg` and `train/masks/a.png`.
IMAGE_FOLDERS = frozenset({"images", "image", "imgs", "img", "jpegimages", "photos"})
MASK_FOLDERS = frozenset({"masks", "mask", "labels", "label", "annotations", "segmentationclass", "gt"})
_PHOTOGRAPHS_ONLY = (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif")


class Affixes:
    """How masks are named after their photographs.

    Args:
      prefix, suffix: text before and after a photograph's name (without a suffix such as .png) in its mask's name;
        both empty = the names that tools give.
      endings: endings that tools give to these masks' names.
    """

    def __init__(self, prefix: str = "", suffix: str = "", endings: Sequence[str] = MASK_ENDINGS):
        self.endings = endings
        ending = PurePosixPath(f"x{suffix}").suffix.lower()
        self.prefix = normal(prefix)
        self.suffix = normal(suffix[: len(suffix) - len(ending)] if ending in IMAGE_SUFFIXES else suffix)
        self.given = bool(prefix or suffix)

    def bases(self, stem: str) -> list[str]:
        """The photographs' names that a mask of this name may belong to, the likeliest first.

        >>> Affixes().bases("day/a.jpg_mask")
        ['day/a.jpg_mask', 'day/a.jpg', 'day/a']
        """
        folder, name = split(normal(stem))
        low = name.casefold()
        if self.given:
            fits = name.startswith(self.prefix) and name.endswith(self.suffix)
            names = [name[len(self.prefix) : len(name) - len(self.suffix)]] if fits else []
        else:
            names = [name, *(name[: -len(e)] for e in self.endings if low.endswith(e))]
            names += [name[len(b) :] for b in MASK_BEGINNINGS if low.startswith(b)]
        names += [n[: -len(ending)] for n in names if (ending := PurePosixPath(n).suffix).lower() in IMAGE_SUFFIXES]
        return [folder + n for n in dict.fromkeys(names) if n]


def normal(name: str) -> str:
    """A name in the form used for comparison: one of the several Unicode spellings."""
    return unicodedata.normalize("NFC", name)


def split(name: str) -> tuple[str, str]:
    """(folder with its slash, last part).

    >>> split("a/b/c"), split("c")
    (('a/b/', 'c'), ('', 'c'))
    """
    folder, slash, last = name.rpartition("/")
    return folder + slash, last


def stems(
    folder: Path, exclude: Path | None = None, suffixes: Iterable[str] = IMAGE_SUFFIXES
) -> list[tuple[str, Path]]:
    """(path below `folder` without suffix, file) of every image below it, in the order of the paths."""
    return [(p.relative_to(folder).with_suffix("").as_posix(), p) for p in walk(folder, suffixes, exclude)]


def photographs_and_masks(
    images: Path, masks: Path, affixes: Affixes, suffixes: Iterable[str] = IMAGE_SUFFIXES
) -> tuple[list[tuple[str, Path]], list[tuple[str, Path]]]:
    """The photographs and the masks of two folders, or of one that holds both; see `stems`.

    Args:
      suffixes: the masks' suffixes.
    """
    here, there = images.resolve(), masks.resolve()
    if here == there and set(suffixes) & set(IMAGE_SUFFIXES):
        return told_apart(stems(images), affixes)
    photographs = stems(images, there if here in there.parents else None)
    return photographs, stems(masks, here if there in here.parents else None, suffixes)


class Masks:
    """Masks, indexed by the names of the photographs that they may belong to.

    Args:
      candidates: (path below their folder without suffix, file), as returned by `stems`.
    """

    def __init__(self, candidates: Iterable[tuple[str, Path]], affixes: Affixes):
        self._by_name: dict[str, dict[int, list[Path]]] = {}
        for stem, path in candidates:
            for rank, base in enumerate(affixes.bases(stem)):
                self._by_name.setdefault(base, {}).setdefault(min(rank, 1), []).append(path)

    def of(self, stem: str, image: Path) -> Path | None:
        """The mask of a photograph, whose path below its folder is `stem`; None if there is none.

        Raises:
          UserError: there are two candidates.
        """
        folder, name = split(normal(stem))
        shorter = [name[: -len(e)] for e in IMAGE_ENDINGS if name.casefold().endswith(e)]
        for base in (name, *shorter):
            ranks = self._by_name.get(folder + base, {})
            for rank in sorted(ranks):
                found = [p for p in ranks[rank] if p != image]
                if len(found) > 1:
                    raise UserError(
                        f"{found[0]} and {found[1].name}: may both be the mask of {image}; remove one (or, "
                        "in a data set, name the masks' ending with config.data.mask_suffix)"
                    )
                if found:
                    return found[0]
        return None


def pair_folders(images: Path, masks: Path, affixes: Affixes) -> tuple[list[tuple[str, Path, Path | None]], list[Path]]:
    """Pairs the photographs below a folder with the masks below another, or below the same one.

    Returns:
      ((name, photograph, its mask or None) in the order of the photographs, masks of no photograph).

    Raises:
      UserError: two photographs with one name, or two masks for one photograph.
    """
    photographs, candidates = photographs_and_masks(images, masks, affixes)
    refuse_doubles(photographs)
    if not affixes.given:
        refuse_doubles(candidates)
    by_name = Masks(candidates, affixes)
    pairs = [(stem, path, by_name.of(stem, path)) for stem, path in photographs]
    stems_of = {path: stem for stem, path in candidates}

    def rank(stem: str, mask: Path) -> int:
        """How likely the mask's name makes it the photograph's: 0 = most."""
        bases = affixes.bases(stems_of[mask])
        return bases.index(normal(stem)) if normal(stem) in bases else len(bases)  # shortened: a_img for a

    # A missing mask is not replaced by another photograph's: seg_b.png is seg_b.jpg's, not b.jpg's.
    best: dict[Path, int] = {}
    for stem, _, found in pairs:
        if found is not None:
            best[found] = min(best.get(found, sys.maxsize), rank(stem, found))
    pairs = [(stem, path, found if found and rank(stem, found) == best[found] else None) for stem, path, found in pairs]
    used = {found for _, _, found in pairs}
    return pairs, [path for _, path in candidates if path not in used]


def told_apart(files: Sequence[tuple[str, Path]], affixes: Affixes):
    """(photographs, masks) of one folder: masks are named after a photograph, or are the PNG beside a JPEG."""
    apart = _by_folder(files)
    if apart:
        return apart
    names = {normal(stem) for stem, _ in files}
    endings: dict[str, set[str]] = {}
    for stem, path in files:
        endings.setdefault(normal(stem), set()).add(path.suffix.lower())
    photographs: list[tuple[str, Path]] = []
    masks: list[tuple[str, Path]] = []
    for stem, path in files:
        bases = affixes.bases(stem)
        own = normal(stem)
        after = any(base != own and _is_photograph(base, names) for base in bases)
        beside = not affixes.given and len(endings[own]) == 2 and path.suffix.lower() not in _PHOTOGRAPHS_ONLY
        beside = beside and bool(endings[own] & set(_PHOTOGRAPHS_ONLY))
        (masks if after or beside else photographs).append((stem, path))
    return photographs, masks


def _by_folder(files: Sequence[tuple[str, Path]]):
    """(photographs, masks) by the folders that contain them, removed from their stems; None if some are elsewhere."""
    photographs: list[tuple[str, Path]] = []
    masks: list[tuple[str, Path]] = []
    for stem, path in files:
        *folders, name = stem.split("/")
        lowered = {folder.casefold() for folder in folders}
        if not lowered & (IMAGE_FOLDERS | MASK_FOLDERS):
            return None
        kept = [f for f in folders if f.casefold() not in IMAGE_FOLDERS | MASK_FOLDERS]
        (masks if lowered & MASK_FOLDERS else photographs).append(("/".join([*kept, name]), path))
    return (photographs, masks) if photographs and masks else None


def _is_photograph(base: str, names: set[str]) -> bool:
    return base in names or any(base + ending in names for ending in IMAGE_ENDINGS)


def refuse_doubles(files: Iterable[tuple[str, Path]]) -> None:
    """Raises `UserError` if two of the (name without suffix, path) have one name."""
    seen: dict[str, Path] = {}
    for stem, path in files:
        first = seen.setdefault(normal(stem), path)
        if first is not path:
            raise UserError(
                f"{first} and {path.name}: have the same name except for the suffix; rename or remove one of them"
            )
