"""From any supported file to a converted one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from deeplab_jax.errors import UserError
from deeplab_jax.weights import contents, files, transfer
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

    The number of classes is the file's own: a mismatch with a data set is detected where the weights are used.

    Args:
      source: the result of `weights.read`.
      model_config: `config.model`.
      out: the file to write.
      seed: of the random subset if fc6 and fc7 are slimmed.
      overrides: settings to record instead of those implied by the kind of file; None values are ignored.

    Returns:
      The report.

    Raises:
      UserError: the trunk is incomplete, the file's classifier has no place in the network, a setting that the weights
        need is neither in the file nor given, or the file cannot be written.
    """
    needed = settings_of(model_config)
    given = {k: v for k, v in (overrides or {}).items() if v is not None}
    source.settings = {k: v for k, v in {**source.settings, **given}.items() if k in needed}
    source.open = tuple(k for k in source.open if k not in given and k in needed)
    if source.open:
        raise UserError(f"{source.path}: is {source.kind}; {'; '.join(contents.questions(source))}")
    targets = network_shapes(model_config, contents.classes_of(source) or 21)
    found, report = transfer.transfer(source, targets, seed)
    _check_head(source, model_config, report)
    report.notes += _doubts(source)
    metadata = {
        **source.settings,
        "backbone": model_config.backbone,
        "head": model_config.head,
        "source": Path(source.path).name,
        "kind": source.kind,
    }
    files.write(out, {transfer.full_name(path): value for path, value in found.items()}, metadata)
    return report


def _check_head(source: Source, model_config: Any, report: transfer.Report) -> None:
    """A trained classifier is not dropped silently: the network uses all of it, or this raises an error."""
    rest = [k for k, why in report.left_out.items() if why == transfer.NO_SUCH_LAYER and not k.startswith("crf/")]
    head = contents.head_of(source)
    if head is None:
        rest = [k for k in rest if k.split("/")[0] not in ("fc6", "fc7")]  # an ImageNet network's
    else:
        classifier = [k for k in report.missing if k.startswith(("head/fc1", "head/fc8"))]
        rest += [f"{k}: {report.missing[k]}" for k in classifier]
    if not rest:
        return
    shown = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
    has = f"its head is {head[0]} ({head[1]}), and the config's is {model_config.head}" if head else "it has no head"
    raise UserError(
        f"{source.path}: {len(rest)} arrays of the file and the network do not match ({shown}): {has}; choose "
        "the config with that head, or leave layers of the file out, as with --leave_out='^(fc1|fc8)'"
    )


def _doubts(source: Source) -> list[str]:
    """A warning if the statistics after the first convolution are larger than its preprocessing allows.

    An image divided by 255, normalized by mean and deviation, spans 1 / deviation per channel; the result of a
    convolution spans at most the sum of that over its weights, and no variance exceeds a quarter of the squared span.
    """
    if source.settings.get("preprocessing") != "torch_rgb":
        return []
    by_end = {"/".join(name.split("/")[-2:]): array for name, array in source.arrays.items()}
    kernel, var = by_end.get("conv1/kernel"), by_end.get("bn_conv1/var")
    if kernel is None or var is None or kernel.shape[2:] != (3, len(var)):
        return []
    from deeplab_jax.models.deeplab import TORCH_STD_RGB

    span = np.einsum("hwio,i->o", np.abs(kernel), 1 / np.asarray(TORCH_STD_RGB))
    if np.all(var <= span**2 / 4):
        return []
    return [
        "warning: the first batch norm's stored variance is larger than images divided by 255 can give; if the network "
        "was trained on BGR minus the mean, convert again with --preprocessing=caffe_bgr --stride_on=1x1"
    ]


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
    return flatten_dict(shapes)
