"""Checks every file of a data set and describes what is wrong with it."""

import collections
import dataclasses
import hashlib
from collections.abc import Callable

import numpy as np

from deeplab_jax.data import dataset as datasets
from deeplab_jax.data.builders import base
from deeplab_jax.data.findings import BOUNDARY_COLOR, KINDS
from deeplab_jax.data.meaning import Facts
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import decoding, files, masks, photographs


@dataclasses.dataclass
class Inspection:
    """The result of checking one example. `problems` are (kind, detail); see `KINDS`."""

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
    """One kind of finding: a sentence, the number of files, and some of their names. Errors stop training."""

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


def sources_of(data_config, splits: tuple[str, ...], seed: int = 0) -> tuple[base.SegmentationBuilder, dict]:
    """The builder and the `Source`s of the splits ("holdout" too), from the raw files if there are any.

    Raises:
      UserError: the data set has no such split; names those it has.
    """
    builder = datasets.raw_builder(data_config)
    if builder.raw is None and builder.name != "folder":
        return builder, {split: _prepared(data_config, split, seed) for split in splits}
    stored = {split: sources for split, sources in builder.sources().items() if sources}
    return builder, {split: _raw_split(builder, stored, data_config, split, seed) for split in splits}


def _raw_split(builder, stored: dict[str, list], data_config, split: str, seed: int) -> list[base.Source]:
    """The examples that `open_dataset` would hold, in its order."""
    train = data_config.train_split
    name = train if split == "holdout" else split
    available = builder.available_splits(list(stored))
    if name not in available:
        raise UserError(
            f"{data_config.name} has no split '{name}'; available: {', '.join(available)}; set config.data.train_split "
            "and config.eval.split to two of them"
        )
    sources = [s for part in builder.split_expression(name).split("+") for s in stored[part]]
    indices = builder.select(name, seed)
    sources = sources if indices is None else [sources[i] for i in indices]
    if name == train and (datasets.has_holdout(data_config) or split == "holdout"):
        names = [s.name for s in sources]
        held = set(datasets.set_aside(names, data_config, builder.sequence_of).tolist())
        sources = [s for i, s in enumerate(sources) if (i in held) == (split == "holdout")]
    return sources


def audit(
    builder: base.SegmentationBuilder,
    splits: dict[str, list[base.Source]],
    progress: Callable[[], object] = lambda: None,
    threads: int = 2,
) -> Audit:
    """Reads every image and label of the splits once.

    Args:
      builder: defines the classes and how labels are read.
      splits: the result of `sources_of`; the first is the one for training, whose images need labels.
      progress: called once for every example.
      threads: number of reading threads.

    Returns:
      The findings.
    """
    if hasattr(builder, "survey"):
        builder.survey()
        builder.meaning()
    class_names = builder.classes().names
    inspections = []
    train = next(iter(splits), "")
    tasks = [(split, source) for split, sources in splits.items() for source in sources]
    for inspection in base.in_threads(
        lambda t: inspect(builder, t[0], t[1], len(class_names), t[0] == train), tasks, threads
    ):
        inspections.append(inspection)
        progress()
    _duplicates(inspections)
    _void_as_class(inspections)
    findings = _gather(inspections)
    for path in getattr(builder, "loose_masks", [])[:1]:
        findings.append(Finding(False, "loose mask", KINDS["loose mask"][1], len(builder.loose_masks), (str(path),)))
    findings += [Finding(False, "reading", note, 1, ()) for note in getattr(builder, "notes", [])]
    findings += [Finding(True, "no image", f"{KINDS['no image'][1]}", 1, (s,)) for s, of in splits.items() if not of]
    left = [i for i in inspections if i.split == train and not any(k.startswith("skipped") for k, _ in i.problems)]
    if splits.get(train) and not left:
        findings.append(Finding(True, "no image", "every image of a split is damaged", 1, (train,)))
    return _summarize(builder, class_names, splits, inspections, findings)


