"""The CRF's energy, and the free energy that mean field lowers, as functions of labels and marginals.

Both require a symmetric kernel, hence normalization "none" or "symmetric", and a symmetric compatibility.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp

from deeplab_jax.crf import checks, filters, gaussian
from deeplab_jax.crf.kernels import (
    Kernel,
    choose_bilateral,
    filtered,
    image_kernels,
    point_kernels,
    weighted,
)
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import (
    Array,
    CRFParams,
    Value,
    as_array,
    truncation_radius,
)


def energy(
    labels: Array,
    unary: Array,
    image: Array,
    params: CRFParams,
    *,
    bilateral: str = "exact",
    normalization: str = "symmetric",
    compatibility: Array | None = None,
    mask: Array | None = None,
    kernels: Sequence[tuple[Array, Value]] = (),
) -> jax.Array:
    """E(x) = sum_i U_i(x_i) + sum_{i < j} mu(x_i, x_j) sum_m w_m k_m(i, j) (Chen et al. 2015, Eq. 1-3).

    Each unordered pair counts once and i = j is excluded: Eq. 1 has pairs of different pixels. Kernels are normalized.

    Args:
      labels: [H, W] or [B, H, W] integers in 0..C-1.
      unary: [..., H, W, C], -log P up to a constant per pixel.
      image: [..., H, W, 3] RGB in 0..255.
      params: the kernels. With Potts and one weight per class, two pixels of label l have energy -w_l k.
      bilateral, normalization, compatibility, mask, kernels: as in `mean_field`; normalization "none" or "symmetric".

    Returns:
      The energy of each image, [] or [B].

    Raises:
      ValueError: names the argument.

    >>> import numpy as np
    >>> grey, unary = np.full((1, 2, 3), 128), np.zeros((1, 2, 2), np.float32)
    >>> params = CRFParams(bilateral_weight=2.0, gaussian_weight=0.0)
    >>> same, different = (energy(np.array([x]), unary, grey, params, normalization="none") for x in ([0, 0], [0, 1]))
    >>> round(float(different - same), 2)  # one pair of unlike labels costs the weight
    2.0
    """
    labels = as_array(labels)
    if labels.shape != jnp.shape(unary)[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels must be integers {jnp.shape(unary)[:-1]} to go with unary, not {labels.dtype} {labels.shape}"
        )
    checks.check_mask(mask, jnp.shape(unary))
    checks.check_labels(labels, jnp.shape(unary)[-1], mask)
    certain = jax.nn.one_hot(
        labels, jnp.shape(unary)[-1], dtype=jnp.promote_types(jnp.asarray(unary).dtype, jnp.float32)
    )
    return kl_free_energy(
        certain,
        unary,
        image,
        params,
        bilateral=bilateral,
        normalization=normalization,
        compatibility=compatibility,
        mask=mask,
        kernels=kernels,
        include_self=False,
    )


def kl_free_energy(
    q: Array,
    unary: Array,
    image: Array,
    params: CRFParams,
    *,
    bilateral: str = "exact",
    normalization: str = "symmetric",
    compatibility: Array | None = None,
    mask: Array | None = None,
    kernels: Sequence[tuple[Array, Value]] = (),
    include_self: bool = True,
) -> jax.Array:
    """KL(Q || P) - log Z = sum_i q_i.(U_i + log q_i) + 1/2 sum_ij q_i^T mu q_j sum_m w_m k_m(i, j).

    Args:
      q: [..., H, W, C] marginals.
      unary, image, params, bilateral, normalization, compatibility, mask, kernels: as in `energy`.
      include_self: whether the sum over pairs includes i = j. True matches `mean_field`'s default, whose updates have
        fixed points where this function is stationary. False gives the KL divergence from the distribution of Eq. 1, up
        to log Z, and matches `mean_field(include_self=False)`.

    Returns:
      The free energy of each image, [] or [B]; use differences, since constants per pixel in the unary are included.

    Raises:
      ValueError: names the argument; in particular for the normalizations "before" and "after".

    >>> import numpy as np
    >>> image, unary = np.full((2, 2, 3), 128), np.zeros((2, 2, 2), np.float32)
    >>> q = np.full((2, 2, 2), 0.5, np.float32)  # four uniform pixels: the entropy is 4 log 2
    >>> nothing = CRFParams(bilateral_weight=0.0, gaussian_weight=0.0)
    >>> round(float(kl_free_energy(q, unary, image, nothing)), 2)
    -2.77
    """
    checks.check_static(0, normalization)
    checks.check_symmetric(normalization, "the CRF")
    unary, image, mask, points, weights = checks.of_image(unary, image, params, compatibility, mask, kernels, "the CRF")
    q = checks.real_array(q, "q")
    if q.shape != unary.shape:
        raise ValueError(f"q must have the unary's shape {unary.shape}, not {q.shape}")
    chosen = choose_bilateral(bilateral, unary.shape[-3], unary.shape[-2])
    options = Options(
        normalization=normalization,
        bilateral=chosen,
        radius=truncation_radius(params.gaussian_xy_std, gaussian.TRUNCATE),
        extra=(filters.for_points(chosen),) * len(points),
        include_self=include_self,
    )
    return _free_energy(q, unary, image, params, compatibility, mask, points, weights, options)


@partial(jax.jit, static_argnames="options")
def _free_energy(q, unary, image, params, compatibility, mask, features, weights, options):
    dtype = jnp.promote_types(unary.dtype, jnp.float32)

    def one(q, unary, image, mask, features):
        height, width, labels = unary.shape
        q, unary = (x.reshape(-1, labels).astype(dtype) for x in (q, unary))
        mask = None if mask is None else mask.reshape(-1)
        features = tuple(f.reshape(height * width, -1) for f in features)
        built = image_kernels(image, params, mask, options, dtype)
        built += point_kernels(features, weights, mask, options, dtype)
        local = q * jnp.where(q > 0, unary, 0) + jnp.where(q > 0, q * jnp.log(jnp.where(q > 0, q, 1)), 0)
        if mask is not None:
            local = jnp.where(mask[:, None], local, 0)
        return local.sum() + 0.5 * sum((q * _penalty(kernel, q, compatibility)).sum() for kernel in built)

    if unary.ndim == 3:
        return one(q, unary, image, mask, features)
    return jax.lax.map(lambda x: one(*x), (q, unary, image, mask, features))


def _penalty(kernel: Kernel, q: jax.Array, compatibility: jax.Array | None) -> jax.Array:
    """mu w filter(q), the expected penalty of each label at each pixel; [N, C]."""
    values = filtered(kernel, q)
    if compatibility is not None:
        return weighted(compatibility, weighted(kernel.weight, values))
    attraction = weighted(kernel.weight, values)
    weight = jnp.asarray(kernel.weight, values.dtype)
    if weight.ndim:
        return -attraction
    return weight * values.sum(-1, keepdims=True) - attraction
