"""The flags on how large photographs may be, shared by the commands that read them."""

from absl import flags

from deeplab_jax.errors import UserError
from deeplab_jax.limits import CUT_ABOVE, REFUSE_ABOVE


def define(least: int, older: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines `--cut_above` and `--refuse_above`, and their older names.

    Args:
      least: the lowest value of `--cut_above`.
      older: its name in earlier versions.
      values: where they are defined.
    """
    cut, refuse = "cut photographs of more pixels into overlapping pieces", "refuse photographs of more pixels"
    flags.DEFINE_integer("cut_above", CUT_ABOVE, cut, least, flag_values=values)
    flags.DEFINE_alias(older, "cut_above", flag_values=values)
    flags.DEFINE_integer("refuse_above", REFUSE_ABOVE, refuse, lower_bound=0, flag_values=values)
    older_unit = "--refuse_above in millions, its older name"
    flags.DEFINE_float("max_megapixels", None, older_unit, lower_bound=0, flag_values=values)


def refuse_above(values: flags.FlagValues) -> int:
    """The number of pixels above which photographs are refused.

    Raises:
      UserError: it is given under both names, or is no number up to a million megapixels.
    """
    if values.max_megapixels is None:
        return values.refuse_above
    if values["refuse_above"].present:
        raise UserError("--max_megapixels: is the older name of --refuse_above; give one of them")
    if not values.max_megapixels <= 1e6:  # neither is NaN
        raise UserError(f"--max_megapixels={values.max_megapixels:g}: give a number from 0 to 1000000")
    return int(values.max_megapixels * 1_000_000)
