"""Pairwise kernels: features of an image, the choice of a filter, normalization and weights."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from deeplab_jax import target
from deeplab_jax.crf import filters, gaussian
from deeplab_jax.crf.filters import Turn
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import CRFParams, Value, components

# Up to this many pixels summing all pairs is affordable: nothing is approximated, and widths have gradients.
EXACT_UP_TO = {"cpu": 4096, "gpu": 16384, "tpu": 8192}


def choose_bilateral(bilateral: str, height: int, width: int, platform: str | None = None) -> str:
    """The filter that a name stands for.

    Args:
      bilateral: a name of `filters.FILTERS`, or "auto": exact up to 4,096 pixels on CPU (score maps of
        41 x 41 and the like; ten iterations over 63 x 47 pixels and 21 labels take 0.14 s of CPU time, 1.7 times the
        lattice's), 16,384 on GPU and 8,192 on TPU (chosen from the compilers' estimates, not measured; see
        docs/scaling.md), else permutohedral. A program for several platforms uses the CPU's limit.
      height: H; for point sets, N with width 1.
      width: W.
      platform: "cpu", "gpu" or "tpu"; default: the platform for which a program is traced.

    Raises:
      ValueError: an unknown name.

    >>> choose_bilateral("auto", 41, 41, "cpu"), choose_bilateral("auto", 375, 500, "cpu")
    ('exact', 'permutohedral')
    """
    filters.check_name(bilateral)
    if bilateral == "auto":
        limit = EXACT_UP_TO.get(platform or target.platform(), EXACT_UP_TO["cpu"])
        return "exact" if height * width <= limit else "permutohedral"
    return bilateral


def bilateral_features(image: jax.Array, params: CRFParams) -> jax.Array:
    """(x, y, R, G, B) [H * W, 5] of an image [H, W, 3] in 0..255, divided by their standard deviations."""
    height, width, _ = image.shape
    dtype = image.dtype
    x_std, y_std = components(params.bilateral_xy_std, 2, dtype)
    y, x = jnp.meshgrid(jnp.arange(height, dtype=dtype) / y_std, jnp.arange(width, dtype=dtype) / x_std, indexing="ij")
    colour = image / components(params.bilateral_rgb_std, 3, dtype)
    return jnp.concatenate([x[..., None], y[..., None], colour], axis=-1).reshape(height * width, 5)


@flax.struct.dataclass
class Kernel:
    """A filter with its normalization and weight: the operator diag(after) (F - [no self] I) diag(before).

    Attributes:
      structure: the result of the filter's `build`.
      before: [N, 1], multiplies the values before filtering; 0 where a pixel is masked out.
      after: [N, 1], multiplies the result.
      sums: [N, 1], filter(1), the pixel's own contribution included.
      weight: number, [C] or [C, C].
      filter: the filter's name.
      include_self: whether a pixel's own value (i = j) counts.
    """

    structure: Any
    before: jax.Array
    after: jax.Array
    sums: jax.Array
    weight: Value
    filter: str = flax.struct.field(pytree_node=False)
    include_self: bool = flax.struct.field(pytree_node=False, default=True)


def build_kernel(
    name: str,
    structure: Any,
    weight: Value,
    normalization: str,
    mask: jax.Array,
    include_self: bool = True,
) -> Kernel:
    """Adds normalization (from filter(mask), i = j included) and weight to a built filter.

    Args:
      name: the filter's name.
      structure: the result of its `build`.
      weight: number, [C] or [C, C]; also as lists or tuples.
      normalization: "none" (Kraehenbuhl and Koltun 2011, Eq. 2), "before" and "after" (divided by filter(1) before or
        after filtering), "symmetric" (by its square root before and after).
      mask: [N, 1], 1 where a pixel takes part, else 0.
      include_self: False leaves out i = j. filter(1) includes it anyway, as it is 1 for every pixel.
    """
    sums = filters.apply(name, structure, mask)
    scale = jnp.where(mask > 0, sums, 1)
    # A lattice may give an isolated point a tiny sum; sums below this are not trusted.
    scale = 1 / jnp.maximum(scale, 1e-6)
    before, after = {
        "none": (mask, mask),
        "before": (mask * scale, mask),
        "after": (mask, mask * scale),
        "symmetric": (mask * jnp.sqrt(scale), mask * jnp.sqrt(scale)),
    }[normalization]
    if isinstance(weight, list | tuple):
        weight = jnp.asarray(weight)
    return Kernel(structure, before, after, sums * mask, weight, name, include_self)


def image_kernels(
    image: jax.Array, params: CRFParams, mask: jax.Array | None, options: Options, dtype: Any
) -> list[Kernel]:
    """The appearance and the smoothness kernel of an image [H, W, 3], over its pixels in rows."""
    height, width, _ = image.shape
    features = _among_valid(bilateral_features(image.astype(dtype), params), mask)
    name = options.bilateral
    assert name is not None, "an image needs a filter for the appearance kernel"
    bilateral = filters.build(name, features, (height, width), options.cutoff)
    spatial = gaussian.build(height, width, params.gaussian_xy_std, radius=options.radius, dtype=dtype)
    valid = _column(mask, height * width, dtype)
    build = partial(build_kernel, normalization=options.normalization, mask=valid, include_self=options.include_self)
    return [
        build(name, bilateral, weight=params.bilateral_weight),
        build(filters.SMOOTHNESS, spatial, weight=params.gaussian_weight),
    ]


def point_kernels(
    features: Sequence[jax.Array], weights: Sequence[Value], mask: jax.Array | None, options: Options, dtype: Any
) -> list[Kernel]:
    """Kernels over the user's features [N, D]."""
    kernels = []
    for name, feature, weight in zip(options.extra, features, weights, strict=True):
        structure = filters.build(name, _among_valid(feature.astype(dtype), mask), None, options.cutoff)
        valid = _column(mask, feature.shape[0], dtype)
        kernels.append(build_kernel(name, structure, weight, options.normalization, valid, options.include_self))
    return kernels