def inspect(
    builder: base.SegmentationBuilder, split: str, source: base.Source, num_classes: int, needs_label: bool = False
) -> Inspection:
    """Reads one example and records problems; never raises for a bad file."""
    label = source.image if source.label is None else source.label  # which lacks one
    found = Inspection(split, source.name, str(source.image), str(label))
    damaged = "skipped" if builder.on_corrupt == "skip" else "unreadable"
    try:
        data = base.read_bytes(source.image)
    except UserError:
        found.add("image missing")
        return found
    found.digest = hashlib.blake2b(data, digest_size=16).digest()
    _inspect_image(found, data, damaged)
    if any(kind == "skipped image" for kind, _ in found.problems):
        return found  # training leaves it out, and its label
    if source.label is None or (isinstance(source.label, _RecordFile) and not source.label.read_bytes()):
        if needs_label:
            found.add("label missing")
        return found
    facts = builder.survey().get(source.label) if hasattr(builder, "survey") else None
    try:
        if facts is None:
            counts, size = _read_label(found, builder, source)
        elif isinstance(facts, UserError):
            raise facts
        else:
            counts, size = facts.id_counts(builder.meaning()), facts.size
            _inspect_facts(found, facts, builder)
    except files.CorruptImageError:
        if (f"{damaged} image", "") not in found.problems:  # COCO's labels need the image's size
            found.add(f"{damaged} label")
        return found
    except _MissingLabelError:
        found.add("label missing")
        return found
    except UserError as e:
        boundary = isinstance(facts, Facts) and builder.mask_colors() is None and _holds_boundary(facts)
        found.add(*_label_problem(str(e), boundary))
        return found
    if found.size is not None and size != found.size:
        found.add("size", f"{size[1]}x{size[0]} for {found.size[1]}x{found.size[0]}")
    _inspect_ids(found, counts, num_classes)
    return found


class _MissingLabelError(UserError):
    """A label file that does not exist."""


def _read_label(found: Inspection, builder: base.SegmentationBuilder, source: base.Source):
    """(pixels of each id, size) of a label that only its builder can read."""
    if isinstance(source.label, _RecordFile):  # written with its ids of classes
        label = files.read_label(source.label.read_bytes(), str(source.label))
        return np.bincount(label.ravel(), minlength=256), label.shape
    raw = b""
    if getattr(source.label, "suffix", "") != ".json":  # one file for all images: read once, by the builder
        try:
            raw = base.read_bytes(source.label)
        except UserError as e:
            raise _MissingLabelError(str(e)) from e
    if raw.startswith(b"\xff\xd8"):
        found.add("lossy mask")
    label = builder.read_label(source)
    if builder.LABEL_TABLE is not None:
        label = builder.LABEL_TABLE[label]
    return np.bincount(label.ravel(), minlength=256), label.shape


def _inspect_facts(found: Inspection, facts: Facts, builder) -> None:
    """Records what a mask of the user's own data shows besides its ids."""
    if facts.lossy:
        found.add("lossy mask")
    by_color = facts.family in builder.meaning().by_color
    if by_color and _holds_boundary(facts) and not _is_class(BOUNDARY_COLOR, builder.mask_colors()):
        found.add("boundary void")
    if by_color and facts.family == "palette":
        ids = facts.ids(builder.meaning())
        if (ids != facts.values).any():
            found.add("other color")


def _holds_boundary(facts: Facts) -> bool:
    """Whether PASCAL's boundary color is in a mask as RGB."""
    return facts.family == "color" and bool((facts.shown == masks.packed_colors(np.array(BOUNDARY_COLOR))).any())


def _label_problem(sentence: str, boundary: bool) -> tuple[str, str]:
    """(kind, detail) of an error of `read_label`; `boundary`: PASCAL's boundary color occurs, and there is no table."""
    detail = sentence.partition("; ")[0]
    if boundary:
        return "boundary color", ""
    if "color picture" in sentence:
        return "rgb mask", ""
    if "which no class has" in sentence:
        return "unknown color", detail.rpartition(": ")[2]
    if "ids above 255" in sentence:
        return "ids", detail.rpartition(": ")[2]
    return "unusable label", detail.rpartition(": ")[2]


def _is_class(color: tuple[int, ...], colors: np.ndarray | None) -> bool:
    return colors is not None and color in map(tuple, colors.tolist())


