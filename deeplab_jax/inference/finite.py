"""Labels from marginals, which must be finite: for NaN the most probable class would be 0."""

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.errors import UserError


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
