"""The CRF's flags, shared by the commands that take them: a preset, and each parameter alone on top of it.

Importing `deeplab_jax.crf` brings JAX and Flax with it, which `--help` must not wait for: what the flags need to know
of it stands here once more, and a test compares.
"""

import dataclasses
from typing import TYPE_CHECKING

from absl import flags

from deeplab_jax.errors import UserError

if TYPE_CHECKING:
    from deeplab_jax.crf.params import Preset, Settings

NORMALIZATIONS = ("none", "before", "after", "symmetric")
PRESETS = (
    "deeplab_v1", "v1_msc", "v1_largefov", "v1_msc_largefov", "v1_coco_largefov", "v1_msc_coco_largefov", "v2_vgg16",
    "v2_resnet101", "deeplab_pytorch", "crfasrnn",
)  # fmt: skip

_WEIGHT, _WIDTH = "from -1e+06 to 1e+06", "from 0.01 to 1e+06"  # crf.params.WEIGHTS and WIDTHS
_MEANING = {
    "bilateral_weight": "w1, weight of the kernel on position and color",
    "bilateral_xy_std": "sigma_alpha, its width in pixels",
    "bilateral_rgb_std": "sigma_beta, its width in color, of 0..255",
    "gaussian_weight": "w2, weight of the kernel on position alone",
    "gaussian_xy_std": "sigma_gamma, its width in pixels",
}

FIELDS = tuple(_MEANING)
NAMES = ("preset", *FIELDS, "bilateral", "normalization")


def define(preset: str) -> None:
    """Defines the flags; `preset` names the default preset in --help, or says in words where it comes from."""
    flags.DEFINE_string("preset", None, f"one of {', '.join(PRESETS)}, or a preset file (.json); default: {preset}")
    for name, meaning in _MEANING.items():
        allowed = _WIDTH if name.endswith("std") else _WEIGHT
        flags.DEFINE_float(name, None, f"{meaning}, {allowed}; default: the preset's")
    define_bilateral("filter of the color kernel; default: auto")
    flags.DEFINE_enum("normalization", None, NORMALIZATIONS, "of the kernels; default: the preset's")


class _FilterName(flags.ArgumentParser):
    """A name in `crf.filters.FILTERS`, which is read when a name is given and not before."""

    def parse(self, argument: str) -> str:
        from deeplab_jax.crf.filters import check_name

        check_name(argument)
        return argument

    def flag_type(self) -> str:
        return "string"


def define_bilateral(meaning: str) -> None:
    """Defines `--bilateral`."""
    names = "auto, permutohedral, exact or separable"
    flags.DEFINE(_FilterName(), "bilateral", None, f"{meaning} ({names})", serializer=flags.ArgumentSerializer())


def settings(
    values: flags.FlagValues, iterations: int | None, default: "Preset", bilateral: str = "auto"
) -> "Settings":
    """Reads the flags.

    Args:
      values: the parsed flags.
      iterations: from the command's own flag; None = the preset's.
      default: what holds where no flag is given.
      bilateral: the same for the filter.

    Raises:
      UserError: an unknown preset, an unreadable preset file, or a value that cannot be used.
    """
    from deeplab_jax.crf.params import Settings, check_iterations, check_params, preset_named

    try:
        preset = preset_named(values.preset) if values.preset else default
        given = {name: value for name in FIELDS if (value := values[name].value) is not None}
        params = dataclasses.replace(preset.params, **given)
        check_params(params, where="--")
        iterations = preset.iterations if iterations is None else iterations
        check_iterations(iterations, where="--")
    except ValueError as e:
        raise UserError(f"{'--' if str(e).startswith('preset=') else ''}{e}") from e
    return Settings(params, iterations, values.normalization or preset.normalization, values.bilateral or bilateral)
