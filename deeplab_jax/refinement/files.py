"""Refining rough labels of photographs by the CRF, from files to files."""

import collections
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from deeplab_jax.console import shown
from deeplab_jax.crf.params import FIELDS
from deeplab_jax.crf.setting import Setting
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files, listing, overlay, pairing, strip
from deeplab_jax.limits import CUT_ABOVE, REFUSE_ABOVE
from deeplab_jax.refinement import pieces
from deeplab_jax.refinement.rough import Probabilities, RoughLabels
from deeplab_jax.runs.devices import in_order
from deeplab_jax.runs.job import Job, Report, absence, digest

_STRIP = "iterations"  # in the note of a label map that was written with its strip
_NAMES = [f"class {i}" for i in range(256)]


class RefineOptions(NamedTuple):
    """Options of `refine`. `given` is the kind of file that the CRF starts from: "probs" or "labels".

    Photographs of more than `cut_above` pixels are cut into pieces, those of more than `refuse_above` refused.
    """

    crf: Setting
    given: str
    unknown: int = 255
    confidence: float = 0.7
    iterations_strip: bool = False
    cut_above: int = CUT_ABOVE
    refuse_above: int = REFUSE_ABOVE
    colors: np.ndarray | None = None  # of the classes, if labels are colored
    overwrite: bool = False  # in folders, recomputes existing results

    @property
    def identity(self) -> list:
        """JSON values that identify these settings."""
        crf = [np.asarray(getattr(self.crf.params, name), np.float64).tolist() for name in FIELDS]
        colors = None if self.colors is None else np.asarray(self.colors).tolist()
        return [crf, self.crf.options, self.given, self.unknown, self.confidence, self.cut_above, colors]


def refine_folder(
    images: Path,
    given: Path,
    out: Path,
    options: RefineOptions,
    job: Job | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> int:
    """Refines every photograph below `images`; a bad one is reported on stderr and the rest are processed.

    Results are skipped if they are complete and made from these same files with these settings. Each of several
    processes handles its share of the list; names follow from the whole list.

    Args:
      job: the processes that share the work.
      devices: each works on one photograph at a time; default the first local one.

    Returns:
      The number of photographs that failed or were left undone by any process; the same in every process.
    """
    job = job or Job()
    check_folders(given, out)
    inputs = [item for item in listing.find_inputs([images], exclude=out) if not item.is_video]
    partners = Partners(images, given, options.given)
    inputs = [item for item in inputs if partners.is_photograph(item)]
    stems = listing.result_stems(inputs)
    written = [path for stem in stems for path in outputs(out / stem, options)]
    tasks = [_Task(item.path, _partner(partners, item), out / stem) for item, stem in zip(inputs, stems)]
    read = [task.given for task in tasks if isinstance(task.given, Path)]  # the others are reported later
    listing.check_outputs(written, [*(item.path for item in inputs), *read])
    if not options.overwrite:
        files.refuse_foreign(f"{task.out}.png" for task in tasks)
    mine = job.share(tasks)
    todo = mine if options.overwrite else [task for task in mine if not task.is_done(options)]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} are done and skipped (--overwrite recomputes them)", flush=True)
    failed = 0
    results = in_order(partial(_refine, options=options), todo, devices or jax.local_devices()[:1])
    for number, (task, (lines, error)) in enumerate(results, 1):
        if error is not None:
            failed += 1
            lines.append(f"{shown(task.image)}: failed")
            print(f"error: {shown(str(error))}", file=sys.stderr, flush=True)
        print(f"[{number}/{len(todo)}] " + "\n".join(map(shown, lines)), flush=True)

    def sum_up(reports: list[Report]) -> int:
        bad = 0
        for report in reports:
            if report.found is not None and report.found["plan"] == listed:
                bad += report.found["failed"]
                continue
            share = job.share_of(report.index, tasks)
            left = [task.image for task in share if not task.is_done(options)]
            bad += len(left)
            print(f"error: {shown(absence(report, len(share), left))}", file=sys.stderr, flush=True)
        if job.count > 1:
            print(f"{len(tasks) - bad} of {len(tasks)} photographs are done, by {job.count} processes", flush=True)
        if bad:
            words = "failed" if job.count == 1 else "failed or are missing"
            print(f"error: {bad} of {len(tasks)} photographs {words}", file=sys.stderr, flush=True)
        return bad

    listed = digest([stems, options.identity])
    return job.conclude({"failed": failed, "plan": listed}, sum_up)


