"""The CRF's parameters, their ranges and checks."""

import dataclasses
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

NORMALIZATIONS = ("none", "before", "after", "symmetric")
FIELDS = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")

WEIGHT_FIELDS = ("bilateral_weight", "gaussian_weight")

# Lowest and highest value of each number, as float32: the same in flags, presets, configs and calls.
WIDTHS = (0.01, 1e6)  # pixels, or units of a 0..255 image
WEIGHTS = (-1e6, 1e6)
MAX_ITERATIONS = 10_000

# Log probability of a label that the unary rules out with +inf: sums with it stay finite, and no message reaches it.
IMPOSSIBLE = -1e30

Array = jax.Array | np.ndarray
Value = float | jax.Array | np.ndarray | tuple[float, ...]


@flax.struct.dataclass
class CRFParams:
    """Weights and widths of the two kernels (Chen et al. 2015, Eq. 3; Kraehenbuhl and Koltun 2011, Eq. 3). A pytree.

    A weight is a number, one number per class `[C]`, or a matrix `[C, C]` by which label l' attracts label l. A
    position width is a number or a pair (x, y); the colour width a number or three (R, G, B).

    Attributes:
      bilateral_weight: w1, the appearance kernel's weight.
      bilateral_xy_std: sigma_alpha, pixels.
      bilateral_rgb_std: sigma_beta, in units of a 0..255 image.
      gaussian_weight: w2, the smoothness kernel's weight.
      gaussian_xy_std: sigma_gamma, pixels.

    >>> CRFParams(bilateral_xy_std=67.0).at_stride(8).bilateral_xy_std
    8.375
    """

    bilateral_weight: Value = 4.0
    bilateral_xy_std: Value = 67.0
    bilateral_rgb_std: Value = 3.0
    gaussian_weight: Value = 3.0
    gaussian_xy_std: Value = 1.0

    def at_stride(self, stride: float) -> "CRFParams":
        """The same kernels for an image sampled at `stride`: position widths are divided by it, the rest unchanged.

        Raises:
          ValueError: the stride is not a number above 0.
        """
        if not (is_traced(stride) or 0 < number(stride) < np.inf):
            raise ValueError(f"stride={stride!r} must be a number above 0")
        scale = lambda std: tuple(s / stride for s in std) if isinstance(std, tuple | list) else std / stride  # noqa: E731
        xy_stds = {name: scale(getattr(self, name)) for name in ("bilateral_xy_std", "gaussian_xy_std")}
        return dataclasses.replace(self, **xy_stds)

    def of_classes(self, ids: np.ndarray, classes: int | None = None) -> "CRFParams":
        """The same kernels where only the classes `ids` [K] exist: weights per class are theirs, the rest unchanged.

        Args:
          ids: class ids, integers.
          classes: how many there must be where weights are per class; None = any number that has all `ids`.

        Raises:
          ValueError: a weight is for another number of classes, or has none for one of them.
        """
        weights = {}
        for name in (n for n in WEIGHT_FIELDS if np.ndim(getattr(self, n))):
            weight = np.asarray(getattr(self, name))
            if classes not in (None, len(weight)):
                raise ValueError(f"{name} has a number for each of {len(weight)} classes, but there are {classes}")
            if min(ids, default=0) < 0:
                raise ValueError(f"{min(ids)} is no class id")
            if max(ids, default=0) >= len(weight):
                raise ValueError(
                    f"{name} has a number for each of the classes 0 to {len(weight) - 1}, and none for {max(ids)}"
                )
            weights[name] = weight[np.ix_(*[ids] * weight.ndim)]
        return dataclasses.replace(self, **weights)


