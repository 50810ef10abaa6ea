"""Mean-field inference in the fully connected CRF (Kraehenbuhl and Koltun 2011, Algorithm 1).

Q starts at softmax(-U). Each iteration sets Q = softmax(-U - mu sum_m w_m norm(filter_m(Q))); with Potts compatibility
that is softmax(-U + sum_m w_m norm(filter_m(Q))). A pixel's own contribution (i = j) is counted unless `include_self`
is False.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.crf import checks, filters, gaussian, iteration, plain, pruning
from deeplab_jax.crf.kernels import Kernel, choose_bilateral, image_kernels, point_kernels
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import (
    IMPOSSIBLE,
    Array,
    CRFParams,
    Value,
    truncation_radius,
)


def mean_field(
    unary: Array,
    image: Array,
    params: CRFParams,
    iterations: int = 10,
    *,
    bilateral: str = "auto",
    normalization: str = "symmetric",
    compatibility: Array | None = None,
    mask: Array | None = None,
    kernels: Sequence[tuple[Array, Value]] = (),
    update: str = "parallel",
    regularizer: str = "entropy",
    regularization: float = 1.0,
    include_self: bool = True,
    return_all: bool | Sequence[int] = False,
    return_log: bool = False,
    prune: bool | None = None,
    cutoff: float | None = None,
    storage_dtype: Any = None,
) -> jax.Array:
    """Marginals of the fully connected CRF over an image.

    Compiled once per shape and set of options; works inside jit, vmap, grad and pmap. Differentiable, once and in
    reverse mode, in the unary, the weights and the compatibility with every filter; in `bilateral_*_std` and the image
    with "exact" and "separable" (with "permutohedral" their gradient is 0); in `gaussian_xy_std` always, where it is
    traced.

    Args:
      unary: [H, W, C] or [B, H, W, C], -log P up to a constant per pixel, C >= 2; +inf rules a label out.
      image: [..., H, W, 3] RGB in 0..255, uint8 or float.
      params: weights and widths of the kernels.
      iterations: T >= 0; 0 gives softmax(-unary).
      bilateral: "permutohedral", "exact", "separable", or "auto" (see `choose_bilateral`).
      normalization: "none", "before", "after" or "symmetric"; published parameters come with theirs (`PRESETS`).
      compatibility: [C, C] penalties mu(l, l') that replace the Potts model's [l != l'].
      mask: [..., H, W]; pixels where it is False neither send nor receive messages, and have uniform marginals. The
        others have the marginals that they would have alone.
      kernels: further pairwise kernels, pairs of features [..., H, W, D], divided by their standard deviations, and a
        weight. They use the filter of `bilateral`, or the lattice if that is "separable".
      update: "parallel"; "convergent" (see `deeplab_jax.crf.convergent`), which never raises the free energy; or
        "frank_wolfe" (see `deeplab_jax.crf.frank_wolfe`), which looks for a labelling of low energy.
      regularizer: of "frank_wolfe": "entropy" or "euclidean".
      regularization: how much it counts, above 0; less leaves less doubt in the marginals.
      include_self: False leaves out i = j.
      return_all: also the marginals before the first and after each iteration, [T + 1, ...]; numbers of iterations
        request only those, in their order.
      return_log: log marginals instead of marginals.
      prune: True leaves labels that win nowhere out of the filtering (see `crf.pruning`); False filters all;
        None does so in plain calls (see `deeplab_jax.crf.plain`). All are filtered where gradients are taken.
      cutoff: for "exact": kernel values below it may be skipped (see `exact.build`).
      storage_dtype: data type of the marginals between iterations (`jnp.bfloat16`); arithmetic stays float32.

    Returns:
      q with the unary's shape, non-negative, sums to 1 over C; with `return_all` [T + 1, ...], or as many as requested.

    Raises:
      ValueError: names the argument. Values (NaN in the unary, widths that are not positive) are checked only when they
        are concrete. An image in 0..1 causes a warning.

    >>> import numpy as np
    >>> image = np.full((3, 3, 3), 128)  # one colour
    >>> unary = np.tile(np.float32([0.0, 1.0]), (3, 3, 1))
    >>> unary[1, 1] = 1.0, 0.0  # the center pixel prefers label 1
    >>> q = mean_field(unary, image, CRFParams(), iterations=5)
    >>> np.asarray(q.argmax(-1)).tolist()  # and is outvoted by the others
    [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
    """
    checks.check_static(iterations, normalization, update, cutoff, include_self, storage_dtype, return_log, prune)
    checks.check_regularizer(regularizer, regularization, update)
    energy = None if update == "parallel" else f'update="{update}"'
    unary, image, mask, points, weights = checks.of_image(unary, image, params, compatibility, mask, kernels, energy)
    counts = checks.counts_of(return_all, iterations)
    chosen = choose_bilateral(bilateral, unary.shape[-3], unary.shape[-2])
    options = Options(
        iterations=int(iterations),
        normalization=normalization,
        bilateral=chosen,
        cutoff=None if cutoff is None else float(cutoff),
        radius=truncation_radius(params.gaussian_xy_std, gaussian.TRUNCATE),
        extra=(filters.for_points(chosen),) * len(points),
        update=update,
        regularizer=regularizer,
        regularization=float(regularization),
        include_self=bool(include_self),
        return_all=counts is not None or bool(return_all),
        counts=counts,
        return_log=return_log,
        prune=prune,
        storage_dtype=storage_dtype,
    )
    arguments = unary, image, params, compatibility, mask, points, weights
    if plain.covers(options, *arguments):
        q = plain.image_marginals(*arguments, options)
        if q is not None:
            return q
    q = _mean_field(*arguments, dataclasses.replace(options, counts=None))
    return q if counts is None else q[np.asarray(counts)]


def mean_field_features(
    unary: Array,
    kernels: Sequence[tuple[Array, Value]],
    iterations: int = 10,
    *,
    bilateral: str = "auto",
    normalization: str = "symmetric",
    compatibility: Array | None = None,
    mask: Array | None = None,
    update: str = "parallel",
    regularizer: str = "entropy",
    regularization: float = 1.0,
    include_self: bool = True,
    return_all: bool | Sequence[int] = False,
    return_log: bool = False,
    prune: bool | None = None,
    cutoff: float | None = None,
    storage_dtype: Any = None,
) -> jax.Array:
    """Marginals of the fully connected CRF over any points: volumes, point clouds, images with depth.

    Args:
      unary: [N, C], -log P up to a constant per point.
      kernels: pairs of features [N, D], divided by their standard deviations (at most 1e15 then), and a weight (number,
        [C] or [C, C]; at most 1e6).
      iterations: T >= 0.
      bilateral: "permutohedral", "exact" or "auto": the filter of all kernels.
      mask: [N]; for this and the other arguments see `mean_field`. Labels are pruned (`prune`) by runs of points.

    Returns:
      q with the unary's shape, non-negative, sums to 1 over C; [T + 1, N, C] with `return_all`, or as many.

    Raises:
      ValueError: names the argument, as `mean_field` does.

    >>> import numpy as np
    >>> heights = np.array([[0.0], [0.1], [5.0]])  # two points close to each other, and one far away
    >>> unary = np.float32([[0.0, 3.0], [0.2, 0.0], [0.2, 0.0]])
    >>> q = mean_field_features(unary, [(heights, 4.0)], iterations=5)
    >>> np.asarray(q.argmax(-1)).tolist()  # the second follows the first
    [0, 0, 1]
    """
    checks.check_static(iterations, normalization, update, cutoff, include_self, storage_dtype, return_log, prune)
    checks.check_regularizer(regularizer, regularization, update)
    energy = None if update == "parallel" else f'update="{update}"'
    unary, mask, points, weights = checks.of_points(unary, compatibility, mask, kernels, energy)
    counts = checks.counts_of(return_all, iterations)
    chosen = choose_bilateral(bilateral, unary.shape[0], 1)
    if filters.FILTERS[chosen].grid:
        raise ValueError(f'bilateral="{chosen}" needs rows and columns; use "permutohedral" or "exact" for points')
    options = Options(
        iterations=int(iterations),
        normalization=normalization,
        bilateral=None,
        cutoff=None if cutoff is None else float(cutoff),
        extra=(chosen,) * len(points),
        update=update,
        regularizer=regularizer,
        regularization=float(regularization),
        include_self=bool(include_self),
        return_all=counts is not None or bool(return_all),
        counts=counts,
        return_log=return_log,
        prune=prune,
        storage_dtype=storage_dtype,
    )
    arguments = unary, compatibility, mask, points, weights
    if plain.covers(options, *arguments):
        q = plain.point_marginals(*arguments, options)
        if q is not None:
            return q
    q = _mean_field_points(*arguments, dataclasses.replace(options, counts=None))
    return q if counts is None else q[np.asarray(counts)]


@partial(jax.jit, static_argnames="options")
def _mean_field(unary, image, params, compatibility, mask, features, weights, options):
    def one(unary, image, mask, features):
        height, width, labels = unary.shape
        flat = unary.reshape(-1, labels)
        mask = None if mask is None else mask.reshape(-1)
        features = tuple(f.reshape(height * width, -1) for f in features)
        kernels = image_kernels(image, params, mask, options, _compute_dtype(unary))
        kernels += point_kernels(features, weights, mask, options, _compute_dtype(unary))
        q = solve(flat, kernels, compatibility, mask, options)
        return q.reshape(*q.shape[:-2], height, width, labels)

    if unary.ndim == 3:
        return one(unary, image, mask, features)
    if options.bilateral == "permutohedral":  # one after another, so that each image costs only its own lattice
        q = lax.map(lambda x: one(*x), (unary, image, mask, features))
    else:
        q = jax.vmap(one)(unary, image, mask, features)
    return q.swapaxes(0, 1) if options.return_all else q


@partial(jax.jit, static_argnames="options")
def _mean_field_points(unary, compatibility, mask, features, weights, options):
    kernels = point_kernels(features, weights, mask, options, _compute_dtype(unary))
    return solve(unary, kernels, compatibility, mask, options)


def solve(
    unary: jax.Array,
    kernels: Sequence[Kernel],
    compatibility: jax.Array | None,
    mask: jax.Array | None,
    options: Options,
) -> jax.Array:
    """Runs the iterations on unary [N, C]; returns the results that `options` request, in the unary's type."""
    dtype = _compute_dtype(unary)
    negative = jnp.maximum(-unary.astype(dtype), IMPOSSIBLE)
    negative = jnp.maximum(negative - lax.stop_gradient(negative.max(-1, keepdims=True)), IMPOSSIBLE)
    if mask is not None:
        negative = jnp.where(mask[:, None], negative, 0)
    if options.prune:
        logits, history = pruning.iterate(negative, kernels, compatibility, options, mask)
    else:
        logits, history = iteration.iterate(negative, kernels, compatibility, options)
    result = history if options.return_all and history is not None else logits
    result = jax.nn.log_softmax(result, axis=-1) if options.return_log else jax.nn.softmax(result, axis=-1)
    return result.astype(unary.dtype)


def _compute_dtype(unary: jax.Array) -> Any:
    return jnp.promote_types(unary.dtype, jnp.float32)
