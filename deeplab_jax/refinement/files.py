"""Photographs and rough labels in files, refined by the CRF into files."""

import collections
import contextlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deeplab_jax.crf.setting import Setting
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files, listing, overlay, pairing, strip
from deeplab_jax.limits import CUT_ABOVE, REFUSE_ABOVE
from deeplab_jax.refinement import pieces
from deeplab_jax.refinement.rough import Probabilities, RoughLabels

_NAMES = [f"class {i}" for i in range(256)]


class RefineOptions(NamedTuple):
    """How to refine. `given` is what the files hold that the CRF starts from: "probs" or "labels".

    Photographs of more than `cut_above` pixels are cut into pieces, those of more than `refuse_above` refused.
    """

    crf: Setting
    given: str
    unknown: int = 255
    confidence: float = 0.7
    iterations_strip: bool = False
    cut_above: int = CUT_ABOVE
    refuse_above: int = REFUSE_ABOVE
    colors: np.ndarray | None = None  # of the classes, where labels show them


def refine_folder(images: Path, given: Path, out: Path, options: RefineOptions) -> int:
    """Refines every photograph below `images`; a bad one is reported on stderr and the rest go on.

    Returns:
      The number of those that failed.
    """
    if not given.is_dir():
        raise UserError(f"{given}: --image is a folder, so this must be the folder with a file for each photograph")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: --image is a folder, so this must be a folder")
    inputs = [item for item in listing.find_inputs([images], exclude=out) if not item.is_video]
    partners = Partners(images, given, options.given)
    inputs = [item for item in inputs if partners.is_photograph(item)]
    stems = listing.result_stems(inputs)
    written = [path for stem in stems for path in outputs(out / stem, options)]
    read = [item.path for item in inputs]
    for item in inputs:
        with contextlib.suppress(UserError):  # reported in its turn
            read.append(partners.of(item))
    listing.check_outputs(written, read)
    failed = 0
    for number, (item, stem) in enumerate(zip(inputs, stems), 1):
        print(f"[{number}/{len(inputs)}] ", end="", flush=True)
        try:
            refine_file(item.path, partners.of(item), out / stem, options)
        except UserError as e:
            failed += 1
            print(f"{item.path}: failed", flush=True)
            print(f"error: {e}", file=sys.stderr, flush=True)
    if failed:
        print(f"error: {failed} of {len(inputs)} photographs failed", file=sys.stderr)
    return failed


def outputs(out: Path, options: RefineOptions) -> list[str]:
    """Every file that refining one photograph to `out` writes."""
    return [f"{out}.png", f"{out}_overlay.png", *[f"{out}_iterations.png"] * options.iterations_strip]


class Partners:
    """The file of probabilities or labels of each photograph of a folder, by the rule of data sets.

    A name with the photograph's suffix (`a.jpg_probs.npy`, as `predict` writes where `a.png` is there too) comes
    first.

    Args:
      images: the folder of photographs.
      folder: that of the others; may be the same.
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
          UserError: there is none, or two may be.
        """
        relative = item.path.relative_to(item.root)
        stem = self._stems[item.path]
        for level in (1, 0):  # what `predict` called its own, long names cut
            written = self._folder / f"{item.stem(level)}{self._written}"
            if (level or self._twins[pairing.normal(stem)] < 2) and written.is_file() and written != item.path:
                return written
        found = self._masks.of(stem + item.path.suffix, item.path)
        if found is None and self._twins[pairing.normal(stem)] > 1:
            raise UserError(
                f"{item.path}: another photograph has its name but for the suffix, so its file must be called "
                f"{item.path.name}{self._written}"
            )
        found = found or self._masks.of(stem, item.path)
        if found is None:
            plain = relative.with_suffix(self._suffixes[0] if len(self._suffixes) == 1 else ".png")
            raise UserError(f"{item.path}: {self._folder} has no {plain} for it")
        return found


def refine_file(image_path: Path, given: Path, out: Path, options: RefineOptions) -> None:
    """Refines one photograph and writes `out` + .png, _overlay.png and, if asked for, _iterations.png.

    Raises:
      UserError: a file cannot be read or written, or the two do not belong together.
    """
    start = time.monotonic()
    for path in (image_path, given):
        listing.check_file(path)
    listing.check_outputs(outputs(out, options), (image_path, given))
    image = files.read_photograph(image_path, refuse_above=options.refuse_above)
    size = image.shape[:2]
    rough: Probabilities | RoughLabels
    if options.given == "probs":
        rough = Probabilities.from_file(given, size)
    else:
        rough = RoughLabels.from_file(given, size, options.unknown, options.confidence, options.colors)
        if rough.is_settled:
            has = f"the id {rough.ids[0]} alone" if len(rough.ids) else "no label"
            files.write_png(f"{out}_overlay.png", overlay.overlay(image, rough.given, rough.palette, _NAMES))
            files.write_palette_png(f"{out}.png", rough.given, rough.palette)
            print(f"{out}.png  ({given.name} has {has}: as it is)", flush=True)
            return
    count = len(pieces.pieces(size, options.cut_above, pieces.margin_of(options.crf.params)))
    if count > 1:
        print(f"{image_path}: {size[0] * size[1] / 1e6:.1f} megapixels, above --cut_above: in {count} overlapping "
              "pieces", flush=True)  # fmt: skip
    names = _NAMES
    if options.iterations_strip:
        labels, frames = pieces.refine_frames(rough, image, options.crf, options.cut_above)
        picture = strip.iterations_strip(frames, rough.palette, rough.ids, names)
        files.write_png(f"{out}_iterations.png", picture)
    else:
        labels = pieces.refine(rough, image, options.crf, options.cut_above)
    files.write_png(f"{out}_overlay.png", overlay.overlay(image, labels, rough.palette, names))
    files.write_palette_png(f"{out}.png", labels, rough.palette)
    print(f"{out}.png  ({time.monotonic() - start:.1f} s)", flush=True)
