"""Looks at every file of a data set and says in words what is wrong with it."""

import collections
import dataclasses
import hashlib
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image

from deeplab_jax.data import dataset as datasets
from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files

BOUNDARY_COLOR = (224, 224, 192)  # how VOC's void looks when a palette mask was converted to RGB


@dataclasses.dataclass
class Inspection:
    """What one example showed. `problems` and `remarks` are (kind, detail); see `_KINDS`."""

    split: str
    name: str
    image: str
    label: str
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    size: tuple[int, int] | None = None  # height, width
    counts: np.ndarray | None = None  # int64 [256], pixels of each id
    digest: bytes = b""

    def add(self, kind: str, detail: str = "") -> None:
        self.problems.append((kind, detail))


@dataclasses.dataclass(frozen=True)
class Finding:
    """One kind of thing found: a sentence, how many files, and some of their names. Errors stop training."""

    error: bool
    kind: str
    sentence: str
    count: int
    examples: tuple[str, ...]


@dataclasses.dataclass
class Audit:
    """The result of `audit`: findings, errors first, and pixel counts int64 `[C]` and image counts by split."""

    class_names: tuple[str, ...]
    findings: list[Finding]
    images: dict[str, int]
    pixels: dict[str, np.ndarray]
    images_with: dict[str, np.ndarray]
    void: dict[str, float]
    sizes: list[tuple[int, int]]

    @property
    def errors(self) -> list[Finding]:
        """The findings that stop training."""
        return [f for f in self.findings if f.error]


# kind -> (is an error, what it means and what to do)
_KINDS: dict[str, tuple[bool, str]] = {
    "image missing": (True, "the list names images that are not there"),
    "label missing": (True, "labels are not there"),
    "unreadable image": (True, "images cannot be decoded; replace or remove them, or set config.data.on_corrupt=skip"),
    "unreadable label": (True, "labels cannot be decoded; replace or remove them, or set config.data.on_corrupt=skip"),
    "size": (True, "labels differ in size from their images; export the labels at the image's size"),
    "rgb mask": (True, "labels are RGB pictures, not class ids; give R G B for each class in config.data.classes, or "
                       "convert them to palette or gray PNGs"),
    "unknown color": (True, "labels hold colors that no class has"),
    "boundary color": (True, f"labels hold the color {BOUNDARY_COLOR}, PASCAL's boundary: a palette mask was converted "
                             "to RGB; use the original palette PNGs, where it is 255"),
    "ids": (True, "labels hold ids outside the classes; correct the labels, or name all classes"),
    "both splits": (False, "images are in both splits (the same bytes): the evaluation will flatter"),
    "same twice": (False, "images are in their split more than once"),
    "0 and 255": (False, "labels hold 0 and 255 only: 255 means void and is ignored, so nothing but class 0 would be "
                         "learned; if 255 marks your object, renumber it to 1"),
    "empty": (False, "labels hold one class only (often an empty mask)"),
    "all void": (False, "labels are void everywhere; they contribute nothing"),
    "much void": (False, "labels are more than half void (255)"),
    "jpeg mask": (False, "labels are JPEGs, whose compression invents ids near edges; use PNG"),
    "other color": (False, "palette masks show their classes' colors under other ids; they are looked up by color"),
    "gray image": (False, "images are gray; they are fed as three equal channels"),
    "16 bit image": (False, "images have 16 bits; their high bytes are used"),
    "cmyk image": (False, "images are CMYK; they are converted to RGB"),
    "transparent image": (False, "images have transparency; they are laid over white"),
    "exif": (False, "images are turned by EXIF; they are fed upright, so their labels must be upright too"),
    "loose mask": (False, "masks belong to no image and are not used"),
}  # fmt: skip


