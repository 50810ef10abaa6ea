"""Files for the test servers of PASCAL VOC and Cityscapes."""

import re
import tarfile
import threading
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging import files, palettes
from deeplab_jax.runs.schema import CHOICES

FORMATS = tuple(name for name in CHOICES["eval.submission"] if name)

# Cityscapes' 19 training ids as the label ids its server reads (cityscapesScripts, helpers/labels.py).
CITYSCAPES_LABEL_IDS = np.array([7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33], np.uint8)

_VOC_FOLDER = "results/VOC2012/Segmentation/comp6_{split}_cls"
_CITYSCAPES_NAME = re.compile(r"[a-z-]+_\d{6}_\d{6}")


def check_submission(kind: str, classes: int) -> None:
    """Raises `UserError` if the server of `kind` does not read predictions of this many classes; "" = no server."""
    if kind == "cityscapes" and classes != len(CITYSCAPES_LABEL_IDS):
        raise UserError(f"config.eval.submission=cityscapes: its server reads {len(CITYSCAPES_LABEL_IDS)} classes, and "
                        f"these data have {classes}; leave it empty")  # fmt: skip


class Submission:
    """Collects predictions as PNGs and packs them: `.tgz` for VOC, `.zip` for Cityscapes. Thread-safe."""

    def __init__(self, folder: str | Path, kind: str, split: str = "test"):
        """Writes below `folder`; the archive is `folder` with the suffix of `kind` ("voc" or "cityscapes")."""
        if kind not in FORMATS:
            raise UserError(f"config.eval.submission is '{kind}'; it must be empty or one of {', '.join(FORMATS)}")
        self.folder, self.kind = Path(folder), kind
        self.inside = _VOC_FOLDER.format(split=split) if kind == "voc" else "results"
        self._names: set[str] = set()
        self._lock = threading.Lock()

    @property
    def archive(self) -> Path:
        """The file to upload."""
        return self.folder.with_name(self.folder.name + (".tgz" if self.kind == "voc" else ".zip"))

    def add(self, name: str, labels: np.ndarray) -> None:
        """Writes one prediction; `labels` [H, W] uint8: VOC's class ids, or Cityscapes' 19 training ids.

        Raises:
          UserError: the name was given before or, for Cityscapes, does not have the form city_000000_000000.
        """
        stem = self._stem(name)
        with self._lock:
            if stem in self._names:
                raise UserError(f"{name}: a second image would get the name {stem}.png in the submission")
            self._names.add(stem)
        palette = palettes.voc_palette() if self.kind == "voc" else None
        if self.kind == "cityscapes":
            labels = CITYSCAPES_LABEL_IDS[labels]
        files.write_png(self.folder / self.inside / f"{stem}.png", labels, palette)

    def close(self, names: Sequence[str]) -> Path:
        """Packs the PNGs of these images, which this or another process has added; returns the archive's path.

        Raises:
          UserError: two of the names give one PNG.
        """
        of: dict[str, str] = {}
        for name in names:
            if of.setdefault(self._stem(name), name) != name:
                raise UserError(f"{name}: a second image would get the name {self._stem(name)}.png in the submission")
        members = sorted(of)
        write_atomically(self.archive, lambda temporary: self._pack(temporary, members))
        return self.archive

    def _stem(self, name: str) -> str:
        if self.kind == "voc":
            return Path(name).name.removesuffix(".jpg")
        found = _CITYSCAPES_NAME.search(Path(name).name)
        if not found:
            raise UserError(f"{name}: the Cityscapes server needs names of the form city_000000_000000")
        return found.group()

    def _pack(self, path: Path, stems: list[str]) -> None:
        where = self.folder / self.inside
        if self.kind == "voc":
            with tarfile.open(path, "w:gz") as tar:
                for stem in stems:
                    tar.add(where / f"{stem}.png", arcname=f"{self.inside}/{stem}.png")
        else:
            with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as zipped:
                for stem in stems:
                    zipped.write(where / f"{stem}.png", arcname=f"{stem}.png")