def _inspect_image(found: Inspection, data: bytes, damaged: str) -> None:
    """Reads an image as training would, except that 8-bit JPEGs are decoded at an eighth of their size."""
    try:
        image = decoding.open_image(data, found.image, load=False)
        kind = photographs.kind_of(image, data)
        turned, frames = decoding.is_turned(image), decoding.frames_of(image)
        found.size = decoding.upright_size(image)
        if image.format == "JPEG":  # every byte is still decoded, but with an eighth of the work after that
            image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            image.load()
        else:
            files.read_photograph(data, found.image)
    except files.CorruptImageError:
        found.add(f"{damaged} image")
        found.size = None
        return
    except UserError as e:
        found.add("unusable image", str(e).removeprefix(f"{found.image}: "))
        found.size = None
        return
    except Exception:  # Pillow raises many exceptions on damaged files
        found.add(f"{damaged} image")
        found.size = None
        return
    if kind.note:
        found.add(f"{kind.name} image")
    if frames > 1:
        found.add("frames image", str(frames))
    if turned:
        found.add("exif")


def _inspect_ids(found: Inspection, counts: np.ndarray, num_classes: int) -> None:
    found.counts = counts
    used = np.flatnonzero(counts)
    outside = used[(used >= num_classes) & (used != base.VOID)]
    if outside.size and num_classes:
        found.add("ids", ", ".join(map(str, outside[:6])))
    void = counts[base.VOID] / max(1, counts.sum())
    if void == 1:
        found.add("all void")
    elif void > 0.5 and set(used) != {0, base.VOID}:  # `_void_as_class` reports those
        found.add("much void", f"{void:.0%}")
    if len(used) == 1 and used[0] != base.VOID:
        found.add("empty", f"class {used[0]}")


def _void_as_class(inspections: list[Inspection]) -> None:
    """Records labels of 0 and 255 only: all that hold 255 if the whole data set is like that, else the conspicuous
    ones.

    Where other classes occur, an image of background with thin void outlines is normal.
    """
    counted = [(i, i.counts) for i in inspections if i.counts is not None]
    binary = {0, base.VOID}
    whole = set(np.flatnonzero(sum((counts for _, counts in counted), np.zeros(256, np.int64)))) == binary
    for inspection, counts in counted:
        void = counts[base.VOID] / max(1, counts.sum())
        striking = set(np.flatnonzero(counts)) == binary and void > 0.05
        if striking or (whole and void):
            inspection.add("0 and 255")


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
        for kind, (error, sentence) in KINDS.items()
        if by_kind.get(kind)
    ]


def _summarize(builder, class_names, splits, inspections, findings) -> Audit:
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
        if labelled[split] and (p[:count] > 0).sum() <= 1 and split == next(iter(splits)):
            alone = next((n for n, pixels_of in zip(class_names, p) if pixels_of), "no")
            sentence = f"one {KINDS['one class'][1]}" if alone != "no" else f"no {KINDS['one class'][1]}"
            findings.append(Finding(True, "one class", sentence, 1, (alone,) if alone != "no" else ()))
        never = [name for name, n in zip(class_names, p) if n == 0]
        if never and labelled[split]:
            learns = split == next(iter(splits))
            sentence = f"classes never occur in {split}: {', '.join(never)}; {_consequence(learns)}"
            findings.append(Finding(False, "never", sentence + _skipped_ids(builder, p[:count]), len(never), ()))
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


def _consequence(training: bool) -> str:
    return "the network cannot learn them" if training else "their IoU there is 0, or undefined if never predicted"


def _skipped_ids(builder: base.SegmentationBuilder, counts: np.ndarray) -> str:
    """A hint for a class that is missing below one that occurs, if the ids are the user's own."""
    largest = int(np.flatnonzero(counts).max(initial=0))
    if builder.name != "folder" or (counts[:largest] > 0).all():
        return ""
    if builder.options.classes:
        return " (the ids have gaps: check that the classes file has the labels' order)"
    return " (the ids have gaps: without config.data.classes, every number up to the largest is a class)"


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
