"""The labels of any annotation tool, found by their files: classes, colors and a function that makes each mask."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from deeplab_jax.data import class_files, meaning
from deeplab_jax.data.annotations import coco, cvat, label_studio, labelme, raster
from deeplab_jax.data.annotations.drawing import Annotations, Part, joined, painted, progress, stem_of
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_file, reason
from deeplab_jax.imaging import listing, masks, palettes
from deeplab_jax.imaging.palettes import VOID

# JSON formats: the name for the user, whether a file has the format, and its reader.
JSON_FORMATS: tuple[tuple[str, Callable, Callable], ...] = (
    ("COCO", coco.fits, coco.read),
    ("labelme", labelme.fits, labelme.read),
    ("Label Studio", label_studio.fits, label_studio.read),
)


class Labelled(NamedTuple):
    """The output: classes, background first, their colors, and (stem, function that makes it) of each mask."""

    kind: str
    names: Sequence[str]
    colors: np.ndarray
    masks: Sequence[tuple[str, Callable[[], np.ndarray]]]
    left_out: int = 0
    without_class: int = 0
    notes: Sequence[str] = ()


class _Found(NamedTuple):
    """A tool's annotations, its name, and notes for the user."""

    kind: str
    annotations: Annotations
    notes: Sequence[str] = ()


def open_labels(source: Path, classes: Path | None = None, exclude: Path | None = None) -> Labelled:
    """Reads the labels of any supported tool, but not in the resolved folder `exclude`; raises like `convert`."""
    xml = _below(source, ".xml", exclude)
    found = _json(_below(source, ".json", exclude))
    if found:
        passed, notes = [path for path in xml if cvat.seems(path)], list(found.notes)
        if passed:
            notes.append(_passed_over(passed, "CVAT", found.kind))
        return _of_shapes(source, found._replace(notes=notes), classes)
    found = _cvat(xml)
    if found:
        return _of_shapes(source, found, classes)
    if source.is_dir():
        listed = classes or raster.class_list(raster.colored_masks(source)) or raster.class_list(source)
        apart = raster.folders_of_classes(source, exclude)
        if apart and raster.colored_masks(source) == source:
            found = _Found("one mask for each class", raster.read_classes_apart(apart, exclude))
            return _of_shapes(source, found, classes)
        if listed:
            return _of_colors(source, listed, exclude)
    raise UserError(
        f"{source}: holds no labels in a known format: JSON of labelme, COCO or Label Studio, CVAT's XML for images "
        "(export the task as 'CVAT for images 1.1'), masks in colors with a labelmap.txt (or --classes), or one folder "
        "of masks for each class"
    )


def _below(source: Path, suffix: str, exclude: Path | None) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix.lower() == suffix else []
    return list(listing.walk(source, (suffix,), exclude))


def _json(paths: Sequence[Path]) -> _Found | None:
    """The contents of JSON files, ignoring those that are not labels; None if there are none."""
    parts: dict[str, list[tuple[Path, Part]]] = {name: [] for name, _, _ in JSON_FORMATS}
    for path in progress(paths, "file"):  # one after the other: labelme's hold the photographs, too
        try:
            content = json.loads(read_file(path).decode("utf-8-sig"))
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{path}: is not valid JSON ({reason(e)}); export it again") from e
        for name, fits, read in JSON_FORMATS:
            if fits(content):
                try:
                    parts[name].append((path, read(path, content)))
                except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
                    raise UserError(
                        f"{path}: is not complete {name} JSON ({type(e).__name__}: {e}); export it again"
                    ) from e
                break
    kinds = [name for name, found in parts.items() if found]
    if not kinds:
        return None
    kind, *others = kinds
    notes = [_passed_over([path for path, _ in parts[other]], other, kind) for other in others]
    found = joined([part for _, part in parts[kind]])
    if kind == "labelme":
        found = found._replace(images=labelme.below_one_folder(found.images))
    return _Found(kind, found, notes)


def _passed_over(paths: Sequence[Path], tool: str, kind: str) -> str:
    """The note on files of a second tool, whose format may describe the same images."""
    files, are = ("file", "is") if len(paths) == 1 else ("files", "are")
    return f"{len(paths)} {tool} {files}, such as {paths[0]}, {are} left out: only {kind} is read"


def _cvat(paths: Sequence[Path]) -> _Found | None:
    parts = [part for path in paths if (part := cvat.read(path)) is not None]
    return _Found("CVAT", joined(parts)) if parts else None


def _of_shapes(source: Path, opened: _Found, classes: Path | None) -> Labelled:
    found, notes = opened.annotations, list(opened.notes)
    if not found.images:
        raise UserError(f"{source}: holds no annotated image")
    if found.unlabelled:
        images, get = ("image", "gets") if found.unlabelled == 1 else ("images", "get")
        notes.append(f"{found.unlabelled} {images} without annotations {get} no mask")
    if classes is not None:
        names, colors = class_files.read_classes(classes)
        unknown = sorted({a.label for i in found.images for a in i.areas if a.label and a.label not in names})
        if unknown:
            raise UserError(f"{classes}: lacks the class '{unknown[0]}', which {source} has; add it")
        if any(a.label == names[0] for i in found.images for a in i.areas if a.label != "background"):
            notes.append(
                f"pixels without an annotation are '{names[0]}', the first class of {classes}: it lacks a background"
            )
    else:
        names = ("background", *found.names)
        colors = None if found.colors is None else np.array([(0, 0, 0), *found.colors], np.uint8)
    if len(names) > VOID:
        raise UserError(f"{source}: has {len(names)} classes with the background; at most 255 are supported")
    ids = {name: i for i, name in enumerate(names)}
    stems = [stem_of(image.image) for image in found.images]
    if "" in stems:
        raise UserError(f"{source}: image {stems.index('') + 1} has no name; export it again")
    twice = next((s for s in stems if stems.count(s) > 1), None) if len(set(stems)) < len(stems) else None
    if twice is not None:
        raise UserError(f"{source}: has two images '{twice}', whose masks would have one name; rename one of them")
    made = [(stem, lambda image=image: painted(image, ids)) for stem, image in zip(stems, found.images)]
    left_out = sum(image.left_out for image in found.images)
    without_class = sum(image.without_class for image in found.images)
    colors = palettes.voc_palette()[: len(names)] if colors is None else colors
    return Labelled(opened.kind, names, colors, made, left_out, without_class, notes)


def _of_colors(source: Path, classes: Path, exclude: Path | None) -> Labelled:
    names, colors, listed = raster.read_colored(source, classes, exclude)
    if not listed:
        raise UserError(f"{source}: holds no mask")
    found = []
    for _, path in tqdm(listed, desc="reading masks", unit="mask", mininterval=0.5, leave=False):
        try:
            found.append(meaning.facts_of(read_file(path), str(path), colors))
        except (UserError, OSError):  # reported when the mask is converted
            continue
    how, _ = meaning.decide(found, len(names), colors)

    def make(path: Path) -> np.ndarray:
        label = masks.read_label(path, meaning=how)
        wrong = np.unique(label[(label >= len(names)) & (label != VOID)])
        if len(wrong):
            raise UserError(f"{path}: holds the id {wrong[0]}, but {classes} names {len(names)} classes")
        return label

    made = [(stem, lambda p=path: make(p)) for stem, path in listed]
    return Labelled("masks in colors", names, palettes.voc_palette()[: len(names)] if colors is None else colors, made)
