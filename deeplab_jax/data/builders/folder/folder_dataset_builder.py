"""Anybody's own data: a folder (or list) of images, a folder (or list) of masks, and optionally a file of classes."""

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from deeplab_jax.data import caching
from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_text
from deeplab_jax.imaging import files, palettes

# Endings that tools add to a mask's name.
_MASK_ENDINGS = (
    "_mask",
    "_masks",
    "_label",
    "_labels",
    "_gt",
    "_seg",
    "_segmentation",
    "_annotation",
    "-mask",
    "-label",
)


class Builder(base.SegmentationBuilder):
    """Splits train and val (and all), by `config.data.val_fraction` and the seed, or by lists of names.

    `config.data.images` and `.masks` are folders, searched with their subfolders, or text files with one path a line;
    both relative to `config.data.dir` where that is set. A mask belongs to the image of the same relative name without
    suffix (an ending such as `_mask` may follow); lines of two list files correspond. `config.data.classes` has one
    name a line, optionally followed by R G B; without it the classes are the ids that the masks hold.
    """

    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        images = self._paths("images")
        masks = self._paths("masks")
        if isinstance(images, list) != isinstance(masks, list):
            raise UserError("config.data.images and config.data.masks: must both be folders or both be list files")
        if isinstance(images, list):
            if len(images) != len(masks):
                raise UserError(
                    f"{self.options.masks}: has {len(masks)} lines, but {self.options.images} has {len(images)}; "
                    "line n of the one must belong to line n of the other"
                )
            sources = [base.Source(i.with_suffix("").as_posix().lstrip("/"), i, m) for i, m in zip(images, masks)]
        else:
            sources = _pair(images, masks, self.options.images, self.options.masks)
        self._warn_of_loose_masks(sources, masks)
        return {"images": sources}

    def _download(self, dl_manager) -> None:
        return None  # nothing to download: the options say where everything is

    def class_names(self) -> tuple[str, ...]:
        return self._classes()[0]

    def palette(self) -> np.ndarray:
        colors = self._classes()[1]
        return palettes.voc_palette() if colors is None else palettes.from_colors(colors)

    def read_label(self, source: base.Source) -> np.ndarray:
        return files.read_label(base.read_bytes(source.label), str(source.label), self.mask_colors())

    def mask_colors(self) -> np.ndarray | None:
        return self._classes()[1] if self.options.classes else None

    def extra_files(self) -> list[Path]:
        return [self._resolve("classes")] if self.options.classes else []

    def available_splits(self, stored: Sequence[str] | None = None) -> list[str]:
        return ["train", "val", "all"]

    def split_expression(self, split: str) -> str:
        return "images"

    def select(self, split: str, seed: int) -> np.ndarray | None:
        """The train or val part of all examples: named by the lists, or a share drawn by the seed."""
        if split == "all":
            return None
        names = [s.name for s in self.sources()["images"]]
        lists = {"train": self.options.train_list, "val": self.options.val_list}
        if lists[split]:
            return self._listed(f"{split}_list", names)
        other = "val" if split == "train" else "train"
        if lists[other]:
            return np.setdiff1d(np.arange(len(names)), self._listed(f"{other}_list", names))
        fraction = self.options.val_fraction
        if not 0 <= fraction < 1:
            raise UserError(f"config.data.val_fraction={fraction}: must be at least 0 and below 1")
        count = min(max(1, round(fraction * len(names))), len(names) - 1) if fraction else 0
        order = np.random.default_rng([seed, 77]).permutation(len(names))
        return np.sort(order[:count] if split == "val" else order[count:])

    def _listed(self, field: str, names: list[str]) -> np.ndarray:
        """The examples that a list names, in its order, each once."""
        path = self._resolve(field)
        find = _Names(names)
        chosen: dict[int, None] = {}
        for line in base.read_names(path):
            found = find(line) or find(_first_of_pair(line))
            if not found:
                raise UserError(f"{path}: names '{line}', but there is no such image in {self.options.images}")
            if len(found) > 1:
                several = " and ".join(f"'{names[i]}'" for i in found[:2])
                raise UserError(f"{path}: '{line}' may be {several} in {self.options.images}; write its folder too")
            chosen[found[0]] = None
        return np.array(list(chosen))

    def _resolve(self, field: str) -> Path:
        value = getattr(self.options, field)
        if not value:
            raise UserError(f"config.data.{field} is not set; give a folder or a list file")
        path = Path(value).expanduser()
        return path if path.is_absolute() or self.raw is None else self.raw / path

    def _paths(self, field: str) -> dict[str, Path] | list[Path]:
        """Relative name -> file of a folder, or the files that a list names."""
        path = self._resolve(field)
        if path.is_file():
            listed = [Path(line).expanduser() for line in base.read_names(path)]
            return [p if p.is_absolute() else path.parent / p for p in listed]
        if not path.is_dir():
            raise UserError(f"config.data.{field}={getattr(self.options, field)}: no such folder or list file")
        found: dict[str, Path] = {}
        for p in sorted(path.rglob("*")):
            if p.suffix.lower() in files.IMAGE_SUFFIXES and not p.name.startswith("."):
                first = found.setdefault(p.relative_to(path).with_suffix("").as_posix(), p)
                if first is not p:
                    raise UserError(
                        f"{first} and {p.name}: have the same name but for the suffix; rename one of them or remove it"
                    )
        if not found:
            raise UserError(f"config.data.{field}={path}: holds no image ({', '.join(files.IMAGE_SUFFIXES)})")
        return found

    def _warn_of_loose_masks(self, sources: list[base.Source], masks) -> None:
        used = {s.label for s in sources}
        self.loose_masks = [p for p in (masks.values() if isinstance(masks, dict) else masks) if p not in used]

    def _classes(self) -> tuple[tuple[str, ...], np.ndarray | None]:
        if not hasattr(self, "_known_classes"):
            if self.options.classes:
                self._known_classes = read_classes(self._resolve("classes"))
            else:
                self._known_classes = self._classes_from_masks(), None
        return self._known_classes

    def _classes_from_masks(self) -> tuple[str, ...]:
        """Names "0", "1", ... up to the largest id in any mask, found once and remembered beside the prepared files."""
        sources = self.sources()["images"]
        cache = caching.cache_folder(self.options.cache_dir)
        memo = cache / "fingerprints" / f"{caching.contents([s.label for s in sources], cache)}.classes"
        if memo.is_file():
            return tuple(json.loads(memo.read_text()))
        names = tuple(str(i) for i in range(max(base.in_threads(self._largest_id, sources)) + 1))
        write_text(memo, json.dumps(names))
        return names

    def _largest_id(self, source: base.Source) -> int:
        """The largest class id of a mask; 0 where there is none, or where damaged masks are to be skipped."""
        try:
            label = files.read_label(base.read_bytes(source.label), str(source.label))
        except files.CorruptImageError:
            if self.on_corrupt == "skip":
                return 0
            raise
        return int(label[label != base.VOID].max(initial=0))


