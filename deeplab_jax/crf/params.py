"""The CRF's parameters, the published presets, and preset files."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.files import read_json, replace_together

NORMALIZATIONS = ("none", "before", "after", "symmetric")
FIELDS = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")

# Lowest and highest value of each number, as float32 holds it: in flags, presets, configs and calls alike.
WIDTHS = (0.01, 1e6)  # pixels, or units of a 0..255 image
WEIGHTS = (-1e6, 1e6)
MAX_ITERATIONS = 10_000

Value = float | jax.Array | np.ndarray | tuple[float, ...]


@flax.struct.dataclass
class CRFParams:
    """Weights and widths of the two kernels (Chen et al. 2015, Eq. 3; Kraehenbuhl and Koltun 2011, Eq. 3). A pytree.

    A weight is a number, one number per class `[C]`, or a matrix `[C, C]` by which label l' attracts label l. A
    position width is a number or a pair (x, y); the colour width a number or three (R, G, B).

    Attributes:
      bilateral_weight: w1, the appearance kernel's weight.
      bilateral_xy_std: sigma_alpha, pixels.
      bilateral_rgb_std: sigma_beta, in units of a 0..255 image.
      gaussian_weight: w2, the smoothness kernel's weight.
      gaussian_xy_std: sigma_gamma, pixels.
    """

    bilateral_weight: Value = 4.0
    bilateral_xy_std: Value = 67.0
    bilateral_rgb_std: Value = 3.0
    gaussian_weight: Value = 3.0
    gaussian_xy_std: Value = 1.0

    def at_stride(self, stride: float) -> "CRFParams":
        """The same kernels on an image sampled by `stride`: position widths divided by it, all else unchanged."""
        scale = lambda std: tuple(s / stride for s in std) if isinstance(std, tuple | list) else std / stride  # noqa: E731
        xy_stds = {name: scale(getattr(self, name)) for name in ("bilateral_xy_std", "gaussian_xy_std")}
        return dataclasses.replace(self, **xy_stds)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A published (or searched) setting: parameters are only meaningful with iterations and normalization.

    Attributes:
      params: the kernels.
      iterations: mean-field iterations they were chosen for.
      normalization: "none", "before", "after" or "symmetric".
      source: where the numbers come from.
    """

    params: CRFParams
    iterations: int = 10
    normalization: str = "after"
    source: str = ""


