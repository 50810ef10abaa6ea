"""Cityscapes, fine annotations: the 34 label ids become the 19 of the benchmark, all others void."""

import dataclasses
import threading
import zipfile
import zlib
from pathlib import Path, PurePosixPath

import numpy as np

from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.classes import KNOWN
from deeplab_jax.imaging.files import CorruptImageError

TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # label ids of classes 0..18
_TABLE = np.full(256, base.VOID, np.uint8)
_TABLE[list(TRAIN_IDS)] = np.arange(len(TRAIN_IDS))
ZIPS = ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip")


class Builder(base.SegmentationBuilder):
    """2,975 training, 500 validation, 1,525 test images of 2048x1024.

    `config.data.dir` holds `leftImg8bit/` and `gtFine/`, or the two zips as downloaded, which are read without
    extracting them.
    """

    CLASSES = KNOWN["cityscapes"]
    LABEL_TABLE = _TABLE
    MANUAL_DOWNLOAD_INSTRUCTIONS = """
    leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip from https://www.cityscapes-dataset.com (a free account)
    """

    def sources(self) -> dict[str, list[base.Source]]:
        if (self.raw_folder / "leftImg8bit").is_dir():
            entries: dict[str, base.File] = {
                p.relative_to(self.raw_folder).as_posix(): p
                for folder in ("leftImg8bit", "gtFine")
                for p in sorted((self.raw_folder / folder).glob("*/*/[!.]*.png"))
            }
        elif all((self.raw_folder / name).is_file() for name in ZIPS):
            entries = {}
            for name in ZIPS:
                archive = _Archive(self.raw_folder / name)
                entries |= {m: _Member(archive, m) for m in archive.names() if m.endswith(".png")}
        else:
            raise UserError(
                f"{self.raw}: has neither leftImg8bit/ and gtFine/ nor {ZIPS[0]} and {ZIPS[1]}; check config.data.dir"
            )
        splits: dict[str, list[base.Source]] = {"train": [], "val": [], "test": []}
        for path, image in sorted(entries.items()):
            parts = PurePosixPath(path).parts
            if len(parts) != 4 or parts[-1].startswith(".") or not path.endswith("_leftImg8bit.png"):
                continue
            top, split, *rest = parts
            if top != "leftImg8bit" or split not in splits:
                continue
            name = rest[-1].removesuffix("_leftImg8bit.png")
            label_path = f"gtFine/{split}/{rest[0]}/{name}_gtFine_labelIds.png"
            if split != "test" and label_path not in entries:
                raise UserError(
                    f"{self.raw_folder / label_path}: no such file, but its image exists; extract gtFine again"
                )
            splits[split].append(base.Source(name, image, entries[label_path] if split != "test" else None))
        if not splits["train"] and not splits["val"]:
            raise UserError(f"{self.raw}: leftImg8bit holds no <split>/<city>/*_leftImg8bit.png; check config.data.dir")
        return {split: sources for split, sources in splits.items() if sources}

    def extra_files(self) -> list[Path]:
        return [
            p
            for name in ZIPS
            if not (self.raw_folder / "leftImg8bit").is_dir() and (p := self.raw_folder / name).is_file()
        ]


class _Archive:
    """A zip that several threads read."""

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: is not a complete zip file; download it again") from e

    def names(self) -> list[str]:
        return self._zip.namelist()

    def read(self, member: str) -> bytes:
        with self._lock:
            try:
                return self._zip.read(member)
            except (OSError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
                raise CorruptImageError(f"{self.path}: '{member}' in it is damaged; download it again") from e


@dataclasses.dataclass(frozen=True, eq=False)
class _Member:
    """A file in a zip, read like a path."""

    archive: _Archive
    member: str

    def read_bytes(self) -> bytes:
        return self.archive.read(self.member)

    def __str__(self) -> str:
        return f"{self.archive.path}/{self.member}"
