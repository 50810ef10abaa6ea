"""The embedded data set: drawn scenes, nothing to download. See `scenes`."""

import tensorflow_datasets as tfds

from deeplab_jax.data.builders import base
from deeplab_jax.data.builders.shapes import scenes
from deeplab_jax.imaging import files
from deeplab_jax.imaging.classes import KNOWN

SIZES = {"train": 600, "val": 100}
SEED = 2018


class Builder(base.SegmentationBuilder):
    """Seven classes, 96x128; 600 training and 100 validation scenes."""

    VERSION = tfds.core.Version("1.0.1")  # increase it whenever the scenes change: prepared files depend on it
    CLASSES = KNOWN["shapes"]
    NEEDS_FOLDER = False

    def sources(self) -> dict[str, list[base.Source]]:
        return {split: [base.Source(f"{split}_{i:04d}") for i in range(size)] for split, size in SIZES.items()}

    def encode(self, source: base.Source) -> tuple[bytes, bytes]:
        split, index = source.name.split("_")
        image, label = scenes.draw(SEED, list(SIZES).index(split), int(index))
        return files.encode_png(image), files.encode_png(label)

    def _download(self, dl_manager) -> None:
        return None
