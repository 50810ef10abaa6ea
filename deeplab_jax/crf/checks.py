"""Argument checks of `mean_field` and related functions; errors name the argument.

Shapes, names and counts are always checked. Values are checked only when arrays are concrete, not inside a user's jit,
vmap or grad, where values are not known yet.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.crf.convergent import check_affinities
from deeplab_jax.crf.frank_wolfe import REGULARIZERS
from deeplab_jax.crf.params import (
    NORMALIZATIONS,
    WEIGHT_FIELDS,
    WEIGHTS,
    Value,
    as_array,
    as_mask,
    check_iterations,
    check_params,
    is_traced,
    number,
)

_FARTHEST = 1e15  # of a feature; squares of differences stay far from the end of float32
UPDATES = ("parallel", "convergent", "frank_wolfe")


def check_static(
    iterations: int,
    normalization: str,
    update: str = "parallel",
    cutoff: float | None = None,
    include_self: bool = True,
    storage_dtype: Any = None,
    return_log: bool = False,
    prune: bool | None = None,
) -> None:
    """Checks everything that is not an array."""
    check_iterations(iterations)
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r} must be one of {', '.join(NORMALIZATIONS)}")
    if update not in UPDATES:
        raise ValueError(f"update={update!r} must be one of {', '.join(UPDATES)}")
    if cutoff is not None and not 0 < number(cutoff) < 1:
        raise ValueError(f"cutoff={cutoff} must lie between 0 and 1, or be None")
    for name, value in (("include_self", include_self), ("return_log", return_log), ("prune", prune)):
        if not (isinstance(value, bool | np.bool_ | int) or (name == "prune" and value is None)):
            raise ValueError(f"{name}={value!r} must be True or False")
    if storage_dtype is not None and not _is_float(storage_dtype):
        raise ValueError(f"storage_dtype={storage_dtype!r} must be a type of floats, such as jnp.bfloat16, or None")
    if update != "parallel":
        check_symmetric(normalization, f'update="{update}"')


def of_image(
    unary: Any, image: Any, params: Any, compatibility: Any, mask: Any, kernels: Any, energy: str | None
) -> tuple[jax.Array, jax.Array, jax.Array | None, tuple[jax.Array, ...], tuple[Value, ...]]:
    """Checks the arguments that describe a CRF over an image or a batch.

    Args:
      energy: what needs an affinity that is symmetric in the labels, in words; None = nothing.

    Returns:
      The unary, the image, the mask as booleans, the features of `kernels` and their weights.
    """
    unary, image, kernels = real_array(unary, "unary"), real_array(image, "image"), kernel_pairs(kernels)
    check_unary(unary, (3, 4))
    check_image(image, unary.shape)
    check_params(params)
    for name in WEIGHT_FIELDS:
        check_weight(getattr(params, name), name, unary.shape[-1])
    own = (params.bilateral_weight, params.gaussian_weight)
    mask, points, weights = _of_kernels(unary, compatibility, mask, kernels, own, energy)
    return unary, image, mask, points, weights


def of_points(
    unary: Any, compatibility: Any, mask: Any, kernels: Any, energy: str | None
) -> tuple[jax.Array, jax.Array | None, tuple[jax.Array, ...], tuple[Value, ...]]:
    """Like `of_image`, for unary [N, C] without an image."""
    unary, kernels = real_array(unary, "unary"), kernel_pairs(kernels)
    check_unary(unary, (2,))
    return unary, *_of_kernels(unary, compatibility, mask, kernels, (), energy)


def _of_kernels(
    unary: jax.Array,
    compatibility: Any,
    mask: Any,
    kernels: Sequence[tuple[Any, Any]],
    own: tuple[Value, ...],
    energy: str | None,
) -> tuple[jax.Array | None, tuple[jax.Array, ...], tuple[Value, ...]]:
    """Checks what a unary goes with; `own` are the weights of kernels that are not in `kernels`."""
    labels = unary.shape[-1]
    check_mask(mask, unary.shape)
    check_compatibility(compatibility, labels)
    for n, (features, weight) in enumerate(kernels):
        check_features(features, f"kernels[{n}][0]", unary.shape[:-1])
        check_weight(weight, f"kernels[{n}][1]", labels)
    weights = tuple(weight for _, weight in kernels)
    if energy is not None:
        check_affinities((*own, *weights), compatibility, labels, energy)
    return as_mask(mask), tuple(as_array(features) for features, _ in kernels), weights


def counts_of(return_all: bool | Sequence[int], iterations: int) -> tuple[int, ...] | None:
    """The numbers of iterations that `return_all` names; None if it is a bool."""
    if isinstance(return_all, bool | np.bool_):
        return None
    counts = np.asarray(return_all)
    whole = counts.ndim == 1 and counts.size and np.issubdtype(counts.dtype, np.integer)
    if not whole or counts.min() < 0 or counts.max() > iterations:
        raise ValueError(f"return_all={return_all!r} must be True, False or numbers of iterations, 0 to {iterations}")
    return tuple(counts.tolist())


def check_regularizer(regularizer: str, regularization: float, update: str) -> None:
    """Checks what `update="frank_wolfe"` takes, and that no other update is given it."""
    if regularizer not in REGULARIZERS:
        raise ValueError(f"regularizer={regularizer!r} must be one of {', '.join(REGULARIZERS)}")
    if not 0 < number(regularization) < 1e6:
        raise ValueError(f"regularization={regularization!r} must be a number above 0, up to 1e+06")
    if update != "frank_wolfe" and (regularizer, regularization) != ("entropy", 1):
        raise ValueError(f'regularizer and regularization belong to update="frank_wolfe"; this one is {update!r}')


def _is_float(dtype: Any) -> bool:
    try:
        return bool(jnp.issubdtype(jnp.dtype(dtype), jnp.floating))
    except TypeError:
        return False


def real_array(value: Any, name: str) -> jax.Array:
    """The argument as an array; ValueError unless it consists of real numbers."""
    try:
        array = as_array(value)
    except (TypeError, ValueError) as e:
        raise ValueError(f"{name} must be an array of real numbers, not {_kind(value)}") from e
    if not _are_real(array.dtype):
        raise ValueError(f"{name} must be an array of real numbers, not {_kind(array)}")
    return array


def kernel_pairs(kernels: Any) -> tuple[tuple[Any, Any], ...]:
    """The argument `kernels` as pairs of features and a weight, without further checks."""
    try:
        pairs = tuple(kernels)
    except TypeError:
        pairs = (kernels,)
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ValueError("kernels must be pairs of features and a weight, as in [(features, 1.0)]")
    return tuple((features, weight) for features, weight in pairs)


def check_symmetric(normalization: str, what: str) -> None:
    """Refuses normalizations under which the pairwise terms have no energy."""
    if normalization in ("before", "after"):
        raise ValueError(
            f"normalization={normalization!r} makes the kernel asymmetric, so that {what} has no energy to lower; use "
            'normalization="symmetric" or "none"'
        )


def check_unary(unary: Any, ranks: tuple[int, ...]) -> None:
    """Checks the unary's rank and type, and that it holds no NaN and no -inf."""
    if not hasattr(unary, "shape") or not jnp.issubdtype(unary.dtype, jnp.floating):
        raise ValueError(f"unary must be an array of floats, -log P, not {_kind(unary)}")
    if len(unary.shape) not in ranks:
        layouts = {2: "[N, C]", 3: "[H, W, C]", 4: "[B, H, W, C]"}
        raise ValueError(f"unary has shape {unary.shape}; needed: {' or '.join(layouts[r] for r in ranks)}")
    if unary.shape[-1] < 2 or 0 in unary.shape:
        raise ValueError(f"unary has shape {unary.shape}; needed: at least 2 labels and no empty axis")
    if not is_traced(unary) and _unusable(unary):
        raise ValueError("unary holds NaN or -inf; it is -log P with P above 0 (see unary_from_probabilities)")


