"""Mean field whose parameters and number of iterations are arguments of one compiled program.

`crf.mean_field` is compiled again for each number of iterations and for each reach of the smoothness kernel, which
suits many photographs with one setting. A slider, and an exported program, need the opposite.
"""

import math
from functools import partial

import jax
import numpy as np

from deeplab_jax.crf import plain
from deeplab_jax.crf.gaussian import TRUNCATE
from deeplab_jax.crf.kernels import image_kernels
from deeplab_jax.crf.mean_field import solve
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import Array, CRFParams, as_array, is_traced, truncation_radius

# The smoothness kernel is cut off at the first of these radii, in pixels, that reaches as far as `mean_field`'s.
_RADII = (6, 14, 28, 46)


def mean_field_any(
    unary: Array,
    image: Array,
    params: CRFParams,
    iterations: Array | np.integer,
    mask: Array,
    compatibility: Array | None = None,
    *,
    bilateral: str,
    normalization: str,
    radius: tuple[int, int] | None,
    prune: bool = False,
) -> jax.Array:
    """Marginals as `crf.mean_field` computes them, for any parameters and number of iterations.

    Args:
      unary: [H, W, C] float32, -log P.
      image: [H, W, 3] RGB in 0..255, uint8 or float.
      params: numbers or arrays, all traced.
      iterations: int32 [], at least 0.
      mask: [H, W] bool, True where the array holds the photograph.
      compatibility: [C, C]; None = Potts.
      bilateral: "permutohedral", "exact" or "separable".
      normalization: "none", "before", "after", "symmetric".
      radius: (x, y) where the smoothness kernel is cut off; see `radius_for`. None = not at all, which is slower.
      prune: leaves out labels that win nowhere (see `crf.pruning`).

    Returns:
      [H, W, C] float32.
    """
    if not is_traced(iterations):
        options = Options(int(iterations), normalization, bilateral, radius=radius, prune=prune)
        if plain.covers(options, unary, image, params, compatibility, mask):
            q = plain.image_marginals(as_array(unary), image, params, compatibility, mask, (), (), options)
            if q is not None:
                return q
    return _mean_field_any(
        unary, image, params, iterations, mask, compatibility,
        bilateral=bilateral, normalization=normalization, radius=radius, prune=prune,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("bilateral", "normalization", "radius", "prune"))
def _mean_field_any(
    unary, image, params, iterations, mask, compatibility, *, bilateral, normalization, radius, prune
) -> jax.Array:
    options = Options(iterations, normalization, bilateral, radius=radius, prune=prune)
    flat_mask = mask.reshape(-1)
    kernels = image_kernels(image, params, flat_mask, options, unary.dtype)
    return solve(unary.reshape(-1, unary.shape[-1]), kernels, compatibility, flat_mask, options).reshape(unary.shape)


def exact_radius(params: CRFParams) -> tuple[int, int] | None:
    """The radius with which `mean_field_any` equals `crf.mean_field` for these parameters."""
    return truncation_radius(params.gaussian_xy_std, TRUNCATE)


def radius_for(params: CRFParams) -> tuple[int, int]:
    """One of a few radii, at least `exact_radius`, so that the program for a moved slider is already compiled."""
    reach = math.ceil(TRUNCATE * float(np.max(params.gaussian_xy_std)))
    radius = next((r for r in _RADII if r >= reach), reach + reach % 2)
    return radius, radius
