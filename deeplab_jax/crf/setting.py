"""The CRF's setting, to which presets, config and flags are converted; the published settings, and preset files."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from deeplab_jax.crf.filters import check_name
from deeplab_jax.crf.params import FIELDS, NORMALIZATIONS, CRFParams, check_iterations, check_params
from deeplab_jax.files import read_json, replace_together


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that a run of the CRF needs besides its input; the parameters depend on the other three.

    >>> setting = PRESETS["v2_resnet101"]
    >>> setting.params.bilateral_xy_std, setting.options
    (67.0, {'iterations': 10, 'normalization': 'after', 'bilateral': 'auto'})

    Attributes:
      params: the kernels.
      iterations: of mean field, with which the parameters were chosen.
      normalization: "none", "before", "after" or "symmetric".
      source: where the numbers come from.
      bilateral: the appearance kernel's filter; None = no choice: the model's filter, else "auto".
    """

    params: CRFParams
    iterations: int = 10
    normalization: str = "after"
    source: str = ""
    bilateral: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments for `mean_field`: `mean_field(unary, image, setting.params, **setting.options)`."""
        return {
            "iterations": self.iterations,
            "normalization": self.normalization,
            "bilateral": self.bilateral or "auto",
        }


Preset = Setting  # the public name of a published or searched setting


_V1 = "Chen et al., ICLR 2015; released run scripts"
_V2 = "Chen et al., TPAMI 2018; released run scripts"
_SECOND_HAND = ", read second-hand"

PRESETS: Mapping[str, Setting] = MappingProxyType(
    {
        "deeplab_v1": Setting(CRFParams(5.0, 50.0, 10.0, 3.0, 3.0), source=_V1),
        "v1_msc": Setting(CRFParams(3.0, 95.0, 3.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_largefov": Setting(CRFParams(4.0, 121.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_msc_largefov": Setting(CRFParams(4.0, 83.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_coco_largefov": Setting(CRFParams(5.0, 69.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v1_msc_coco_largefov": Setting(CRFParams(4.0, 59.0, 5.0, 3.0, 3.0), source=_V1 + _SECOND_HAND),
        "v2_vgg16": Setting(CRFParams(4.0, 65.0, 3.0, 2.0, 2.0), source=_V2),
        "v2_resnet101": Setting(CRFParams(4.0, 67.0, 3.0, 3.0, 1.0), source=_V2),
        "deeplab_pytorch": Setting(
            CRFParams(4.0, 67.0, 3.0, 3.0, 1.0),
            normalization="symmetric",
            source="kazuto1011/deeplab-pytorch, configs/voc12.yaml, through pydensecrf on the unmodified photograph",
        ),
        "crfasrnn": Setting(
            CRFParams(5.0, 160.0, 3.0, 3.0, 3.0), source="Zheng et al., ICCV 2015 (5 iterations in training)"
        ),
    }
)


def write_preset(path: str | os.PathLike, setting: Setting) -> None:
    """Writes a setting as JSON, atomically: the parameters and the other fields, and the filter if one is chosen.

    Raises:
      ValueError: a field has a value that `read_preset` would refuse.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_preset(f"{folder}/mine.json", Setting(CRFParams(bilateral_xy_std=40.0), iterations=5))
    ...     found = read_preset(f"{folder}/mine.json")
    >>> found.params.bilateral_xy_std, found.iterations
    (40.0, 5)
    """
    path = Path(path)
    fields: dict[str, Any] = {name: np.asarray(getattr(setting.params, name), np.float64).tolist() for name in FIELDS}
    fields |= {"iterations": setting.iterations, "normalization": setting.normalization, "source": setting.source}
    if setting.bilateral:
        fields["bilateral"] = setting.bilateral
    _setting(fields, "")  # nothing is written that could not be read
    fields["iterations"] = int(setting.iterations)  # NumPy's too
    text = json.dumps(fields, indent=2) + "\n"
    replace_together({path: lambda temporary: temporary.write_text(text, encoding="utf-8")})


def read_preset(path: str | os.PathLike) -> Setting:
    """Reads a file of `write_preset`; everything except the five parameters may be missing.

    Raises:
      ValueError: the file is missing, is not JSON, or has a missing, unknown or unusable field (named).

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_preset(f"{folder}/v1.json", PRESETS["v1_largefov"])
    ...     read_preset(f"{folder}/v1.json").params.bilateral_xy_std
    121.0
    """
    try:
        fields = read_json(path)
    except FileNotFoundError as e:
        raise ValueError(f"{path}: cannot be read as a CRF preset (no such file)") from e
    except ValueError as e:
        raise ValueError(f"{path}: cannot be read as a CRF preset (it {e})") from e
    optional = {"iterations", "normalization", "source", "bilateral"}
    if not isinstance(fields, dict) or not set(FIELDS) <= set(fields) <= {*FIELDS, *optional}:
        raise ValueError(
            f"{path}: a CRF preset has the fields {', '.join(FIELDS)} and may have {', '.join(sorted(optional))}"
        )
    return _setting(fields, f"{path}: ")


def _setting(fields: dict[str, Any], where: str) -> Setting:
    """The setting of a file's fields, each of them checked."""
    others = {name: value for name, value in fields.items() if name not in FIELDS}
    setting = Setting(CRFParams(**{name: _numbers(fields[name], f"{where}{name}") for name in FIELDS}), **others)
    check_iterations(setting.iterations, where=where)
    if setting.normalization not in NORMALIZATIONS:
        raise ValueError(
            f"{where}normalization={str(setting.normalization)[:60]!r} must be one of {', '.join(NORMALIZATIONS)}"
        )
    for name in ("source", "bilateral"):
        if name in others and not isinstance(others[name], str):
            raise ValueError(f"{where}{name} must be text")
    if setting.bilateral is not None:
        try:
            check_name(setting.bilateral[:60])
        except ValueError as e:
            raise ValueError(f"{where}{e}") from e
    check_params(setting.params, where=where)
    return setting


