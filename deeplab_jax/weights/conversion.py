"""From any supported file to a converted one."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deeplab_jax.errors import UserError
from deeplab_jax.weights import files, transfer
from deeplab_jax.weights.initial import settings_of
from deeplab_jax.weights.source import Source

_PROBE = (1, 129, 129, 3)  # an image for tracing shapes; nothing is computed


def convert(
    source: Source,
    model_config: Any,
    out: str | os.PathLike,
    seed: int = 0,
    overrides: Mapping[str, str | None] | None = None,
) -> transfer.Report:
    """Writes the layers of `source` that the configured network has.

    The number of classes is the file's own: what does not fit a data set is noticed where the weights are used.

    Args:
      source: what `weights.read` returned.
      model_config: `config.model`.
      out: the file to write.
      seed: of the random subset where fc6 and fc7 are slimmed.
      overrides: settings to record instead of those that follow from the kind of file; None values are ignored.

    Returns:
      The report.

    Raises:
      UserError: the trunk is incomplete, or the file cannot be written.
    """
    needed = settings_of(model_config)
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    source.settings = {k: v for k, v in {**source.settings, **given}.items() if k in needed}
    targets = network_shapes(model_config, classes_of(source) or 21)
    found, report = transfer.transfer(source, targets, seed)
    metadata = {
        **source.settings,
        "backbone": model_config.backbone,
        "head": model_config.head,
        "source": Path(source.path).name,
        "kind": source.kind,
    }
    files.write(out, {transfer.full_name(path): value for path, value in found.items()}, metadata)
    return report


def classes_of(source: Source) -> int | None:
    """Number of classes of the classifier in a file, None if it has none."""
    for name, array in source.arrays.items():
        if re.search(r"(^|/)(fc8|fc1)\w*/kernel$", name):
            return array.shape[-1]
    return None


def network_shapes(model_config: Any, num_classes: int) -> dict[transfer.Path, jax.ShapeDtypeStruct]:
    """Names and shapes of a network's variables, found by tracing; nothing is computed.

    Raises:
      UserError: the config describes no network.
    """
    from deeplab_jax.models import create_model

    try:
        model = create_model(model_config, num_classes)
        shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(_PROBE))
    except ValueError as e:
        raise UserError(str(e)) from e
    return transfer.flatten(shapes)
