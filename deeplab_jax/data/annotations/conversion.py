"""From the files of an annotation tool to masks, a classes file and a sheet of overlays."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from deeplab_jax.console import shown
from deeplab_jax.data import class_files, meaning
from deeplab_jax.data.annotations import coco, cvat, label_studio, labelme, raster
from deeplab_jax.data.annotations.drawing import Annotations, painted, stem_of
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_file, reason, write_atomically
from deeplab_jax.imaging import files, listing, masks, pairing, palettes
from deeplab_jax.imaging.overlay import overlay, side_by_side, stack
from deeplab_jax.imaging.palettes import VOID

_COLUMNS, _TILE = 4, 240

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
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Result:
    """The files that were written."""

    kind: str
    out: Path
    count: int
    failed: int
    names: Sequence[str]
    left_out: int
    without_class: int
    note: str
    sheet: Path | None

    def words(self) -> str:
        """A summary for the user."""
        lines = [f"{self.kind}: {self.count} masks in {self.out / 'masks'}, {len(self.names)} classes in "
                 f"{self.out / 'classes.txt'}"]  # fmt: skip
        for count, what in ((self.left_out, "no area (points, lines, boxes)"), (self.without_class, "no class")):
            if count:
                have, are = ("annotation has", "is") if count == 1 else ("annotations have", "are")
                lines.append(f"note: {count} {have} {what} and {are} left out")
        if self.note:
            lines.append(f"note: {self.note}")
        if self.sheet:
            lines.append(f"Look at {self.sheet}")
        if self.failed:
            lines.append(f"error: {self.failed} masks could not be converted")
        return "\n".join(lines)


def convert(source: Path, out: Path, images: Path | None, classes: Path | None, examples: int) -> Result:
    """Writes `out`/masks, `out`/classes.txt and `out`/overlay.png; a bad mask is reported and the rest are converted.

    Args:
      source: a file or folder of labels.
      out: the folder to write.
      images: the folder of the photographs; None = beside the labels.
      classes: names in the order of the ids, instead of the tool's own; for masks in colors, their colors.
      examples: pictures on the sheet; 0 = no sheet.

    Raises:
      UserError: the labels have no known format, or one of their files is damaged.
    """
    earlier = out.resolve()  # of an earlier run, if it is inside the source
    labelled = open_labels(source, classes, None if earlier == source.resolve() else earlier)
    photographs = _photographs(images or (source if source.is_dir() else source.parent))
    written = [out / "classes.txt", out / "overlay.png", *(out / "masks" / f"{stem}.png" for stem, _ in labelled.masks)]
    given = source.rglob("*") if source.is_dir() else [source]
    read = [p for p in (*given, *photographs.values()) if earlier not in p.resolve().parents]
    read += [classes] if classes else []
    listing.check_outputs(written, read)
    _check_earlier(out, written, labelled.names)
    _write_classes(out / "classes.txt", source, labelled)
    palette = palettes.from_colors(labelled.colors)
    failed = 0
    tiles: list[tuple[str, np.ndarray]] = []
    for stem, make in tqdm(labelled.masks, desc="making masks", unit="mask", mininterval=0.5):
        try:
            label = make()
            files.write_palette_png(out / "masks" / f"{stem}.png", label, palette)
            if len(tiles) < examples:
                tiles.append((stem, _tile(photographs.get(pairing.split(stem)[1]), label, palette, labelled.names)))
        except UserError as e:
            failed += 1
            print(f"error: {shown(str(e))}", file=sys.stderr, flush=True)
    sheet = None
    if tiles:
        sheet = out / "overlay.png"
        rows = [tiles[n : n + _COLUMNS] for n in range(0, len(tiles), _COLUMNS)]
        files.write_png(sheet, stack([side_by_side([p for _, p in row], [s for s, _ in row]) for row in rows]))
    count = len(labelled.masks) - failed
    skipped = (labelled.left_out, labelled.without_class, labelled.note)
    return Result(labelled.kind, out, count, failed, labelled.names, *skipped, sheet)


def _check_earlier(out: Path, written: Sequence[Path], names: Sequence[str]) -> None:
    """Raises `UserError` if masks of an earlier conversion would stay beside a classes file that names others."""
    left = sorted({*(out / "masks").rglob("*.png")} - {*written})
    if not left:
        return
    try:
        before = list(class_files.read_classes(out / "classes.txt")[0])
    except UserError:
        before = []
    if before != list(names):
        raise UserError(
            f"{out / 'masks'}: holds {len(left)} masks of an earlier conversion with other classes, such as "
            f"{left[0].name}; remove them, or name another --out"
        )


def _write_classes(path: Path, source: Path, labelled: Labelled) -> None:
    """Writes the classes file if its reader finds the same names in it; otherwise raises `UserError`."""
    names = list(labelled.names)

    def write(temporary: Path) -> None:
        temporary.write_text(class_files.write_classes(names, labelled.colors), encoding="utf-8")
        try:
            back = list(class_files.read_classes(temporary)[0])
        except UserError as e:
            why = str(e).removeprefix(f"{temporary}: ")
            raise UserError(f"{source}: its classes cannot be written to a classes file ({why}); rename them") from e
        if back != names:
            odd = next((a for a, b in zip(names, back) if a != b), names[-1])
            raise UserError(f"{source}: the class '{odd}' cannot be written to a classes file; rename it in the tool")

    write_atomically(path, write)


def open_labels(source: Path, classes: Path | None = None, exclude: Path | None = None) -> Labelled:
    """Reads the labels of any supported tool, but not in the resolved folder `exclude`; raises like `convert`."""
    for suffix, read in ((".json", _json), (".xml", _cvat)):
        paths = _below(source, suffix, exclude)
        found = read(paths) if paths else None
        if found:
            return _of_shapes(source, *found, classes)
    if source.is_dir():
        listed = classes or raster.class_list(raster.colored_masks(source)) or raster.class_list(source)
        apart = raster.folders_of_classes(source, exclude)
        if apart and raster.colored_masks(source) == source:
            return _of_shapes(source, "one mask for each class", raster.read_classes_apart(apart, exclude), classes)
        if listed:
            return _of_colors(source, listed, exclude)
    raise UserError(
        f"{source}: holds no labels in a known format: JSON of labelme, COCO or Label Studio, CVAT's XML for images, "
        "masks in colors with a labelmap.txt (or --classes), or one folder of masks for each class"
    )


def _below(source: Path, suffix: str, exclude: Path | None) -> list[Path]:
    if source.is_file():
        return [source] if source.suffix.lower() == suffix else []
    return list(listing.walk(source, (suffix,), exclude))


def _json(paths: Sequence[Path]) -> tuple[str, Annotations] | None:
    """(format, annotations) of JSON files, ignoring those that are not labels; None if there are none."""
    contents = []
    for path in paths:
        try:
            contents.append((path, json.loads(read_file(path).decode("utf-8-sig"))))
        except (OSError, ValueError, RecursionError) as e:
            raise UserError(f"{path}: is not valid JSON ({reason(e)}); export it again") from e
    for name, fits, read in JSON_FORMATS:
        mine = [(path, content) for path, content in contents if fits(content)]
        if mine:
            try:
                return name, read(mine)
            except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as e:
                raise UserError(
                    f"{mine[0][0]}: is not complete {name} JSON ({type(e).__name__}: {e}); export it again"
                ) from e
    return None


def _cvat(paths: Sequence[Path]) -> tuple[str, Annotations] | None:
    return "CVAT", cvat.read(list(paths))


def _of_shapes(source: Path, kind: str, found: Annotations, classes: Path | None) -> Labelled:
    if not found.images:
        raise UserError(f"{source}: holds no annotated image")
    note = ""
    if classes is not None:
        names, colors = class_files.read_classes(classes)
        unknown = sorted({a.label for i in found.images for a in i.areas if a.label and a.label not in names})
        if unknown:
            raise UserError(f"{classes}: lacks the class '{unknown[0]}', which {source} has; add it")
        if any(a.label == names[0] for i in found.images for a in i.areas if a.label != "background"):
            note = f"pixels without an annotation are '{names[0]}', the first class of {classes}: it lacks a background"
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
    return Labelled(kind, names, colors, made, left_out, without_class, note)


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


def _photographs(folder: Path) -> dict[str, Path]:
    """The photographs of a folder by name without suffix."""
    return {path.stem: path for path in listing.walk(folder)} if folder.is_dir() else {}


def _tile(photograph: Path | None, label: np.ndarray, palette: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """A label over its photograph, or over gray if there is none of its size."""
    image = np.full((*label.shape, 3), 128, np.uint8)
    if photograph is not None:
        try:
            read = files.read_photograph(photograph)
            image = read if read.shape[:2] == label.shape else image
        except UserError:  # the sheet omits it
            pass
    step = max(1, -(-max(label.shape) // _TILE))
    return overlay(image[::step, ::step], label[::step, ::step], palette, names)