def _numbers(value: object, where: str) -> float | np.ndarray:
    """A number, or lists of numbers of equal lengths, as float64; strings and booleans are rejected."""

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


def preset_named(name: str) -> Setting:
    """A setting by its name in `PRESETS` or by the path of a preset file (`.json`); raises ValueError otherwise.

    >>> preset_named("v1_largefov").params.bilateral_xy_std
    121.0
    """
    if name in PRESETS:
        return PRESETS[name]
    if str(name).endswith(".json"):
        return read_preset(name)
    raise ValueError(f"preset={name!r} is neither a .json file nor one of {', '.join(PRESETS)}")


def setting_from_config(config: Any) -> Setting:
    """The setting that `config.crf` describes.

    Args:
      config: anything with the attributes `preset`, `iterations`, `normalization`, `bilateral` and the five fields of
        `CRFParams`. `preset` is a name in `PRESETS`, a preset file, or "" for the five fields. A preset file, and a
        preset found with a normalization other than "after", override the normalization, which belongs to their
        numbers; a file may also override the filter. Everything else comes from the config.

    Raises:
      ValueError: an unknown preset, an unreadable preset file, or a value that cannot be used.

    >>> from deeplab_jax.config import load_config
    >>> setting_from_config(load_config("shapes").crf).iterations
    5
    """
    if config.normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={config.normalization!r} must be one of {', '.join(NORMALIZATIONS)}")
    check_name(config.bilateral)
    own = {"iterations": config.iterations, "normalization": config.normalization, "bilateral": config.bilateral}
    if not config.preset:
        params = CRFParams(**{name: getattr(config, name) for name in FIELDS})
        check_params(params)
        return Setting(params, **own)
    preset = preset_named(config.preset)
    if config.preset not in PRESETS or preset.normalization != "after":
        del own["normalization"]
    if preset.bilateral:
        del own["bilateral"]
    return dataclasses.replace(preset, **own)
