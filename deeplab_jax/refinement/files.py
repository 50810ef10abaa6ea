"""Photographs and rough labels in files, refined by the CRF into files."""

import contextlib
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deeplab_jax.crf.params import Settings
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files, listing, overlay, pairing, strip
from deeplab_jax.refinement import pieces
from deeplab_jax.refinement.rough import Probabilities, RoughLabels

_NAMES = [f"class {i}" for i in range(256)]


class Options(NamedTuple):
    """How to refine. `given` is what the files hold that the CRF starts from: "probs" or "labels".

    Photographs above `max_pixels` are cut into pieces, those above `refused_pixels` refused.
    """

    crf: Settings
    given: str
    unknown: int = 255
    confidence: float = 0.7
    iterations_strip: bool = False
    max_pixels: int = 4_000_000
    refused_pixels: int = files.MAX_PIXELS
    colors: np.ndarray | None = None  # of the classes, where labels show them


def refine_folder(images: Path, given: Path, out: Path, options: Options) -> int:
    """Refines every photograph below `images`; a bad one is reported on stderr and the rest go on.

    Returns:
      The number of those that failed.
    """
    if not given.is_dir():
        raise UserError(f"{given}: --image is a folder, so this must be the folder with a file for each photograph")
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: --image is a folder, so this must be a folder")
    inputs = [item for item in listing.find_inputs([images], exclude=out) if not item.is_video]
    by_name = _labels_of(images, given) if options.given == "labels" else {}
    written = [path for stem in listing.result_stems(inputs) for path in outputs(out / stem, options)]
    read = [*(item.path for item in inputs), *by_name.values()]
    for item in inputs:
        with contextlib.suppress(UserError):  # reported in its turn
            read.append(find_partner(item, given, options.given))
    listing.check_outputs(written, read)
    failed = 0
    for number, (item, stem) in enumerate(zip(inputs, listing.result_stems(inputs)), 1):
        print(f"[{number}/{len(inputs)}] ", end="", flush=True)
        try:
            partner = by_name.get(item.path.resolve()) or find_partner(item, given, options.given)
            refine_file(item.path, partner, out / stem, options)
        except UserError as e:
            failed += 1
            print(f"{item.path}: failed", flush=True)
            print(f"error: {e}", file=sys.stderr, flush=True)
    if failed:
        print(f"error: {failed} of {len(inputs)} photographs failed", file=sys.stderr)
    return failed


def outputs(out: Path, options: Options) -> list[str]:
    """Every file that refining one photograph to `out` writes."""
    return [f"{out}.png", f"{out}_overlay.png", *[f"{out}_iterations.png"] * options.iterations_strip]


def _labels_of(images: Path, labels: Path) -> dict[Path, Path]:
    """The label map of each photograph, by the rule of data sets (see `imaging.pairing`)."""
    try:
        pairs, _ = pairing.pair_folders(images, labels, pairing.Affixes())
    except UserError:  # two photographs of one name: theirs keep their endings, and `find_partner` looks for those
        return {}
    return {image.resolve(): label for _, image, label in pairs if label is not None}


def find_partner(item: listing.Input, folder: Path, given: str) -> Path:
    """Returns the file in `folder` that belongs to a photograph: `a_probs.npy` or `a.npy`, or `a.png` for labels.

    Raises:
      UserError: there is none.
    """
    endings = {"probs": ("_probs.npy", ".npy"), "labels": (".png",)}[given]
    names = [item.stem(level) + ending for level in (1, 0) for ending in endings]
    for name in names:
        if (folder / name).is_file() and (folder / name).resolve() != item.path.resolve():
            return folder / name
    raise UserError(f"{item.path}: {folder} has no {names[-1]} for it")


def refine_file(image_path: Path, given: Path, out: Path, options: Options) -> None:
    """Refines one photograph and writes `out` + .png, _overlay.png and, if asked for, _iterations.png.

    Raises:
      UserError: a file cannot be read or written, or the two do not belong together.
    """
    start = time.monotonic()
    for path in (image_path, given):
        listing.check_file(path)
    listing.check_outputs(outputs(out, options), (image_path, given))
    image = files.read_photograph(image_path, max_pixels=options.refused_pixels)
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
    count = len(pieces.pieces(size, options.max_pixels, pieces.margin_of(options.crf.params)))
    if count > 1:
        print(f"{image_path}: {size[0] * size[1] / 1e6:.1f} megapixels, above --crf_max_pixels: in {count} overlapping "
              "pieces", flush=True)  # fmt: skip
    settings = options.crf._asdict() | {"max_pixels": options.max_pixels}
    names = _NAMES
    if options.iterations_strip:
        labels, frames = pieces.refine_frames(rough, image, **settings)
        picture = strip.iterations_strip(frames, rough.palette, rough.ids, names)
        files.write_png(f"{out}_iterations.png", picture)
    else:
        labels = pieces.refine(rough, image, **settings)
    files.write_png(f"{out}_overlay.png", overlay.overlay(image, labels, rough.palette, names))
    files.write_palette_png(f"{out}.png", labels, rough.palette)
    print(f"{out}.png  ({time.monotonic() - start:.1f} s)", flush=True)