def check_image(image: Any, unary_shape: tuple[int, ...]) -> None:
    """Checks the image against the unary; warns when its values look like 0..1."""
    if not hasattr(image, "shape") or image.shape != (*unary_shape[:-1], 3):
        raise ValueError(
            f"image must be RGB of shape {(*unary_shape[:-1], 3)} to go with unary of shape {unary_shape}, "
            f"not {_kind(image)}"
        )
    if is_traced(image) or image.dtype == jnp.bool_:
        return
    low, high = _range(image)
    if jnp.issubdtype(image.dtype, jnp.floating) and not _finite(image):
        raise ValueError("image holds NaN or infinite values; it is RGB in 0..255")
    if low >= 0 and 0 < high <= 1:
        warnings.warn("image lies in 0..1; the CRF's colour width is for 0..255, multiply by 255", stacklevel=3)


def check_mask(mask: Any, unary_shape: tuple[int, ...]) -> None:
    """Checks that a mask has the unary's shape without its labels."""
    if mask is not None and (not hasattr(mask, "shape") or mask.shape != unary_shape[:-1] or not _are_real(mask.dtype)):
        raise ValueError(f"mask must have shape {unary_shape[:-1]} to go with unary, not {_kind(mask)}")


def check_labels(labels: jax.Array, classes: int, mask: jax.Array | np.ndarray | None = None) -> None:
    """Checks that labels are class ids where `mask` is True."""
    if is_traced((labels, mask)) or not labels.size:
        return
    if _outside(labels, classes, mask):
        raise ValueError(f"labels hold ids outside 0..{classes - 1}, the unary's classes; mask out unlabelled pixels")


