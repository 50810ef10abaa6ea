"""Checks an exported artifact's manifest.json when it is read."""

from pathlib import Path

from deeplab_jax.crf.params import MAX_ITERATIONS
from deeplab_jax.runs.record import is_count

FORMAT = "deeplab_jax artifact 1"
MANIFEST, WEIGHTS = "manifest.json", "weights.npz"
_LONGEST = 1 << 14  # pixels, a program's side


def checked(value: object) -> dict:
    """The manifest as it was written.

    Args:
      value: any JSON value.

    Raises:
      ValueError: it is not a manifest; states briefly what is wrong with it.
    """
    if not isinstance(value, dict) or not isinstance(value.get("format"), str):
        raise ValueError("is not the manifest of an artifact")
    if value["format"] != FORMAT:
        raise ValueError(f"is of format '{value['format'][:60]}', this version reads '{FORMAT}'")
    names = value.get("labels")
    if not isinstance(names, list) or not 2 <= len(names) <= 256 or not all(isinstance(n, str) for n in names):
        raise ValueError("has no list of 2 to 256 class names in 'labels'")
    palette = value.get("palette")
    if not isinstance(palette, list) or len(palette) != 256 or not all(map(_is_color, palette)):
        raise ValueError("has no 256 colors in 'palette'")
    crf = value.get("crf")
    if not isinstance(crf, dict) or not is_count(crf.get("iterations")) or crf["iterations"] > MAX_ITERATIONS:
        raise ValueError(f"has no iterations from 0 to {MAX_ITERATIONS} in 'crf'")
    if not _is_name(value.get("weights")):
        raise ValueError("names no file of this folder in 'weights'")
    programs = value.get("programs")
    if not isinstance(programs, list) or not programs or not all(map(_is_program, programs)):
        raise ValueError(f"has no list of programs with a file and a size from 1 to {_LONGEST} in 'programs'")
    if len({tuple(p["size"]) for p in programs}) < len(programs):
        raise ValueError("has two programs of one size")
    digests = value.get("sha256")
    if not isinstance(digests, dict) or not all(isinstance(d, str) for d in digests.values()):
        raise ValueError("has no digests in 'sha256'")
    return value


def _is_color(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(is_count(v) and v < 256 for v in value)


def _is_name(value: object) -> bool:
    """Whether it names a file in the folder, not elsewhere."""
    if not isinstance(value, str) or not 0 < len(value) < 256 or "\0" in value:
        return False
    return Path(value).name == value


def _is_program(value: object) -> bool:
    if not isinstance(value, dict) or not _is_name(value.get("file")):
        return False
    size = value.get("size")
    return isinstance(size, list) and len(size) == 2 and all(is_count(n) and 1 <= n <= _LONGEST for n in size)