def sources_of(data_config, splits: tuple[str, ...], seed: int = 0) -> tuple[base.SegmentationBuilder, dict]:
    """The builder and the `Source`s of the splits, from the raw files where there are any."""
    builder = datasets.raw_builder(data_config)
    if builder.raw is None and builder.name != "folder":
        return builder, {split: _prepared(data_config, split, seed) for split in splits}
    stored = builder.sources()
    found = {}
    for split in splits:
        parts = builder.split_expression(split).split("+")
        if any(part not in stored for part in parts):
            raise UserError(f"{data_config.name} has no split '{split}'; found: {', '.join(stored)}")
        sources = [s for part in parts for s in stored[part]]
        indices = builder.select(split, seed)
        found[split] = sources if indices is None else [sources[i] for i in indices]
    return builder, found


def audit(
    builder: base.SegmentationBuilder,
    splits: dict[str, list[base.Source]],
    progress: Callable[[], object] = lambda: None,
    threads: int = 2,
) -> Audit:
    """Reads every image and label of the splits once.

    Args:
      builder: knows the classes and how its labels are read.
      splits: `sources_of`'s.
      progress: called once for every example.
      threads: readers.

    Returns:
      What was found.
    """
    try:
        class_names = builder.class_names()
    except UserError:  # the masks cannot give the classes; the inspection below says why
        class_names = ()
    inspections = []
    tasks = [(split, source) for split, sources in splits.items() for source in sources]
    for inspection in base.in_threads(lambda t: inspect(builder, *t, len(class_names)), tasks, threads):
        inspections.append(inspection)
        progress()
    _duplicates(inspections)
    findings = _gather(inspections)
    for path in getattr(builder, "loose_masks", [])[:1]:
        findings.append(Finding(False, "loose mask", _KINDS["loose mask"][1], len(builder.loose_masks), (str(path),)))
    return _summarize(class_names, splits, inspections, findings)


def inspect(builder: base.SegmentationBuilder, split: str, source: base.Source, num_classes: int) -> Inspection:
    """Reads one example and notes what is odd; never raises for a bad file."""
    found = Inspection(split, source.name, str(source.image), str(source.label))
    try:
        data = base.read_bytes(source.image)
    except UserError:
        found.add("image missing")
        return found
    found.digest = hashlib.blake2b(data, digest_size=16).digest()
    _inspect_image(found, data)
    if source.label is None:
        return found
    try:
        raw = base.read_bytes(source.label)
    except UserError:
        found.add("label missing")
        return found
    _inspect_label_format(found, raw)
    try:
        label = builder.read_label(source)
    except files.CorruptImageError:
        found.add("unreadable label")
        return found
    except UserError as e:
        if not any(kind in ("boundary color",) for kind, _ in found.problems):
            found.add("rgb mask" if "color picture" in str(e) else "unknown color", str(e).partition("; ")[0])
        return found
    if builder.LABEL_TABLE is not None:
        label = builder.LABEL_TABLE[label]
    if found.size is not None and label.shape != found.size:
        found.add("size", f"{label.shape[1]}x{label.shape[0]} for {found.size[1]}x{found.size[0]}")
    _inspect_ids(found, np.bincount(label.ravel(), minlength=256), num_classes)
    return found


def _inspect_image(found: Inspection, data: bytes) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            mode, turned = image.mode, image.getexif().get(0x0112, 1) not in (0, 1)
            found.size = files.size_of(data)
            if image.format == "JPEG":  # every byte is still decoded, at an eighth of the work after that
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
    except Exception:  # Pillow raises many things on damaged files
        found.add("unreadable image")
        found.size = None
        return
    if mode in ("1", "L"):
        found.add("gray image")
    elif mode.startswith("I") or mode == "F":
        found.add("16 bit image")
    elif mode == "CMYK":
        found.add("cmyk image")
    elif mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        found.add("transparent image")
    if turned:
        found.add("exif")


def _inspect_label_format(found: Inspection, raw: bytes) -> None:
    try:
        image = Image.open(io.BytesIO(raw))
    except Exception:  # not an image: a .mat, or damaged, which read_label will tell
        return
    if image.format == "JPEG":
        found.add("jpeg mask")
    if image.mode in ("RGB", "RGBA"):
        pixels = np.asarray(image.convert("RGB"))
        if (pixels == np.array(BOUNDARY_COLOR, np.uint8)).all(axis=2).any():
            found.add("boundary color")


