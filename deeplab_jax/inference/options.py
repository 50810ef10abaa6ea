"""Checks of what callers of `load` hand to a `Segmenter`; a mistake is one sentence, before anything is computed."""

import difflib
import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.mirror import checked_swaps
from deeplab_jax.inference import tiling
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.runs.schema import RANGES

# Keyword arguments of `Segmenter`.
_PARAMETERS = inspect.signature(Segmenter.__init__).parameters.values()
NAMES = tuple(p.name for p in _PARAMETERS if p.kind is inspect.Parameter.KEYWORD_ONLY)
_RESIZE = ("corners", "half_pixel")
_WHOLE = {"batch_size": 1, "size_multiple": 1, "size_extra": 0, "tile": 0}  # and the lowest value


def check(options: Mapping[str, Any], classes: int) -> None:
    """Checks keyword arguments of `Segmenter`, for a network of this many classes.

    Raises:
      UserError: names the option.
    """
    for name, value in options.items():
        if name not in NAMES:
            close = difflib.get_close_matches(name, NAMES, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(NAMES)}"
            raise UserError(f"{name}={_short(value)}: there is no such option; {hint}")
        if name in _WHOLE:
            check_whole(name, value, _WHOLE[name])
    multiple = options.get("size_multiple", tiling.STRIDE)
    if multiple % tiling.STRIDE:
        raise UserError(f"size_multiple={multiple}: must be a multiple of {tiling.STRIDE}")
    if not isinstance(options.get("mirror", False), bool | np.bool_):
        raise UserError(f"mirror={_short(options['mirror'])}: must be True or False")
    if options.get("resize", "corners") not in _RESIZE:
        raise UserError(f"resize={_short(options['resize'])}: must be one of {', '.join(_RESIZE)}")
    if "scales" in options:
        _check_scales(options["scales"])
    if "mirror_swaps" in options:
        checked_swaps(options["mirror_swaps"], classes, "mirror_swaps")
    devices = options.get("devices")
    if devices is not None and not (
        isinstance(devices, Sequence) and devices and all(isinstance(d, jax.Device) for d in devices)
    ):
        raise UserError(f"devices={_short(devices)}: must be a list of devices, as jax.local_devices() returns it")
    if options.get("compatibility") is not None:
        _check_compatibility(options["compatibility"], classes)


def check_whole(name: str, value: object, least: int) -> None:
    """Raises `UserError` unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise UserError(f"{name}={_short(value)}: must be a whole number, at least {least}")


def _check_scales(scales: object) -> None:
    low, high = RANGES["eval.scales"]
    numbers = list(scales) if isinstance(scales, Sequence | np.ndarray) and not isinstance(scales, str) else []
    usable = [isinstance(s, int | float | np.number) and math.isfinite(s) and low <= s <= high for s in numbers]
    if not numbers or not all(usable):
        raise UserError(f"scales={_short(scales)}: must be one or more numbers from {low:g} to {high:g}, as in (1.0,)")


def _check_compatibility(value: object, classes: int) -> None:
    try:
        matrix = np.asarray(value, np.float64)
    except (TypeError, ValueError) as e:
        raise UserError("compatibility: must consist of numbers") from e
    if matrix.shape != (classes, classes) or not np.isfinite(matrix).all():
        raise UserError(f"compatibility: must be ({classes}, {classes}) finite numbers, and has shape {matrix.shape}")


def _short(value: object) -> str:
    return " ".join(str(value).split())[:60]