def check_params(params: CRFParams, where: str = "") -> None:
    """Checks the numbers as float32, the type in which they are used: widths within `WIDTHS`, weights within `WEIGHTS`.

    Traced values are not checked. `where` begins the message.

    Raises:
      ValueError: a value is outside its range, or not a number.
    """
    if not isinstance(params, CRFParams):
        hint = '; those of a preset are PRESETS["v2_resnet101"].params' if hasattr(params, "params") else ""
        raise ValueError(f"{where}params must be CRFParams, not {type(params).__name__}{hint}")
    for name in FIELDS:
        value = getattr(params, name)
        if is_traced(value):
            continue
        shown = " ".join(str(value).split())[:60]  # of several rows, too, in one line
        try:
            given = np.asarray(jax.device_get(value))
            if given.dtype.kind in "USb":  # NumPy would read "4" and True as numbers
                raise TypeError
            array = given.astype(np.float64)
        except (TypeError, ValueError, OverflowError) as e:
            raise ValueError(f"{where}{name}={shown} is not a number") from e
        low, high = WIDTHS if name.endswith("std") else WEIGHTS
        with np.errstate(over="ignore"):
            used = array.astype(np.float32)
        if not np.isfinite(used).all():
            raise ValueError(f"{where}{name}={shown} must be finite, and lie between {low:g} and {high:g}")
        if name.endswith("std") and not (used > 0).all():
            raise ValueError(f"{where}{name}={shown} must be greater than 0, from {low:g} to {high:g}")
        if not ((used >= np.float32(low)) & (used <= np.float32(high))).all():
            raise ValueError(f"{where}{name}={shown} must lie between {low:g} and {high:g}")
        sizes = {"bilateral_xy_std": 2, "gaussian_xy_std": 2, "bilateral_rgb_std": 3}
        if name in sizes and array.shape not in ((), (sizes[name],)):
            raise ValueError(f"{where}{name} has shape {array.shape}; give one number or {sizes[name]}")
        if name in WEIGHT_FIELDS and (not array.size or array.ndim > 2 or len(set(array.shape)) > 1):
            raise ValueError(f"{where}{name} has shape {array.shape}; give one number, C numbers or C x C")


def check_iterations(iterations: object, where: str = "") -> None:
    """Raises ValueError unless it is a whole number from 0 to `MAX_ITERATIONS`; `where` begins the message."""
    if isinstance(iterations, bool) or not isinstance(iterations, int | np.integer):
        raise ValueError(
            f"{where}iterations={str(iterations)[:60]} must be a whole number, fixed when the function is compiled"
        )
    if not 0 <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"{where}iterations={str(iterations)[:60]} must be at least 0 and at most {MAX_ITERATIONS}")


def number(value: Any) -> float:
    """A concrete number as a float, NaN for anything else."""
    if isinstance(value, str | bytes | bool) or is_traced(value):
        return math.nan
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def is_traced(value: Any) -> bool:
    """Whether `value` holds a JAX tracer, whose numbers are unknown."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value))


def as_array(value: Any) -> jax.Array:
    """`jnp.asarray`, without the program that it compiles for each new shape of a host array; of either byte order.

    >>> as_array(np.arange(3.0)).dtype
    dtype('float32')
    """
    return jax.device_put(as_host(value), may_alias=False) if isinstance(value, np.ndarray) else jnp.asarray(value)


def as_host(value: Any) -> np.ndarray:
    """`numpy.asarray`, in the processor's byte order: JAX refuses the other one.

    >>> as_host(np.arange(3, dtype=">f4")).dtype
    dtype('float32')
    """
    array = np.asarray(value)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def as_mask(value: Any) -> jax.Array | None:
    """A mask as booleans; None stays None."""
    if value is None:
        return None
    return value != 0 if isinstance(value, jax.Array) else as_array(np.asarray(value) != 0)


def components(std: Value, count: int, dtype: Any) -> jax.Array:
    """A width as `[count]`: one number repeated, or `count` numbers as they are."""
    if isinstance(std, tuple | list):
        std = jnp.stack([jnp.asarray(s, dtype) for s in std])
    return jnp.broadcast_to(jnp.asarray(std, dtype), (count,))


def truncation_radius(std: Value, truncate: float, step: int = 2) -> tuple[int, int] | None:
    """Radii (x, y) in pixels beyond which a Gaussian is dropped, rounded up to `step`; None if `std` is traced."""
    if is_traced(std):
        return None
    stds = np.broadcast_to(np.asarray(jax.device_get(std), np.float64), (2,))
    x, y = (step * math.ceil(max(1.0, truncate * float(s)) / step) for s in stds)
    return x, y
