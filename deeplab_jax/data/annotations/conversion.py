"""From the files of an annotation tool to masks, a classes file and a sheet of overlays."""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deeplab_jax.console import shown
from deeplab_jax.data import class_files
from deeplab_jax.data.annotations.opening import Labelled, open_labels
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging import files, listing, palettes
from deeplab_jax.imaging.overlay import overlay, side_by_side, stack

_COLUMNS, _TILE = 4, 240


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
    notes: Sequence[str]
    sheet: Path | None

    def words(self) -> str:
        """A summary for the user."""
        lines = [f"{self.kind}: {self.count} masks in {self.out / 'masks'}, {len(self.names)} classes in "
                 f"{self.out / 'classes.txt'}"]  # fmt: skip
        for count, what in ((self.left_out, "no area (points, lines, boxes)"), (self.without_class, "no class")):
            if count:
                have, are = ("annotation has", "is") if count == 1 else ("annotations have", "are")
                lines.append(f"note: {count} {have} {what} and {are} left out")
        lines += [f"note: {note}" for note in self.notes]
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
            files.write_palette_png(out / "masks" / f"{stem}.png", label, palette, files.CONVERTED)
            if len(tiles) < examples:
                tiles.append((stem, _tile(_of(stem, photographs), label, palette, labelled.names)))
        except UserError as e:
            failed += 1
            print(f"error: {shown(str(e))}", file=sys.stderr, flush=True)
    sheet = None
    if tiles:
        sheet = out / "overlay.png"
        rows = [tiles[n : n + _COLUMNS] for n in range(0, len(tiles), _COLUMNS)]
        files.write_png(sheet, stack([side_by_side([p for _, p in row], [s for s, _ in row]) for row in rows]))
    count = len(labelled.masks) - failed
    skipped = (labelled.left_out, labelled.without_class, labelled.notes)
    return Result(labelled.kind, out, count, failed, labelled.names, *skipped, sheet)


def _check_earlier(out: Path, written: Sequence[Path], names: Sequence[str]) -> None:
    """Raises `UserError` if files of another origin would be replaced, or masks stay beside others' classes."""
    masks, classes = sorted((out / "masks").rglob("*.png")), out / "classes.txt"
    own = [path for path in masks if files.read_note(path) == files.CONVERTED]
    foreign = next((path for path in masks if path in written and path not in own and files.is_foreign(path)), None)
    if foreign is not None:
        raise UserError(f"{foreign}: exists, and convert_labels did not write it; remove it, or name another --out")
    if not masks and not classes.exists():
        return
    try:
        before = list(class_files.read_classes(classes)[0])
    except UserError:
        before = []
    if before == list(names):
        return
    if not own:
        raise UserError(f"{out}: holds masks or a classes file of another origin; name another --out")
    left = [path for path in masks if path not in written]
    if left:
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


def _photographs(folder: Path) -> dict[str, Path]:
    """The photographs of a folder by their paths below it without suffix."""
    found = listing.walk(folder) if folder.is_dir() else ()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def _of(stem: str, photographs: Mapping[str, Path]) -> Path | None:
    """The photograph of a mask: the one whose path ends as the mask's, if there is one; by the longest such end."""
    parts = stem.split("/")
    for n in range(len(parts)):
        end = "/".join(parts[n:])
        ends = [path for name, path in photographs.items() if f"/{name}".endswith(f"/{end}")]
        if ends:
            return ends[0] if len(ends) == 1 else None
    return None


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
