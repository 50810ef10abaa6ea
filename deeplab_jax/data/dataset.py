"""A prepared split as a sequence of photographs and labels."""

import importlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from deeplab_jax.data import caching
from deeplab_jax.data.builders.base import SegmentationBuilder
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import decoding, files
from deeplab_jax.imaging.palettes import VOID

BUILDERS = (
    "camvid", "cityscapes", "coco_voc", "folder", "pascal_context", "pascal_person_part", "shapes", "voc_segmentation",
)  # fmt: skip
_SKIP_DECODING = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}


class Example(NamedTuple):
    """`image`: uint8 `[H, W, 3]` RGB, upright; `label`: uint8 `[H, W]`, 255 = void, None in test splits; `name`."""

    image: np.ndarray
    label: np.ndarray | None
    name: str


class SegmentationDataset:
    """Random access to a split: `len(ds)`, `ds[i] -> Example`. Safe to read from several threads.

    Attributes:
      class_names: tuple of str.
      num_classes: their number.
      palette: uint8 `[256, 3]`.
      fingerprint: str, of all raw files of the data set.
      name, split: str.
      folder: the folder of the prepared records.
      cache_bytes: decoded examples are kept in memory up to this size; 0 = none.
      skip_corrupt: whether readers leave out undecodable examples (see `data.reading`) instead of stopping.
      skipped: names of the examples that were left out.
      group_of: the group that a name belongs to: the entry of `config.data.holdout_by` with which it begins, else its
        video; None if it has neither.
    """

    def __init__(
        self,
        builder: SegmentationBuilder,
        split: str,
        indices: np.ndarray | None,
        fingerprint: str,
        cache_bytes: int = 0,
        skip_corrupt: bool = False,
    ):
        self.name, self.split, self.fingerprint = builder.name, split, fingerprint
        classes = builder.classes()
        self.class_names = classes.names
        self.num_classes = len(self.class_names)
        self.palette = classes.palette
        self.folder = Path(builder.data_dir)
        self.cache_bytes = cache_bytes
        self.skip_corrupt = skip_corrupt
        self.skipped: set[str] = set()
        self.group_of = builder.sequence_of
        expression = builder.split_expression(split)
        self._records = builder.as_data_source(expression, decoders=_SKIP_DECODING)
        self._indices = np.arange(len(self._records)) if indices is None else np.asarray(indices)
        self._cache: dict[int, Example] = {}
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, i: int) -> Example:
        """Raises `IndexError`, or `files.CorruptImageError` naming an example that cannot be decoded."""
        i = range(len(self))[i]
        cached = self._cache.get(i)
        if cached is not None:
            return cached
        record = self.record(i)
        name = record["name"].decode()
        image = files.read_photograph(record["image"], f"{self.name} {self.split} image '{name}'")
        label = None
        if record["label"]:
            label = files.read_label(record["label"], f"{self.name} {self.split} label '{name}'")
        example = Example(image, label, name)
        size = image.nbytes + (label.nbytes if label is not None else 0)
        with self._lock:
            if self._cached_bytes + size <= self.cache_bytes and i not in self._cache:
                for array in (image, label):
                    if array is not None:
                        array.setflags(write=False)
                self._cache[i] = example
                self._cached_bytes += size
        return example

    def record(self, i: int) -> dict[str, bytes]:
        """The encoded example: `image`, `label` (b"" if there is none) and `name`, all bytes."""
        try:
            found = self._records[int(self._indices[i])]
        except (RuntimeError, OSError) as e:
            raise caching.damaged(self.folder) from e
        if not isinstance(found, dict) or found.get("name") is None:
            raise caching.damaged(self.folder)
        return found

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) of an example's photograph, from its header; `files.CorruptImageError` without one."""
        return decoding.size_of(self.record(i)["image"], f"{self.name} {self.split} image {i}")

    def names(self) -> list[str]:
        """The examples' names, in order."""
        return [self.record(i)["name"].decode() for i in range(len(self))]

    @property
    def cached_bytes(self) -> int:
        """Memory in use by decoded examples."""
        return self._cached_bytes


def builder_class(name: str) -> type[SegmentationBuilder]:
    """The builder of `config.data.name`; `UserError` if there is none."""
    if name not in BUILDERS:
        raise UserError(f"config.data.name={name}: no such data set; choose one of {', '.join(BUILDERS)}")
    return importlib.import_module(f"deeplab_jax.data.builders.{name}.{name}_dataset_builder").Builder


