"""The CRF's flags, shared by the commands that take them: a preset, and each parameter alone on top of it."""

from absl import flags

from deeplab_jax.crf.params import (
    FIELDS,
    NORMALIZATIONS,
    PRESETS,
    WEIGHTS,
    WIDTHS,
    Preset,
    Settings,
    check_iterations,
    check_params,
    preset_named,
)
from deeplab_jax.errors import UserError

BILATERALS = ("auto", "permutohedral", "exact", "separable")

_WEIGHT, _WIDTH = (f"from {low:g} to {high:g}" for low, high in (WEIGHTS, WIDTHS))
_MEANING = {
    "bilateral_weight": "w1, weight of the kernel on position and color",
    "bilateral_xy_std": "sigma_alpha, its width in pixels",
    "bilateral_rgb_std": "sigma_beta, its width in color, of 0..255",
    "gaussian_weight": "w2, weight of the kernel on position alone",
    "gaussian_xy_std": "sigma_gamma, its width in pixels",
}


NAMES = ("preset", *FIELDS, "bilateral", "normalization")


def define(preset: str) -> None:
    """Defines the flags; `preset` names the default preset in --help, or says in words where it comes from."""
    flags.DEFINE_string("preset", None, f"one of {', '.join(PRESETS)}, or a preset file (.json); default: {preset}")
    for name, meaning in _MEANING.items():
        allowed = _WIDTH if name.endswith("std") else _WEIGHT
        flags.DEFINE_float(name, None, f"{meaning}, {allowed}; default: the preset's")
    flags.DEFINE_enum("bilateral", None, BILATERALS, "filter of the color kernel; default: auto")
    flags.DEFINE_enum("normalization", None, NORMALIZATIONS, "of the kernels; default: the preset's")


def settings(values: flags.FlagValues, iterations: int | None, default: Preset, bilateral: str = "auto") -> Settings:
    """Reads the flags.

    Args:
      values: the parsed flags.
      iterations: from the command's own flag; None = the preset's.
      default: what holds where no flag is given.
      bilateral: the same for the filter.

    Raises:
      UserError: an unknown preset, an unreadable preset file, or a value that cannot be used.
    """
    try:
        preset = preset_named(values.preset) if values.preset else default
        given = {name: values[name].value for name in FIELDS if values[name].value is not None}
        params = preset.params.replace(**given)
        check_params(params, where="--")
        iterations = preset.iterations if iterations is None else iterations
        check_iterations(iterations, where="--")
    except ValueError as e:
        raise UserError(f"{'--' if str(e).startswith('preset=') else ''}{e}") from e
    return Settings(params, iterations, values.normalization or preset.normalization, values.bilateral or bilateral)