_V1 = "Chen et al., ICLR 2015; released run scripts"
_V2 = "Chen et al., TPAMI 2018; released run scripts"
_SECOND_HAND = ", read second-hand"

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "deeplab_v1": Preset(CRFParams(5.0, 50.0, 10.0, 3.0, 3.0), source=_V1),
        "v1_msc": Preset(CRFParams(3.0, 95.0, 3.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_largefov": Preset(CRFParams(4.0, 121.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_msc_largefov": Preset(CRFParams(4.0, 83.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_coco_largefov": Preset(CRFParams(5.0, 69.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_msc_coco_largefov": Preset(CRFParams(4.0, 59.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v2_vgg16": Preset(CRFParams(4.0, 65.0, 3.0, 2.0, 2.0), source=_V2),
        "v2_resnet101": Preset(CRFParams(4.0, 67.0, 3.0, 3.0, 1.0), source=_V2),
        "deeplab_pytorch": Preset(
            CRFParams(4.0, 67.0, 3.0, 3.0, 1.0),
            normalization="symmetric",
            source="kazuto1011/deeplab-pytorch, configs/voc12.yaml, through pydensecrf on the untouched photograph",
        ),
        "crfasrnn": Preset(
            CRFParams(5.0, 160.0, 3.0, 3.0, 3.0), source="Zheng et al., ICCV 2015 (5 iterations in training)"
        ),
    }
)


class Settings(NamedTuple):
    """What a run of the CRF needs besides its input."""

    params: CRFParams
    iterations: int
    normalization: str
    bilateral: str


def write_preset(path: str | os.PathLike, preset: Preset) -> None:
    """Writes a preset as JSON, atomically: the five parameters, `iterations`, `normalization`, `source`."""
    path = Path(path)
    fields = {name: np.asarray(getattr(preset.params, name), np.float64).tolist() for name in FIELDS}
    fields |= {"iterations": preset.iterations, "normalization": preset.normalization, "source": preset.source}
    text = json.dumps(fields, indent=2) + "\n"
    replace_together({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def read_preset(path: str | os.PathLike) -> Preset:
    """Reads what `write_preset` wrote; `iterations`, `normalization` and `source` may be missing.

    Raises:
      ValueError: the file is missing, is not JSON, or has a missing, unknown or unusable field (named).
    """
    try:
        fields = read_json(path)
    except FileNotFoundError as e:
        raise ValueError(f"{path}: cannot be read as a CRF preset (no such file)") from e
    except ValueError as e:
        raise ValueError(f"{path}: cannot be read as a CRF preset (it {e})") from e
    known = {*FIELDS, "iterations", "normalization", "source"}
    if not isinstance(fields, dict) or not set(FIELDS) <= set(fields) <= known:
        raise ValueError(f"{path}: a CRF preset has the fields {', '.join(FIELDS)} and may have {_optional(known)}")
    values = {name: _numbers(fields[name], f"{path}: {name}") for name in FIELDS}
    preset = Preset(
        CRFParams(**values),
        fields.get("iterations", 10),
        fields.get("normalization", "after"),
        fields.get("source", ""),
    )
    check_iterations(preset.iterations, where=f"{path}: ")
    if preset.normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{path}: normalization={str(preset.normalization)[:60]!r} must be one of {', '.join(NORMALIZATIONS)}"
        )
    if not isinstance(preset.source, str):
        raise ValueError(f"{path}: source must be text")
    check_params(preset.params, where=f"{path}: ")
    return preset


def _numbers(value: object, where: str) -> float | np.ndarray:
    """A number, or lists of numbers of equal lengths, as float64; texts and true or false are none."""

    def plain(item: object) -> bool:
        if isinstance(item, list):
            return all(map(plain, item))
        return isinstance(item, int | float) and not isinstance(item, bool)

    try:
        if not plain(value):
            raise TypeError
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError, OverflowError, RecursionError) as e:
        raise ValueError(f"{where}={str(value)[:60]} is not a number") from e
    return float(array) if array.ndim == 0 else array


def preset_named(name: str) -> Preset:
    """A preset by its name in `PRESETS` or by the path of a preset file (`.json`); raises ValueError otherwise."""
    if name in PRESETS:
        return PRESETS[name]
    if str(name).endswith(".json"):
        return read_preset(name)
    raise ValueError(f"preset={name!r} is neither a .json file nor one of {', '.join(PRESETS)}")


def params_from_config(config: Any) -> tuple[CRFParams, str]:
    """The parameters and the normalization that `config.crf` asks for.

    Args:
      config: anything with the attributes `preset`, `normalization` and the five fields of `CRFParams`. `preset` is a
        name in `PRESETS`, a preset file, or "" for the five fields. A preset file, and a preset found with another
        normalization than "after", bring their own, which belongs to their numbers; otherwise `normalization` holds.

    Raises:
      ValueError: an unknown preset, an unreadable preset file, or a value that cannot be used.
    """
    if config.normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={config.normalization!r} must be one of {', '.join(NORMALIZATIONS)}")
    if config.preset:
        preset = preset_named(config.preset)
        own = config.preset not in PRESETS or preset.normalization != "after"
        return preset.params, preset.normalization if own else config.normalization
    params = CRFParams(**{name: getattr(config, name) for name in FIELDS})
    check_params(params)
    return params, config.normalization


def check_params(params: CRFParams, where: str = "") -> None:
    """Checks the numbers as float32, in which they are used: widths within `WIDTHS`, weights within `WEIGHTS`.

    Traced values pass. `where` begins the message.

    Raises:
      ValueError: one lies outside its range, or is not a number.
    """
    for name in FIELDS:
        value = getattr(params, name)
        if is_traced(value):
            continue
        try:
            array = np.asarray(jax.device_get(value), np.float64)
        except (TypeError, ValueError, OverflowError) as e:
            raise ValueError(f"{where}{name}={str(value)[:60]} is not a number") from e
        low, high = WIDTHS if name.endswith("std") else WEIGHTS
        with np.errstate(over="ignore"):
            used = array.astype(np.float32)
        if not np.isfinite(used).all():
            raise ValueError(f"{where}{name}={str(value)[:60]} must be finite, and lie between {low:g} and {high:g}")
        if name.endswith("std") and not (used > 0).all():
            raise ValueError(f"{where}{name}={str(value)[:60]} must be greater than 0, from {low:g} to {high:g}")
        if not ((used >= np.float32(low)) & (used <= np.float32(high))).all():
            raise ValueError(f"{where}{name}={str(value)[:60]} must lie between {low:g} and {high:g}")
        sizes = {"bilateral_xy_std": 2, "gaussian_xy_std": 2, "bilateral_rgb_std": 3}
        if name in sizes and array.shape not in ((), (sizes[name],)):
            raise ValueError(f"{where}{name} has shape {array.shape}; give one number or {sizes[name]}")


def check_iterations(iterations: object, where: str = "") -> None:
    """Raises ValueError for anything but a whole number from 0 to `MAX_ITERATIONS`; `where` begins the message."""
    if isinstance(iterations, bool) or not isinstance(iterations, int | np.integer):
        raise ValueError(
            f"{where}iterations={str(iterations)[:60]} must be a whole number, fixed when the function is compiled"
        )
    if not 0 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"{where}iterations={str(iterations)[:60]} must be at least 0 and at most {MAX_ITERATIONS}")


def is_traced(value: Any) -> bool:
    """True where `value` holds a JAX tracer, whose numbers cannot be looked at."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def components(std: Value, count: int, dtype: Any) -> jax.Array:
    """A width as `[count]`: one number repeated, or `count` numbers as they are."""
    if isinstance(std, tuple | list):
        std = jnp.stack([jnp.asarray(s, dtype) for s in std])
    return jnp.broadcast_to(jnp.asarray(std, dtype), (count,))


def _optional(known: set[str]) -> str:
    return ", ".join(sorted(known - set(FIELDS)))


def truncation_radius(std: Value, truncate: float, step: int = 2) -> tuple[int, int] | None:
    """Radii (x, y) in pixels beyond which a Gaussian is dropped, rounded up to `step`; None where `std` is traced."""
    if is_traced(std):
        return None
    stds = np.broadcast_to(np.asarray(jax.device_get(std), np.float64), (2,))
    x, y = (step * math.ceil(max(1.0, truncate * float(s)) / step) for s in stds)
    return x, y
