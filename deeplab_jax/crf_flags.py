"""The CRF's flags, shared by several commands: a preset, and single parameters that override it.

Importing `deeplab_jax.crf` imports JAX and Flax, for which `--help` must not wait: the values that the flags need are
repeated here, and a test compares them.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from absl import flags

from deeplab_jax.errors import UserError

if TYPE_CHECKING:
    from deeplab_jax.crf.setting import Setting

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
    "gaussian_weight": "w2, weight of the kernel on position only",
    "gaussian_xy_std": "sigma_gamma, its width in pixels",
}

FIELDS = tuple(_MEANING)
NAMES = ("preset", *FIELDS, "bilateral", "normalization")


def define(preset: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines the flags; `preset` names or describes the default preset in --help."""
    known = f"one of {', '.join(PRESETS)}, or a preset file (.json); default: {preset}"
    flags.DEFINE_string("preset", None, known, flag_values=values)
    for name, meaning in _MEANING.items():
        allowed = _WIDTH if name.endswith("std") else _WEIGHT
        flags.DEFINE_float(name, None, f"{meaning}, {allowed}; default: the preset's", flag_values=values)
    define_bilateral("filter of the color kernel; default: the preset's, else the model's or auto", values)
    of = "of the kernels; default: the preset's"
    flags.DEFINE_enum("normalization", None, NORMALIZATIONS, of, flag_values=values)


class _FilterName(flags.ArgumentParser):
    """A name in `crf.filters.FILTERS`, which is imported only if a name is given."""

    def parse(self, argument: str) -> str:
        from deeplab_jax.crf.filters import check_name

        try:
            check_name(argument)
        except ValueError as e:  # absl names the flag and its value itself
            raise ValueError(str(e).removeprefix(f"bilateral={argument!r} ")) from e
        return argument

    def flag_type(self) -> str:
        return "string"


def define_bilateral(meaning: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--bilateral`."""
    about = f"{meaning} (auto, permutohedral, exact or separable)"
    serializer: flags.ArgumentSerializer[str] = flags.ArgumentSerializer()
    flags.DEFINE(_FilterName(), "bilateral", None, about, flag_values=values, serializer=serializer)


def setting(values: flags.FlagValues, iterations: int | None, default: "Setting") -> "Setting":
    """Reads the flags.

    Args:
      values: the parsed flags.
      iterations: from the command's own flag; None = the preset's.
      default: the setting without flags; its filter also applies if the given preset names none.

    Raises:
      UserError: an unknown preset, an unreadable preset file, or a value that cannot be used.
    """
    from deeplab_jax.crf.params import check_iterations, check_params
    from deeplab_jax.crf.setting import preset_named

    try:
        preset = preset_named(values.preset) if values.preset else default
        given = {name: value for name in FIELDS if (value := values[name].value) is not None}
        params = replace(preset.params, **given)
        check_params(params, where="--")
        iterations = preset.iterations if iterations is None else iterations
        check_iterations(iterations, where="--")
    except ValueError as e:
        raise UserError(f"{'--' if str(e).startswith('preset=') else ''}{e}") from e
    return replace(
        preset,
        params=params,
        iterations=iterations,
        normalization=values.normalization or preset.normalization,
        bilateral=values.bilateral or preset.bilateral or default.bilateral,
    )
