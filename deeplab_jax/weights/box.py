"""The models that the package ships: each a folder of `deeplab_jax/box`, read without a download.

model.safetensors   the weights under this package's names, kernels in half precision; its metadata has classes, colors
config.json         the config of the run that trained them
crf_preset.json     the CRF that goes with them
card.md             the weights' origin, accuracy and permitted uses
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deeplab_jax.config import nearest
from deeplab_jax.crf.setting import Setting, read_preset, write_preset
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically, write_text
from deeplab_jax.weights import files, transfer

BOX = Path(__file__).parents[1] / "box"
WEIGHTS, CONFIG, PRESET, CARD = "model.safetensors", "config.json", "crf_preset.json", "card.md"
MOST_BYTES = 5_000_000  # of the weights, which are in every wheel and every clone


class Boxed(NamedTuple):
    """A shipped model.

    Attributes:
      config: the config of its run, nested dicts and lists.
      variables: Flax variables, float32.
      class_names: C names.
      palette: uint8 [256, 3].
      preset: its CRF.
      digest: identifies these weights.
    """

    config: dict
    variables: dict
    class_names: tuple[str, ...]
    palette: np.ndarray
    preset: Setting
    digest: str


def names() -> list[str]:
    """The names of the shipped models, sorted."""
    return sorted(path.parent.name for path in BOX.glob(f"*/{WEIGHTS}"))


def folder_of(name: str | os.PathLike) -> Path | None:
    """The folder of a shipped model, given by its name or as that folder; None for anything else.

    A folder of that name takes precedence if it holds a run or an artifact.
    """
    text = os.fspath(name)
    if Path(text).parent == BOX and Path(text).name in names():
        return Path(text)
    if text not in names():
        return None
    run_or_artifact = any((Path(text) / file).is_file() for file in (CONFIG, "manifest.json"))
    return None if run_or_artifact or Path(text).is_file() else BOX / text


def require(name: str) -> Path:
    """The folder of the shipped model of this name.

    Raises:
      UserError: there is none; the closest name is suggested.
    """
    if name not in names():
        raise UserError(f"--model={name}: no model of this name; {listed()}{suggestion(name)}")
    return BOX / name


def suggestion(name: str) -> str:
    """The end of a sentence about an unknown name: the closest shipped one, or nothing."""
    return nearest(name, names())


def listed() -> str:
    """The shipped models, as a clause."""
    known = names()
    return f"the package ships {', '.join(known)}" if known else "this installation ships no model"


def table() -> str:
    """One line for each shipped model: its name and the first line of its card."""
    lines = [f"{name}  {_title(BOX / name / CARD)}".rstrip() for name in names()]
    return "\n".join(lines) or f"{listed()}; train one with deeplab_jax.main"


def read(folder: str | os.PathLike) -> Boxed:
    """Reads a shipped model.

    Raises:
      UserError: one of its files is missing or damaged.
    """
    folder = Path(folder)
    source = files.read_safetensors(folder / WEIGHTS)
    try:
        config = json.loads((folder / CONFIG).read_text())
        preset = read_preset(folder / PRESET)
        class_names = tuple(map(str, json.loads(source.metadata["class_names"])))
        palette = np.asarray(json.loads(source.metadata["palette"]), np.uint8).reshape(256, 3)
        digest = source.metadata["digest"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder}: is not a model of the package, or is damaged ({e}); install it again") from e
    variables = unflatten_dict({_path(name): array for name, array in source.arrays.items()})
    return Boxed(config, variables, class_names, palette, preset, digest)


def write(
    folder: str | os.PathLike,
    config: Mapping[str, Any],
    variables: Mapping[str, Any],
    class_names: tuple[str, ...],
    palette: np.ndarray,
    preset: Setting,
    settings: Mapping[str, str],
    digest: str,
) -> int:
    """Writes a shipped model except for its card, with kernels rounded to half precision.

    Args:
      config: nested dicts and lists; it should name no folder of the machine that trained it.
      variables: Flax variables.
      settings: the result of `initial.settings_of` for `config`'s network.
      digest: see `Boxed`.

    Returns:
      The size of the weights' file in bytes.

    Raises:
      UserError: it cannot be written, or is larger than `MOST_BYTES`.
    """
    folder = Path(folder)
    arrays = {transfer.full_name(path): np.asarray(value) for path, value in flatten_dict(variables).items()}
    metadata = {
        **settings,
        "class_names": json.dumps(list(class_names)),
        "palette": json.dumps(np.asarray(palette).tolist()),
        "digest": digest,
    }
    files.write(folder / WEIGHTS, arrays, metadata, half_kernels=True)
    size = (folder / WEIGHTS).stat().st_size
    if size > MOST_BYTES:
        raise UserError(f"{folder / WEIGHTS}: has {size / 1e6:.1f} MB, more than the {MOST_BYTES / 1e6:.0f} MB that a "
                        "shipped model may have; give a run of a smaller network")  # fmt: skip
    write_text(folder / CONFIG, json.dumps(config, indent=1) + "\n")
    write_atomically(folder / PRESET, lambda path: write_preset(path, preset))
    return size


def _title(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    except (OSError, ValueError, IndexError):
        return ""


def _path(name: str) -> transfer.Path:
    """The inverse of `transfer.full_name`."""
    parts = tuple(name.split("/"))
    return parts if parts[0] == "batch_stats" else ("params", *parts)
