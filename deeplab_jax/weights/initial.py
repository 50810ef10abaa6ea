"""Starting a network from converted weights or from another run's checkpoint."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deeplab_jax.errors import UserError
from deeplab_jax.files import read_file
from deeplab_jax.models import BACKBONES
from deeplab_jax.weights import box, files, transfer
from deeplab_jax.weights.source import Source

_EARLIER = {"resize": "corners"}  # for runs from before the field existed


def recorded_settings(path: str | os.PathLike) -> dict[str, str]:
    """The `config.model` fields that go with weights: `preprocessing`, `resize`, and for ResNets `stride_on`.

    Set them before the network is built: weights trained on BGR minus mean are wrong on RGB.

    Args:
      path: the value of `config.init_from`: a converted `.safetensors`, a workdir, or a shipped model.

    Raises:
      UserError: there is no such file, or it was not written by `convert_weights`.
    """
    path = located(path)
    if path.is_dir():
        return _workdir_settings(path)
    _check_converted(path)
    metadata = files.read_metadata(path)
    return {name: metadata[name] for name in files.SETTINGS if name in metadata}


def load_initial(
    path: str | os.PathLike, model_config: Any, variables: Mapping, seed: int = 0
) -> tuple[dict, transfer.Report]:
    """Replaces a freshly initialized network's values with those of a file, where the file has them.

    A classifier with another number of classes keeps its random values, which is reported; so does a head that the
    file lacks.

    Args:
      path: a converted `.safetensors`, a workdir (its averaged weights, if it has them), or a shipped model's name.
      model_config: `config.model`, checked against the recorded settings.
      variables: {"params": ..., "batch_stats": ...} of the network.
      seed: of the random subset, if fc6 must be slimmed.

    Returns:
      (the variables, the report; log `str(report)`).

    Raises:
      UserError: the trunk is incomplete, the settings contradict the config, or the file is damaged.
    """
    path = located(path)
    settings = recorded_settings(path)
    for name, value in settings.items():
        if _field(model_config, name) != value:
            raise UserError(
                f"{path}: these weights need config.model.{name}={value}, but the config has "
                f"{_field(model_config, name)}; set it, or convert the weights for this config"
            )
    source = read_workdir(path)[0] if path.is_dir() else files.read(path)
    targets = flatten_dict(variables)
    found, report = transfer.transfer(source, targets, seed)
    return unflatten_dict({k: found.get(k, v) for k, v in targets.items()}), report


def located(path: str | os.PathLike) -> Path:
    """The file or workdir that `config.init_from` names: a path, or a shipped model's weights given by name."""
    folder = box.folder_of(path)
    return Path(path) if folder is None else folder / box.WEIGHTS


def read_workdir(workdir: Path, leave_out: str = "") -> tuple[Source, Any]:
    """A run's network as a source, and the run's config; for `leave_out` see `Source`.

    Raises:
      UserError: it has no finished checkpoint, or `leave_out` is not a regular expression.
    """
    files.check_expression(leave_out)
    # imported late: only workdirs need it
    from deeplab_jax.runs.checkpoints import load_workdir

    config, variables, _ = load_workdir(workdir)
    source = Source(str(workdir), "a workdir", ours=True, settings=settings_of(config.model), leave_out=leave_out)
    for variable, value in flatten_dict(variables).items():
        layer, _, leaf = transfer.full_name(variable).rpartition("/")
        source.add(layer, leaf, np.asarray(value))
    return source, config


def settings_of(model_config: Any) -> dict[str, str]:
    """The fields of `config.model` that weights of that network need."""
    strided = BACKBONES[model_config.backbone].stride_on
    return {k: _field(model_config, k) for k in files.SETTINGS if k != "stride_on" or strided}


def _field(model_config: Any, name: str) -> str:
    return getattr(model_config, name, _EARLIER[name]) if name in _EARLIER else getattr(model_config, name)


def _workdir_settings(workdir: Path) -> dict[str, str]:
    config = workdir / "config.json"
    try:
        model = json.loads(read_file(config))["model"]
        return settings_of(_Fields(model))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{config}: cannot be read; {workdir} is not the workdir of a run ({type(e).__name__})") from e


class _Fields:
    """Attribute access to a dict."""

    def __init__(self, values: Mapping[str, Any]):
        self.__dict__.update(values)


def _check_converted(path: Path) -> None:
    if not path.exists():
        raise UserError(
            f"{path}: no such file{box.suggestion(path.name)}; config.init_from accepts a converted "
            f".safetensors, a workdir, or the name of a shipped model ({box.listed()})"
        )
    if path.suffix != ".safetensors":
        command = f"python -m deeplab_jax.convert_weights {path} --config FILE --out NAME.safetensors"
        raise UserError(f"{path}: must be converted first: {command}")
