"""From a run's config and variables to the `Segmenter` that evaluates, predicts, searches and serves."""

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax import crf
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.mirror import checked_swaps
from deeplab_jax.inference.finite import require_finite_variables
from deeplab_jax.inference.options import check
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.models import create_model


def create_segmenter(
    config: ConfigDict, variables: dict, class_names: Sequence[str], palette: np.ndarray, **options
) -> Segmenter:
    """Builds the segmenter of a run.

    The CRF's parameters are the learned ones in the variables if `config.crf.train` is end_to_end, else those of
    `config.crf`.

    Args:
      config: the run's config; `model`, `crf`, `eval` and `data.mirror_swaps` are read.
      variables: Flax variables, host arrays.
      class_names: C names.
      palette: [256, 3] RGB.
      **options: further arguments of `Segmenter`, overriding those of `config.eval`.

    Raises:
      UserError: a variable is not finite, an option is not a `Segmenter`'s or cannot be used, `config.model` describes
        no network, `config.crf` names no known parameters or filter, or mirrored images are averaged and
        `config.data.mirror_swaps` is wrong (see `imaging.mirror.checked_swaps`).
    """
    check(options, len(class_names))
    require_finite_variables(variables)
    try:
        setting = crf.setting_from_config(config.crf)
    except (ValueError, OSError) as e:
        raise UserError(f"config.crf: {e}") from e
    compatibility = None
    learned = variables["params"].get("crf")
    if learned:
        params, compatibility = jax.tree.map(np.asarray, crf.learned(learned, setting.params))
        setting = replace(setting, params=params)
    network = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "crf"}}
    try:
        model = create_model(config.model, len(class_names))
    except ValueError as e:
        raise UserError(f"config.model: {e}") from e
    swaps: tuple[tuple[int, int], ...] = ()  # without mirroring they do not count, so wrong ones do no harm
    if options.get("mirror", config.eval.mirror) and "data" in config and "mirror_swaps" in config.data:
        swaps = checked_swaps(config.data.mirror_swaps, len(class_names))
    defaults = {
        "compatibility": compatibility,
        "scales": config.eval.scales,
        "mirror": config.eval.mirror,
        "mirror_swaps": swaps,
        "tile": config.eval.tile,
        "batch_size": config.eval.batch_size,
        "size_multiple": config.eval.size_multiple,
        "size_extra": model.architecture.size_extra,
        "resize": model.architecture.resize,
    }
    return Segmenter(
        model,
        network,
        setting,
        class_names,
        np.asarray(palette, np.uint8),
        **(defaults | options),
    )