def _among_valid(features: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Moves masked points onto a valid one, so that they do not change the structure that a filter builds."""
    if mask is None:
        return features
    return jnp.where(mask[:, None], features, features[jnp.argmax(mask)])


def _column(mask: jax.Array | None, points: int, dtype: Any) -> jax.Array:
    return jnp.ones((points, 1), dtype) if mask is None else mask.astype(dtype)[:, None]


def filtered(kernel: Kernel, q: jax.Array, turn: Turn = None) -> jax.Array:
    """The normalized filter of q [N, C], unweighted; [N, C]. `turn` as in `filters.apply`."""
    values = kernel.before * q
    out = filters.apply(kernel.filter, kernel.structure, values, turn)
    return kernel.after * (out if kernel.include_self else out - values)


def message(kernel: Kernel, q: jax.Array, turn: Turn = None) -> jax.Array:
    """The weighted, normalized filter of q [N, C], which attracts each pixel to each label; [N, C]."""
    return weighted(kernel.weight, filtered(kernel, q, turn))


def attraction(
    q: jax.Array, kernels: Sequence[Kernel], compatibility: jax.Array | None, turn: Turn = None
) -> jax.Array:
    """The contribution of all kernels to the logits: -mu sum_m w_m norm(filter_m(q)), [N, C]."""
    total = sum((message(kernel, q, turn) for kernel in kernels), jnp.zeros_like(q))
    return total if compatibility is None else -weighted(compatibility, total)


def weighted(weight: Value, values: jax.Array) -> jax.Array:
    """A weight (number, [C], or [C, C] from label l' to l) applied to values [N, C]."""
    weight = jnp.asarray(weight, values.dtype)
    if weight.ndim < 2:
        return weight * values
    return jnp.matmul(values, weight.T, precision=jax.lax.Precision.HIGHEST)
