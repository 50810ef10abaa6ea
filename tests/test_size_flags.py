"""How large photographs may be, under the names of today and of before."""

import pytest
from absl import flags

from deeplab_jax import size_flags
from deeplab_jax.errors import UserError


def parsed(*given: str, older: str = "max_pixels") -> flags.FlagValues:
    values = flags.FlagValues()
    size_flags.define(least=4096, older=older, values=values)
    values(["predict", *given])
    return values


def test_what_holds_where_nothing_is_given():
    assert parsed().cut_above == 4_000_000 and size_flags.refuse_above(parsed()) == 200_000_000


@pytest.mark.parametrize("older", ["max_pixels", "crf_max_pixels"])
def test_both_names_of_each(older):
    for name in ("cut_above", older):
        assert parsed(f"--{name}=5000", older=older).cut_above == 5000
        with pytest.raises(flags.IllegalFlagValueError, match="4096"):
            parsed(f"--{name}=4095", older=older)
    assert size_flags.refuse_above(parsed("--refuse_above=1500000")) == 1_500_000
    assert size_flags.refuse_above(parsed("--max_megapixels=1.5")) == 1_500_000
    with pytest.raises(UserError, match="older name of --refuse_above"):
        size_flags.refuse_above(parsed("--max_megapixels=1.5", "--refuse_above=7"))