def check_folders(given: Path, out: Path) -> None:
    """Checks that the other paths are folders if the photographs are in a folder.

    Raises:
      UserError: one is not a folder.
    """
    if not given.is_dir():
        raise UserError(f"{given}: --image is a folder, so this must be the folder with a file for each photograph")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: --image is a folder, so this must be a folder")


class _Task(NamedTuple):
    """A photograph, its file of probabilities or labels (or the error), and the stem of its results."""

    image: Path
    given: Path | UserError
    out: Path

    def digest(self, options: RefineOptions) -> str:
        """A digest of everything that determines the results; "" if it cannot be computed."""
        if isinstance(self.given, UserError):
            return ""
        try:
            found = [(str(path.resolve()), path.stat()) for path in (self.image, self.given)]
        except OSError:  # it has disappeared, which is reported when it is read
            return ""
        return digest([*((name, stat.st_size, stat.st_mtime_ns) for name, stat in found), options.identity])

    def is_done(self, options: RefineOptions) -> bool:
        """Whether the results exist and were made from these same files with these settings."""
        wanted = self.digest(options)
        written = outputs(self.out, options)
        words = (files.read_note(written[0]) or "").split()
        same = words[:1] == [wanted] and (not options.iterations_strip or _STRIP in words)
        return bool(wanted) and same and all(map(os.path.isfile, written))


def _partner(partners: "Partners", item: listing.Input) -> Path | UserError:
    try:
        return partners.of(item)
    except UserError as e:
        return e


def _refine(task: _Task, options: RefineOptions) -> tuple[list[str], UserError | None]:
    """Lines about a photograph, and its error if any."""
    lines: list[str] = []
    try:
        if isinstance(task.given, UserError):
            raise task.given
        refine_file(task.image, task.given, task.out, options, lines.append, task.digest(options))
    except UserError as e:
        return lines, e
    return lines, None


def outputs(out: Path, options: RefineOptions) -> list[str]:
    """Every file that refining one photograph to `out` writes."""
    return [f"{out}.png", f"{out}_overlay.png", *[f"{out}_iterations.png"] * options.iterations_strip]


class Partners:
    """The file of probabilities or labels of each photograph of a folder, by the rules of data sets.

    A name with the photograph's suffix (`a.jpg_probs.npy`, which `predict` writes if `a.png` exists too) takes
    precedence.

    Args:
      images: the folder of photographs.
      folder: the folder of the other files; may be the same.
      given: "probs" or "labels".
    """

    def __init__(self, images: Path, folder: Path, given: str):
        endings = pairing.PROBABILITY_ENDINGS if given == "probs" else pairing.MASK_ENDINGS
        self._suffixes = (".npy",) if given == "probs" else pairing.IMAGE_SUFFIXES
        affixes = pairing.Affixes(endings=endings)
        photographs, candidates = pairing.photographs_and_masks(images, folder, affixes, self._suffixes)
        self._stems = {path: stem for stem, path in photographs}
        self._masks = pairing.Masks(candidates, affixes)
        self._twins = collections.Counter(pairing.normal(stem) for stem, _ in photographs)
        self._folder, self._written = folder, f"{endings[0]}.npy" if given == "probs" else ".png"

    def is_photograph(self, item: listing.Input) -> bool:
        """Whether a file that was found is a photograph, not a mask beside it."""
        return item.path in self._stems

    def of(self, item: listing.Input) -> Path:
        """The file that belongs to a photograph.

        Raises:
          UserError: there is none, or there are two candidates.
        """
        relative = item.path.relative_to(item.root)
        stem = self._stems[item.path]
        for level in (1, 0):  # the names that `predict` gives, with long ones cut
            written = self._folder / f"{item.stem(level)}{self._written}"
            if (level or self._twins[pairing.normal(stem)] < 2) and written.is_file() and written != item.path:
                return written
        found = self._masks.of(stem + item.path.suffix, item.path)
        if found is None and self._twins[pairing.normal(stem)] > 1:
            raise UserError(
                f"{item.path}: another photograph has the same name except for the suffix, so its file must be called "
                f"{item.path.name}{self._written}"
            )
        found = found or self._masks.of(stem, item.path)
        if found is None:
            plain = relative.with_suffix(self._suffixes[0] if len(self._suffixes) == 1 else ".png")
            raise UserError(f"{item.path}: {self._folder} has no {plain} for it")
        return found