class _Names:
    """Finds examples by what a list calls them: a path of which the end, or which as an end, is an example's name."""

    def __init__(self, names: Sequence[str]):
        self._by_name = {_parts(name): i for i, name in enumerate(names)}
        self._by_end: dict[tuple[str, ...], list[int]] = {}
        for parts, i in self._by_name.items():
            for start in range(len(parts)):
                self._by_end.setdefault(parts[start:], []).append(i)

    def __call__(self, text: str) -> list[int]:
        """The numbers of those that `text` may mean, with or without an image's suffix; empty if there is none."""
        path = PurePosixPath(text.replace("\\", "/"))
        spellings = [path.with_suffix(""), path] if path.suffix.lower() in files.IMAGE_SUFFIXES else [path]
        return next((found for s in spellings if (found := self._find(_parts(s.as_posix())))), [])

    def _find(self, parts: tuple[str, ...]) -> list[int]:
        if parts in self._by_name:
            return [self._by_name[parts]]
        if parts in self._by_end:  # the list leaves out folders
            return self._by_end[parts]
        ends = (parts[start:] for start in range(1, len(parts)))  # the list has folders more
        return next(([self._by_name[end]] for end in ends if end in self._by_name), [])


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(name).parts if part not in ("/", ".", ".."))


def _first_of_pair(line: str) -> str:
    """The image of a line `image mask` or `image 1`, as VOC's lists have them; "" where it is no such line.

    A second word with an image's suffix after a first one without is one name with a space in it.
    """
    words = line.split()
    if len(words) != 2:
        return ""
    first, second = (PurePosixPath(w).suffix.lower() in files.IMAGE_SUFFIXES for w in words)
    return words[0] if first or not second else ""


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The classes file: names, and uint8 `[K, 3]` colors if its lines have them (all or none).

    Raises:
      UserError: an empty file, a line with a wrong color, colors on some lines only, two classes of one color or name.
    """
    names, colors = [], []
    for number, line in enumerate(base.read_names(path), 1):
        words = line.replace(",", " ").split()
        if len(words) >= 4 and all(w.isdigit() for w in words[-3:]):
            color = [int(w) for w in words[-3:]]
            if max(color) > 255:
                raise UserError(f"{path}: line {number} has a color above 255")
            colors.append(color)
            words = words[:-3]
        names.append(" ".join(words))
    if colors and len(colors) != len(names):
        raise UserError(
            f"{path}: {len(colors)} of {len(names)} lines have a color R G B; give it on all lines or on none"
        )
    if len(set(names)) != len(names):
        raise UserError(f"{path}: the class '{max(names, key=names.count)}' is there twice; names must differ")
    if len({tuple(c) for c in colors}) != len(colors):
        raise UserError(f"{path}: two classes have the same color; colors must differ")
    if len(names) > base.VOID:
        raise UserError(f"{path}: has {len(names)} classes; at most 255 are supported")
    return tuple(names), np.array(colors, np.uint8) if colors else None


def _pair(images: dict[str, Path], masks: dict[str, Path], images_at: str, masks_at: str) -> list[base.Source]:
    by_name = dict(masks)
    for name, path in masks.items():
        for ending in _MASK_ENDINGS:
            if name.endswith(ending):
                by_name.setdefault(name.removesuffix(ending), path)
    lonely = [name for name in images if name not in by_name]
    if lonely:
        raise UserError(
            f"{images_at}: {_count(lonely, 'image has', 'images have')} no mask of the same name in {masks_at}, "
            f"the first '{images[lonely[0]].name}'; add the masks or remove the images"
        )
    return [base.Source(name, path, by_name[name]) for name, path in images.items()]


def _count(items: Sequence, one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"
