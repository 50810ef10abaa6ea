"""The user's own data: a folder (or list) of images, a folder (or list) of masks, and optionally a file of classes."""

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from deeplab_jax.console import say, shown
from deeplab_jax.data import annotations, caching, class_files
from deeplab_jax.data.builders import base
from deeplab_jax.data.builders.folder import splits
from deeplab_jax.data.meaning import Facts, decide, facts_of
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_text
from deeplab_jax.imaging import files, masks, pairing, palettes
from deeplab_jax.imaging.classes import Classes

# Fields that change how masks are found and read, with their meaning in configs of older runs, which lack them.
_FIELDS = {"ignore": (255,), "reduce_zero": False, "mask_prefix": "", "mask_suffix": ""}

_DECIDING = threading.Lock()  # several threads read labels


class Builder(base.SegmentationBuilder):
    """Splits train and val (test, all), by folders of these names, by lists, or by `config.data.val_fraction`.

    `config.data.images` and `.masks` are folders, searched with their subfolders, or text files with one path per line;
    both relative to `config.data.dir` if that is set. `imaging.pairing` matches masks to images; lines of two list
    files correspond. `config.data.classes` names the classes (`data.class_files`); without it they
    are the ids that the masks hold. The meaning of the masks' samples is decided from all of them (`data.meaning`).
    """

    VERSION = tfds.core.Version("1.1.0")
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        if not hasattr(self, "_sources"):
            self._sources = self._find_sources()
            odd = next((s for s in self._sources if not _is_utf8(s.name)), None)
            if odd is not None:
                raise UserError(f"{shown(str(odd.image))}: its name is not UTF-8; rename it and its mask")
        return {"images": self._sources}

    def _find_sources(self) -> list[base.Source]:
        images, masks_at = self._existing("images"), self._existing("masks")
        if images.is_file() != masks_at.is_file():
            raise UserError("config.data.images and config.data.masks: must both be folders or both be list files")
        if images.is_file():
            self.loose_masks: list[Path] = []
            return self._listed_pairs(images, masks_at)
        return self._paired(images, masks_at)

    def _paired(self, images: Path, masks_at: Path) -> list[base.Source]:
        affixes = pairing.Affixes(self._option("mask_prefix"), self._option("mask_suffix"))
        pairs, self.loose_masks = pairing.pair_folders(images, masks_at, affixes)
        if not self.loose_masks and not any(mask for _, _, mask in pairs):
            tool = annotations.found_in(masks_at)
            what = f"; {tool}" if tool else f" ({', '.join(files.IMAGE_SUFFIXES)})"
            raise UserError(f"config.data.masks={masks_at}: holds no mask{what}")
        if not pairs:
            raise UserError(f"config.data.images={images}: holds no image ({', '.join(files.IMAGE_SUFFIXES)})")
        sources = [base.Source(name, image, mask) for name, image, mask in pairs]
        unlabelled = splits.unlabelled(sources)
        lonely = [s for s in sources if s.label is None and s.name not in unlabelled]
        if lonely:
            first = Path(str(lonely[0].image)).name
            raise UserError(
                f"{self.options.images}: {_count(lonely, 'image has', 'images have')} no mask of the same name in "
                f"{self.options.masks}, the first '{first}'; add the masks or remove the images, or "
                "describe the masks' names with config.data.mask_prefix and mask_suffix"
            )
        return sources

    def _listed_pairs(self, images: Path, masks_at: Path) -> list[base.Source]:
        first, second = _listed_paths(images), _listed_paths(masks_at)
        if len(first) != len(second):
            raise UserError(
                f"{self.options.masks}: has {len(second)} lines, but {self.options.images} has {len(first)}; "
                "line n of the one must belong to line n of the other"
            )
        same = next((i for i, m in zip(first, second) if i == m), None)
        if same is not None:
            raise UserError(f"{masks_at}: names {same} as the mask of itself; name its mask")
        stems = [i.with_suffix("").as_posix().lstrip("/") for i in first]
        pairing.refuse_doubles(zip(stems, first))
        return [base.Source(stem, i, m) for stem, i, m in zip(stems, first, second)]

    def _download(self, dl_manager) -> None:
        return None  # nothing to download: the options name all files

    def classes(self) -> Classes:
        names, colors = self._named_classes()
        palette = palettes.voc_palette() if colors is None else palettes.from_colors(colors)
        return Classes(names or tuple(str(i) for i in range(self.meaning().num_classes or 0)), palette)

    def read_label(self, source: base.Source) -> np.ndarray:
        return masks.read_label(base.read_bytes(source.label), str(source.label), meaning=self.meaning())

    def mask_colors(self) -> np.ndarray | None:
        return self._named_classes()[1]

    def meaning_key(self) -> str:
        return json.dumps([str(self._option(field)) for field in _FIELDS])

    def extra_files(self) -> list[Path]:
        return [self._resolve("classes")] if self.options.classes else []

    def available_splits(self, stored: Sequence[str] | None = None) -> list[str]:
        return ["train", "val", *(["test"] if len(splits.test_examples(self.sources()["images"])) else []), "all"]

    def split_expression(self, split: str) -> str:
        return "images"

    def select(self, split: str, seed: int) -> np.ndarray | None:
        """The examples of a split: those of its folder, or of its list, or a share drawn by the seed."""
        return splits.select(self, self.sources()["images"], split, seed)

    def _option(self, field: str):
        return getattr(self.options, field, _FIELDS[field])

    def _resolve(self, field: str) -> Path:
        value = getattr(self.options, field)
        if not value:
            raise UserError(f"config.data.{field} is not set; give a folder or a list file")
        path = Path(os.path.expanduser(value))
        return path if path.is_absolute() or self.raw is None else self.raw / path

    def _existing(self, field: str) -> Path:
        path = self._resolve(field)
        if not path.is_dir() and not path.is_file():
            raise UserError(f"config.data.{field}={getattr(self.options, field)}: no such folder or list file")
        return path

    def _named_classes(self) -> tuple[tuple[str, ...], np.ndarray | None]:
        if not hasattr(self, "_known_classes"):
            known: tuple[tuple[str, ...], np.ndarray | None] = ((), None)
            if self.options.classes:
                known = class_files.read_classes(self._resolve("classes"))
            self._known_classes = known
        return self._known_classes

    # The meaning of the masks.

    def survey(self) -> dict[base.File, Facts | UserError]:
        """The contents of each mask, or the error on reading it; each file is decoded once."""
        if not hasattr(self, "_surveyed"):
            labels = list(dict.fromkeys(s.label for s in self.sources()["images"] if s.label is not None))
            found = base.in_threads(self._facts, labels)
            shown = tqdm(found, total=len(labels), desc="reading masks", unit="mask", mininterval=1, leave=False)
            self._surveyed = dict(zip(labels, shown))
        return self._surveyed

    def _facts(self, label: base.File) -> Facts | UserError:
        try:
            return facts_of(base.read_bytes(label), str(label), self.mask_colors())
        except UserError as e:  # reported where the file is read
            return e

    def meaning(self) -> masks.Meaning:
        """How to read the masks; decided once and recorded beside the prepared files."""
        with _DECIDING:
            if not hasattr(self, "_meaning"):
                self._meaning = self._decided()
        return self._meaning

    def _decided(self) -> masks.Meaning:
        names, colors = self._named_classes()
        ignore, reduce_zero = self._option("ignore"), bool(self._option("reduce_zero"))
        memo = None
        if not hasattr(self, "_surveyed"):
            cache = caching.cache_folder(self.options.cache_dir)
            labels = [Path(str(s.label)) for s in self.sources()["images"] if s.label is not None]
            key = caching.contents([*labels, *self.extra_files()], cache)
            memo = cache / "fingerprints" / f"{key}-{caching.digest_of(self.meaning_key())}.meaning"
        if memo is not None and memo.is_file():
            kept = json.loads(memo.read_text())
        else:
            readable = [f for f in self.survey().values() if isinstance(f, Facts)]
            meaning, notes = decide(readable, len(names) or None, colors, ignore, reduce_zero)
            kept = {
                "count": meaning.num_classes, "by_color": sorted(meaning.by_color), "object_255": meaning.object_255,
                "notes": notes,
            }  # fmt: skip
            if memo is not None:
                write_text(memo, json.dumps(kept))
                for note in notes:
                    say(f"note: {note}")
        self.notes: list[str] = kept["notes"]
        return masks.Meaning(
            kept["count"], colors, tuple(ignore), reduce_zero, frozenset(kept["by_color"]), kept["object_255"]
        )


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed_paths(path: Path) -> list[Path]:
    """The files that a list names, relative to it, written with slashes or backslashes."""
    paths = []
    for line in base.read_names(path):
        listed = path.parent / line
        if line.startswith("~") and not listed.exists():
            listed = path.parent / os.path.expanduser(line)
        if "\\" in line and not listed.exists():
            listed = path.parent / PurePosixPath(line.replace("\\", "/"))
        paths.append(listed)
    return paths


def _count(items: Sequence, one: str, many: str) -> str:
    return f"{len(items)} {one if len(items) == 1 else many}"