def refine_file(
    image_path: Path,
    given: Path,
    out: Path,
    options: RefineOptions,
    say: Callable[[str], None] = print,
    note: str = "refine",
) -> None:
    """Refines one photograph and writes `out` + .png, _overlay.png and, if requested, _iterations.png.

    Args:
      say: called with a line for each result, and for one that is made in pieces.
      note: stored in the .png, which is written last.

    Raises:
      UserError: a file cannot be read or written, or the two do not match.
    """
    start = time.monotonic()
    for path in (image_path, given):
        listing.check_file(path)
    listing.check_outputs(outputs(out, options), (image_path, given))
    image = files.read_photograph(image_path, refuse_above=options.refuse_above)
    size = image.shape[:2]
    if options.iterations_strip:
        note = f"{note} {_STRIP}"
    elif _STRIP in (files.read_note(f"{out}.png") or "").split():
        Path(f"{out}_iterations.png").unlink(missing_ok=True)  # they are of the label map that is replaced
    rough: Probabilities | RoughLabels
    if options.given == "probs":
        rough = Probabilities.from_file(given, size)
    else:
        rough = RoughLabels.from_file(given, size, options.unknown, options.confidence, options.colors)
        if rough.is_settled:
            has = f"only the id {rough.ids[0]}" if len(rough.ids) else "no label"
            picture = overlay.overlay(image, rough.given, rough.palette, _NAMES)
            for ending in ("_overlay", "_iterations") if options.iterations_strip else ("_overlay",):
                files.write_png(f"{out}{ending}.png", picture)
            files.write_palette_png(f"{out}.png", rough.given, rough.palette, note)
            say(shown(f"{out}.png  ({given.name} has {has}: unchanged)"))
            return
    try:
        params = options.crf.params.of_classes(rough.ids, len(rough.ids) if options.given == "probs" else None)
    except ValueError as e:
        raise UserError(f"{given}: {e}; choose other parameters with --preset, or weights for all classes alike") from e
    crf = dataclasses.replace(options.crf, params=params)
    count = len(pieces.pieces(size, options.cut_above, pieces.margin_of(params)))
    if count > 1:
        megapixels = f"{size[0] * size[1] / 1e6:.1f} megapixels"
        say(f"{shown(image_path)}: {megapixels}, above --cut_above: in {count} overlapping pieces")
    names = _NAMES
    if options.iterations_strip:
        labels, frames = pieces.refine_frames(rough, image, crf, options.cut_above)
        picture = strip.iterations_strip(frames, rough.palette, rough.ids, names)
        files.write_png(f"{out}_iterations.png", picture)
    else:
        labels = pieces.refine(rough, image, crf, options.cut_above)
    files.write_png(f"{out}_overlay.png", overlay.overlay(image, labels, rough.palette, names))
    files.write_palette_png(f"{out}.png", labels, rough.palette, note)
    say(f"{shown(out)}.png  ({time.monotonic() - start:.1f} s)")
