"""Reads a submission as the test servers would, and checks it."""

import io
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.submission import CITYSCAPES_LABEL_IDS
from deeplab_jax.imaging import palettes

VOC_FOLDER = "results/VOC2012/Segmentation/comp6_{split}_cls"
CITYSCAPES_NAME = re.compile(r"[a-z-]+_\d{6}_\d{6}")


def read_submission(archive: str | Path, kind: str, split: str = "test") -> dict[str, np.ndarray]:
    """Reads an archive as the server would and checks it.

    Returns:
      {name: [H, W] uint8 class ids (VOC) or training ids (Cityscapes)}.

    Raises:
      UserError: the archive holds a file of another name or place, mode or class id than the server accepts.
    """
    found = {}
    for member, data in _members(Path(archive)):
        path = Path(member)
        if path.suffix != ".png":
            raise UserError(f"{archive}: holds {member}, which is not a .png; the server accepts nothing else")
        image = Image.open(io.BytesIO(data))
        if kind == "voc":
            if str(path.parent) != VOC_FOLDER.format(split=split):
                raise UserError(f"{archive}: {member} is not in {VOC_FOLDER.format(split=split)}")
            colors = np.asarray(image.getpalette(), np.uint8).reshape(-1, 3) if image.mode == "P" else None
            if colors is None or (colors[:21] != palettes.voc_palette()[:21]).any():
                raise UserError(f"{archive}: {member} is not a PNG with VOC's palette")
            ids = np.asarray(image)
            if ids.max() > 20:
                raise UserError(f"{archive}: {member} holds class id {ids.max()}; VOC has 0 to 20")
        else:
            if not CITYSCAPES_NAME.fullmatch(path.stem):
                raise UserError(f"{archive}: {member} has not the form city_000000_000000.png")
            if image.mode != "L":
                raise UserError(f"{archive}: {member} is not an 8-bit gray PNG")
            back = np.full(256, 255, np.uint8)
            back[CITYSCAPES_LABEL_IDS] = np.arange(len(CITYSCAPES_LABEL_IDS))
            ids = back[np.asarray(image)]
            if (ids == 255).any():
                raise UserError(f"{archive}: {member} holds label ids that Cityscapes does not evaluate")
        found[path.stem] = ids
    return found


def _members(archive: Path):
    """Yields (name, bytes) of an archive's files, read in place: nothing is extracted."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            for name in zipped.namelist():
                yield name, zipped.read(name)
    else:
        with tarfile.open(archive) as tar:
            for member in tar:
                file = tar.extractfile(member) if member.isfile() else None
                if file is not None:
                    yield member.name, file.read()