def _inspect_ids(found: Inspection, counts: np.ndarray, num_classes: int) -> None:
    found.counts = counts
    used = np.flatnonzero(counts)
    outside = used[(used >= num_classes) & (used != base.VOID)]
    if outside.size and num_classes:
        found.add("ids", ", ".join(map(str, outside[:6])))
    void = counts[base.VOID] / max(1, counts.sum())
    if set(used) == {0, base.VOID} and void > 0.05 and not np.any(counts[1 : base.VOID]):
        found.add("0 and 255")
    elif void == 1:
        found.add("all void")
    elif void > 0.5:
        found.add("much void", f"{void:.0%}")
    if len(used) == 1 and used[0] != base.VOID:
        found.add("empty", f"class {used[0]}")


def _duplicates(inspections: list[Inspection]) -> None:
    seen: dict[bytes, Inspection] = {}
    for inspection in inspections:
        first = seen.setdefault(inspection.digest, inspection) if inspection.digest else inspection
        if first is not inspection:
            kind = "same twice" if first.split == inspection.split else "both splits"
            inspection.add(kind, f"like {first.split} '{first.name}'")


def _gather(inspections: list[Inspection]) -> list[Finding]:
    by_kind: dict[str, list[str]] = collections.defaultdict(list)
    for inspection in inspections:
        for kind, detail in inspection.problems:
            about_image = "image" in kind or kind in ("both splits", "same twice", "exif")
            name = inspection.image if about_image else inspection.label
            by_kind[kind].append(f"{name} ({detail})" if detail else name)
    return [
        Finding(error, kind, sentence, len(by_kind[kind]), tuple(by_kind[kind][:5]))
        for kind, (error, sentence) in _KINDS.items()
        if by_kind.get(kind)
    ]


def _summarize(class_names, splits, inspections, findings) -> Audit:
    count = max(1, len(class_names))
    zeros = lambda: {split: np.zeros(256, np.int64) for split in splits}  # noqa: E731
    pixels, images_with = zeros(), zeros()
    for inspection in inspections:
        if inspection.counts is not None:
            pixels[inspection.split] += inspection.counts
            images_with[inspection.split] += inspection.counts > 0
    labelled = {split: p[:count].sum() + p[base.VOID] for split, p in pixels.items()}
    void = {split: float(p[base.VOID] / max(1, labelled[split])) for split, p in pixels.items()}
    for split, p in pixels.items():
        never = [name for name, n in zip(class_names, p) if n == 0]
        if never and labelled[split]:
            sentence = f"classes never occur in {split}: {', '.join(never)}; their IoU is undefined there"
            if any(n == 0 for n in p[: len(class_names)][: int(np.flatnonzero(p[:255]).max(initial=0))]):
                sentence += " (the ids skip: check that the classes file has the labels' order)"
            findings.append(Finding(False, "never", sentence, len(never), ()))
    sizes = sorted({i.size for i in inspections if i.size is not None})
    return Audit(
        class_names,
        sorted(findings, key=lambda f: not f.error),
        {split: len(sources) for split, sources in splits.items()},
        {split: p[:count] for split, p in pixels.items()},
        {split: p[:count] for split, p in images_with.items()},
        void,
        sizes,
    )


@dataclasses.dataclass(frozen=True)
class _RecordFile:
    """A field of a prepared record, read like a path."""

    dataset: datasets.SegmentationDataset
    index: int
    field: str

    def read_bytes(self) -> bytes:
        return self.dataset.record(self.index)[self.field]

    def __str__(self) -> str:
        return f"{self.dataset.split} {self.field} {self.index}"


def _prepared(data_config, split: str, seed: int) -> list[base.Source]:
    opened = datasets.open_dataset(data_config, split, seed)
    return [
        base.Source(name, _RecordFile(opened, i, "image"), _RecordFile(opened, i, "label"))
        for i, name in enumerate(opened.names())
    ]