def check_weight(weight: Any, name: str, labels: int) -> None:
    """Checks that a weight is a number, [C] or [C, C], within `WEIGHTS`."""
    if np.shape(weight) not in ((), (labels,), (labels, labels)):
        raise ValueError(f"{name} has shape {np.shape(weight)}; needed: a number, ({labels},) or ({labels}, {labels})")
    _check_numbers(weight, name)


def check_compatibility(compatibility: Any, labels: int) -> None:
    """Checks that a compatibility is [C, C], within `WEIGHTS`."""
    if compatibility is None:
        return
    if np.shape(compatibility) != (labels, labels):
        raise ValueError(f"compatibility has shape {np.shape(compatibility)}; needed: ({labels}, {labels})")
    _check_numbers(compatibility, "compatibility")


def _check_numbers(value: Any, name: str) -> None:
    """Checks that a concrete value consists of numbers within `WEIGHTS`, which float32 holds."""
    if is_traced(value):
        return
    kind = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    if not _are_real(kind):
        raise ValueError(f"{name} must consist of numbers, not {kind}")
    _check_range(value, name, *WEIGHTS)


def _check_range(values: Any, name: str, low: float, high: float) -> None:
    """Checks that concrete numbers are finite and lie between low and high."""
    if _within(values, low, high):
        return
    if not _finite(values):
        raise ValueError(f"{name} holds NaN or infinite values")
    raise ValueError(f"{name} must lie between {low:g} and {high:g}")


def check_features(features: Any, name: str, points: tuple[int, ...]) -> None:
    """Checks that a kernel's features are [..., D] over the unary's points, real and within `_FARTHEST`."""
    if hasattr(features, "dtype") and not _are_real(features.dtype):
        raise ValueError(f"{name} must be an array of real numbers, not {_kind(features)}")
    if not hasattr(features, "shape") or features.shape[:-1] != points or features.shape[-1] < 1:
        raise ValueError(f"{name} must be features of shape {(*points, 'D')} to go with unary, not {_kind(features)}")
    if not is_traced(features):
        _check_range(features, name, -_FARTHEST, _FARTHEST)


# Inside a user's jit, operations on concrete arrays are traced too unless evaluated at once.


@jax.ensure_compile_time_eval()
def _unusable(unary: Any) -> bool:
    return not bool((_on_host(unary) > -np.inf).all())  # False for NaN too; XLA's minimum would ignore NaN on CPUs


@jax.ensure_compile_time_eval()
def _outside(labels: Any, classes: int, mask: Any) -> bool:
    labels = _on_host(labels)
    wrong = (labels < 0) | (labels >= classes)
    return bool((wrong if mask is None else wrong & (_on_host(mask) != 0)).any())


@jax.ensure_compile_time_eval()
def _within(values: Any, low: float, high: float) -> bool:
    values = _on_host(values)
    return bool(((values >= np.float32(low)) & (values <= np.float32(high))).all())  # float16 does not hold the limits


@jax.ensure_compile_time_eval()
def _finite(values: Any) -> bool:
    values = _on_host(values)
    return bool(((values > -np.inf) & (values < np.inf)).all())


@jax.ensure_compile_time_eval()
def _range(image: Any) -> tuple[float, float]:
    return float(_on_host(image).min()), float(_on_host(image).max())


def _on_host(values: Any) -> Any:
    """The array as NumPy's if it is in the host's memory: JAX would compile a program for each new shape."""
    if not isinstance(values, jax.Array):
        return np.asarray(values)
    here = values.is_fully_addressable and all(device.platform == "cpu" for device in values.devices())
    return np.asarray(values) if here else values


def _are_real(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, wanted) for wanted in (jnp.floating, jnp.integer, jnp.bool_))


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{value.dtype} {shape}"
