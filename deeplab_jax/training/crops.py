"""Crops that a network can be trained on: every score map's positions must be positions of the labels."""

from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from deeplab_jax.data.pipeline import check_augmentation, stages
from deeplab_jax.errors import UserError
from deeplab_jax.models import architecture_of
from deeplab_jax.models.deeplab import output_size
from deeplab_jax.models.multiscale import is_own_size, scaled_size
from deeplab_jax.training.losses import STRIDES

_LARGE = 32 * 64  # a side at which a map's stride is unambiguous


def check_crop(config: ConfigDict) -> None:
    """Refuses a crop whose labels cannot be sampled at the positions of every score map.

    Raises:
      UserError: names the crop, the map and the nearest suitable crops.
    """
    check_augmentation(config)
    if config.loss.at == "pixels":  # scores are resized to the labels' size
        return
    try:
        architecture = architecture_of(config.model)
    except ValueError as e:
        raise UserError(f"config.model: {e}") from e
    crf = config.crf
    if crf.train == "end_to_end" and crf.train_iterations and crf.stride not in STRIDES:
        raise UserError(f"config.crf.stride={crf.stride}: must be one of {', '.join(map(str, STRIDES))}")
    if architecture.resize == "half_pixel":  # each position's nearest label, at any size
        return
    extra = architecture.size_extra
    large = _LARGE + extra
    strides: dict[str, int] = {}
    for name, length in map_lengths(config.model, large):
        stride = stride_of(large, length)
        if stride is None:
            raise UserError(
                f"config.model.scales={tuple(config.model.scales)}: the positions of '{name}' are not positions of the "
                "labels; let the scales begin with 1, or set config.loss.at=pixels"
            )
        strides[name] = stride

    def misfit(n: int) -> tuple[str, int] | None:
        lengths = map_lengths(config.model, n)
        return next(((name, m) for name, m in lengths if (n - 1) // strides[name] + 1 != m), None)

    multiple = config.model.output_stride
    for stage in stages(config):
        crop = stage.crop
        for n in crop:
            found = misfit(n)
            if found is None:
                continue
            below, above = ([_nearest(side, step, multiple, extra, misfit) for side in crop] for step in (-1, 1))
            crops = [f"{h},{w}" for h, w in (below, above) if h and w]
            expected = (n - 1) // strides[found[0]] + 1
            raise UserError(
                f"{stage.named('crop')}={crop[0]},{crop[1]}: at {n} pixels '{found[0]}' has {found[1]} positions, "
                f"where the labels have {expected}; the nearest suitable crops are {' and '.join(crops)} "
                f"(sides of {multiple}k+{extra}), or set config.loss.at=pixels"
            )


def map_lengths(model_config: Any, n: int) -> Iterator[tuple[str, int]]:
    """(name, positions) along a side of n pixels, of each score map with a loss (see `losses.named_score_maps`).

    A CRF's map is left out: it has the positions of the image sampled at its stride, like the labels.
    """
    architecture = architecture_of(model_config)
    scales = architecture.scales
    own = []
    for scale in scales:
        side = scaled_size((n,), scale, architecture.size_extra)[0]
        own.append(output_size(model_config, (side, side))[0])
    yield ("fused" if len(scales) > 1 else "scores"), own[0]
    if len(scales) > 1:
        for i, scale in enumerate(scales):
            yield f"scale_{i}", own[i] if is_own_size(scales[0], scale) else own[0]


def stride_of(n: int, length: int) -> int | None:
    """The stride that takes n labels to `length` of them, or None."""
    return next((s for s in STRIDES if (n - 1) // s + 1 == length), None)


def _nearest(n: int, step: int, multiple: int, extra: int, misfit) -> int:
    """The nearest multiple * k + extra from n on (downwards for a step of -1) that fits; 0 if none does."""
    side = n
    while 0 < side < n + 2 * _LARGE:
        if (side - extra) % multiple == 0 and side > extra and misfit(side) is None:
            return side
        side += step
    return 0
