"""Labels from marginals, which must be finite: for NaN the most probable class would be 0."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.errors import UserError


def require_finite_variables(variables: Any) -> None:
    """Refuses a network with a variable that holds NaN or infinity, which a maximum between layers may hide.

    Raises:
      UserError: names the first.
    """
    for path, value in jax.tree_util.tree_flatten_with_path(variables)[0]:
        # Without a mask of the array's size: NaN and infinity survive the sum.
        if not np.isfinite(np.sum(np.asarray(value), dtype=np.float64)):
            name = "/".join(str(getattr(key, "key", key)) for key in path)
            raise UserError(f"the network's '{name}' holds values that are not finite; use another checkpoint or file")


@jax.jit
def most_probable(marginals: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Class ids uint8 [H, W], and whether all marginals are finite (XLA's minimum ignores NaN on CPUs)."""
    return jnp.argmax(marginals, axis=-1).astype(jnp.uint8), jnp.isfinite(marginals).all()


def require_finite(finite: bool | np.bool) -> None:
    """Refuses marginals that are not finite: the most probable class would be 0 in every pixel.

    Raises:
      UserError: `finite` is false.
    """
    if not finite:
        raise UserError(
            "the marginals are not finite: the CRF's weights are too large, or the network's own scores are not "
            "finite (0 iterations show which)"
        )