def raw_builder(data_config, seed: int = 0) -> SegmentationBuilder:
    """A builder over the raw folder of `config.data`, nothing prepared yet; `UserError` if the folder is missing."""
    if data_config.on_corrupt not in ("stop", "skip"):
        raise UserError(f"config.data.on_corrupt={data_config.on_corrupt}: must be stop or skip")
    cls = builder_class(data_config.name)
    own = {"ignore": (255,), "reduce_zero": False, "mask_prefix": "", "mask_suffix": ""}
    for field, default in own.items():
        if data_config.name != "folder" and data_config.get(field, default) != default:
            raise UserError(f"config.data.{field}: is for config.data.name=folder; leave it out")
    ignore = tuple(data_config.get("ignore", own["ignore"]))
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i <= 65535 for i in ignore):
        raise UserError(f"config.data.ignore={ignore}: must be ids, whole numbers of at least 0")
    raw = None
    if data_config.dir:
        raw = Path(os.path.expanduser(data_config.dir))
        if not raw.is_dir():
            raise UserError(
                f"config.data.dir={data_config.dir}: no such folder; name the raw {data_config.name} folder"
            )
        if not any(raw.iterdir()):
            raise UserError(
                f"config.data.dir={data_config.dir}: is empty; it should hold the raw {data_config.name} files"
            )
    elif cls.NEEDS_FOLDER:
        what = " ".join(cls.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise UserError(f"config.data.dir is not set; get {what}, and name their folder: --config.data.dir=PATH")
    cache = caching.cache_folder(data_config.cache_dir)
    return cls(
        raw=raw, options=data_config, on_corrupt=data_config.on_corrupt, data_dir=str(cache), file_format="array_record"
    )


def open_dataset(data_config, split: str, seed: int = 0) -> SegmentationDataset:
    """Opens a split of `config.data`, preparing the data set on first use.

    Args:
      data_config: `config.data`.
      split: a split of the data set, or "holdout": training images set aside (see `set_aside`), which the training
        split then lacks.
      seed: draws the validation images of `folder`.

    Raises:
      UserError: the folder is missing or empty, has no such split, or a file in it is wrong (see
        `SegmentationBuilder.encode`).
    """
    raw = raw_builder(data_config)
    cache = caching.cache_folder(data_config.cache_dir)
    key = caching.fingerprint(raw, raw.sources() if raw.raw is not None or raw.name == "folder" else None, cache)
    builder = caching.prepare(
        type(raw), cache, key, raw=raw.raw, options=raw.options, on_corrupt=data_config.on_corrupt
    )
    stored = data_config.train_split if split == "holdout" else split
    available = builder.available_splits()
    if stored not in available:
        raise UserError(
            f"{data_config.name} has no split '{stored}' in {data_config.dir or 'its downloads'}; "
            f"available: {', '.join(available)}"
        )
    megabytes = data_config.cache_decoded_mb if split in (data_config.train_split, "holdout") else 0
    indices = builder.select(stored, seed)
    if stored == data_config.train_split and (has_holdout(data_config) or split == "holdout"):
        whole = SegmentationDataset(builder, stored, indices, key)
        held = set_aside(whole.names(), data_config, builder.sequence_of)
        chosen = held if split == "holdout" else np.setdiff1d(np.arange(len(whole)), held)
        indices = chosen if indices is None else indices[chosen]
    skip = data_config.on_corrupt == "skip"
    dataset = SegmentationDataset(builder, stored, indices, key, megabytes * 2**20, skip)
    dataset.split = split
    dataset.group_of = lambda name: group_of(name, prefixes(data_config)) or builder.sequence_of(name)
    if not len(dataset):
        raise UserError(
            f"{data_config.name} split '{split}' holds no image; check config.data.dir, config.data.holdout and, for a "
            "folder, config.data.val_fraction; python -m deeplab_jax.main --mode train trains without evaluation"
        )
    return dataset


def require_two_classes(dataset: SegmentationDataset) -> None:
    """Raises `UserError` if at most one class occurs in a split's labels: nothing could be learned from them."""
    seen: set[int] = set()
    read = 0
    for i in range(len(dataset)):
        encoded = dataset.record(i)["label"]
        if not encoded or encoded == b"corrupt":
            continue
        read += 1
        seen |= set(np.unique(files.read_label(encoded)).tolist()) - {VOID}
        if len(seen) > 1:
            return
    if not read:  # none can be decoded, or none has a label: the reader reports it
        return
    which = f"class '{dataset.class_names[seen.pop()]}' is the only one" if seen else "no class occurs"
    raise UserError(
        f"{dataset.name} split '{dataset.split}': {which} in its labels, so there is nothing to learn; see the "
        "report of python -m deeplab_jax.check_dataset"
    )


def require_labels(dataset: SegmentationDataset) -> None:
    """Raises `UserError` if no pixel of a split has a label: nothing could be measured on it."""
    for i in range(len(dataset)):
        encoded = dataset.record(i)["label"]
        if encoded and encoded != b"corrupt" and (files.read_label(encoded) != VOID).any():
            return
    raise UserError(
        f"{dataset.name} split '{dataset.split}': its images have no labels, or only void ones, so nothing can be "
        "measured on them; choose another split"
    )


def has_holdout(data_config) -> bool:
    """Whether `config.data` sets training images aside as the split "holdout"."""
    return bool(data_config.holdout or prefixes(data_config))


def prefixes(data_config) -> tuple[str, ...]:
    """The comma-separated entries of `config.data.holdout_by`; none in configs older than the field."""
    return tuple(part.strip() for part in getattr(data_config, "holdout_by", "").split(",") if part.strip())


def group_of(name: str, beginnings: Sequence[str]) -> str | None:
    """The longest of the beginnings that a name begins with, or None.

    >>> group_of("0016E5_08059", ("0001TP", "0016E5"))
    '0016E5'
    """
    return max((p for p in beginnings if name.startswith(p)), key=len, default=None)


def set_aside(names: Sequence[str], data_config, sequence_of=lambda name: None) -> np.ndarray:
    """The training examples that make up the split "holdout".

    Args:
      names: of the training examples, in order.
      data_config: `config.data`: whole groups if `holdout_by` names any, else `holdout` examples spread over all
        (see `holdout_indices`).
      sequence_of: the video an example belongs to, or None.

    Returns:
      int64 indices, increasing.

    Raises:
      UserError: no name begins with an entry of `holdout_by`, nothing is left to train on, or `holdout` does not fit.
    """
    if not names:
        raise UserError("config.data.holdout: the training split holds no image to set aside; check its lists")
    if not prefixes(data_config):
        return holdout_indices(names, data_config.holdout, sequence_of)
    beginnings = prefixes(data_config)
    groups = [group_of(name, beginnings) for name in names]
    given = data_config.holdout_by
    if unused := [b for b in beginnings if not any(name.startswith(b) for name in names)]:
        raise UserError(
            f"config.data.holdout_by={given}: no training image has a name that begins with '{unused[0]}'; the first "
            f"is '{names[0]}'"
        )
    held = np.flatnonzero([group is not None for group in groups])
    if len(held) == len(names):
        raise UserError(
            f"config.data.holdout_by={given}: sets aside all {len(names)} training images; name fewer groups"
        )
    return held


def holdout_indices(names: Sequence[str], count: int, sequence_of=lambda name: None, block: int = 10) -> np.ndarray:
    """The training examples to set aside, always the same for the same names.

    Photographs: spread evenly over the list. Frames of videos resemble their neighbours, so single frames would look
    too good: each video contributes its share in blocks of about `block` consecutive frames, spread evenly over it.

    Args:
      names: of the training examples, in order (frames of a video in the order of time).
      count: the number to set aside.
      sequence_of: the video an example belongs to, or None.

    Returns:
      int64 `[count]`, increasing.

    Raises:
      UserError: the count is not between 1 and one less than the number of names.
    """
    if not 0 < count < len(names):
        raise UserError(
            f"config.data.holdout={count}: must be between 1 and {len(names) - 1}, below the number of training images"
            + ("" if count else ", where the split 'holdout' is used; or choose another split")
        )
    videos: dict[str | None, list[int]] = {}
    for i, name in enumerate(names):
        videos.setdefault(sequence_of(name), []).append(i)
    shares = {video: count * len(members) / len(names) for video, members in videos.items()}
    counts = {video: int(share) for video, share in shares.items()}
    for video in sorted(shares, key=lambda v: counts[v] - shares[v])[: count - sum(counts.values())]:
        counts[video] += 1
    held: list[int] = []
    for video, members in videos.items():
        taken: list[int] = []
        blocks = counts[video] if video is None else -(-counts[video] // block)
        for b in range(blocks):
            size = counts[video] * (b + 1) // blocks - counts[video] * b // blocks
            segment = members[len(members) * b // blocks : len(members) * (b + 1) // blocks]
            start = max(0, (len(segment) - size) // 2)
            taken += segment[start : start + size]
        left = sorted({*members} - {*taken})  # where nearly all are taken, a block may be longer than its part
        held += taken + left[: counts[video] - len(taken)]
    return np.array(sorted(held), np.int64)
