"""Unaries, -log P [..., C], from logits, probabilities or labels.

Host arrays are computed by NumPy: JAX would compile a program for each of their shapes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.crf.params import as_array, as_host, is_traced, number


def unary_from_logits(logits: Any) -> jax.Array:
    """-log softmax(logits) for logits [..., C] of any float type; [..., C], float32 or wider.

    Raises:
      ValueError: they are not floats [..., C], or a position has no finite logit or one of +inf.

    >>> print(unary_from_logits(np.zeros((1, 4), np.float32)).round(2))  # four equally likely labels: log 4
    [[1.39 1.39 1.39 1.39]]
    """
    if not isinstance(logits, jax.Array):
        logits = as_host(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be floats, not {logits.dtype}")
    _check_labels_last(logits, "logits")
    if not is_traced(logits) and not _have_a_greatest(logits):
        raise ValueError("logits hold NaN or +inf, or only -inf at a position")
    if isinstance(logits, jax.Array):
        return -jax.nn.log_softmax(logits.astype(_wide(logits.dtype)), axis=-1)
    shifted = logits.astype(np.promote_types(logits.dtype, np.float32))
    with np.errstate(over="ignore"):  # a difference beyond float32 is a label that is ruled out
        shifted = (shifted - shifted.max(-1, keepdims=True)).astype(_wide(logits.dtype))
    return as_array(np.log(np.exp(shifted).sum(-1, keepdims=True)) - shifted)


def unary_from_probabilities(probabilities: Any, floor: float = 1e-8) -> jax.Array:
    """-log P for probabilities [..., C] of any float type.

    Args:
      probabilities: non-negative; they need not sum to 1.
      floor: smaller values, zeros included, are raised to this. The default is below the smallest positive float16.

    Returns:
      [..., C] float32, or wider where the probabilities are.

    Raises:
      ValueError: probabilities that are not floats [..., C], are negative or not finite, or a floor that is not a
        normal float32 up to 1.

    >>> print(unary_from_probabilities([[0.5, 0.5, 0.0]]).round(2))
    [[ 0.69  0.69 18.42]]
    """
    if not np.finfo(np.float32).tiny <= number(floor) <= 1:
        raise ValueError(f"floor={floor!r} must be a normal float32 number above 0, up to 1")
    xp = jnp if isinstance(probabilities, jax.Array) else np
    probabilities = probabilities if xp is jnp else as_host(probabilities)
    if not jnp.issubdtype(probabilities.dtype, jnp.floating):
        raise ValueError(f"probabilities must be floats, not {probabilities.dtype}")
    _check_labels_last(probabilities, "probabilities")
    probabilities = probabilities.astype(_wide(probabilities.dtype))
    if not is_traced(probabilities) and not _are_usable(probabilities):
        raise ValueError("probabilities hold values that are negative or not finite")
    return as_array(-xp.log(xp.maximum(probabilities, floor)))


def unary_from_labels(labels: Any, num_classes: int, confidence: float = 0.7, unknown: int | None = 255) -> jax.Array:
    """A unary from labels that are correct with probability `confidence`; the other labels share the rest.

    Args:
      labels: [...] integers in 0..num_classes-1, or `unknown`.
      num_classes: C.
      confidence: probability of the given label, in (0, 1).
      unknown: the id of pixels without a label (uniform); None = no such pixels.

    Returns:
      [..., C] float32.

    Raises:
      ValueError: labels that are not integers or outside the C classes, a C that is not a whole number of at least 2,
        or a confidence outside (0, 1).

    >>> print(np.exp(-np.asarray(unary_from_labels(np.array([1, 255]), 3, confidence=0.8))).round(2))
    [[0.1  0.8  0.1 ]
     [0.33 0.33 0.33]]
    """
    xp = jnp if isinstance(labels, jax.Array) else np
    labels = labels if xp is jnp else as_host(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if isinstance(num_classes, bool) or not isinstance(num_classes, int | np.integer) or num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be a whole number, at least 2")
    if not 0 < number(confidence) < 1:
        raise ValueError(f"confidence={confidence!r} must lie between 0 and 1")
    if not is_traced(labels):
        numbers = np.asarray(labels)
        wrong = numbers[(numbers != unknown) & ((numbers < 0) | (numbers >= num_classes))]
        if wrong.size:
            hint = "" if unknown is None else f" or {unknown} (unknown)"
            raise ValueError(
                f"labels hold {int(wrong[0])}; with {num_classes} classes they are 0..{num_classes - 1}{hint}"
            )
    if labels.dtype.itemsize < 4:  # so that neither `unknown` nor a class wraps into a narrow type
        labels = labels.astype(np.int32)
    without = None if unknown is None else labels == unknown
    given, other = -math.log(confidence), -math.log((1 - confidence) / (num_classes - 1))
    believed = xp.where(labels[..., None] == np.arange(num_classes), np.float32(given), np.float32(other))
    if without is not None:
        believed = xp.where(without[..., None], np.float32(math.log(num_classes)), believed)
    return as_array(believed)


def _check_labels_last(values: Any, name: str) -> None:
    if not values.ndim or not values.shape[-1]:
        raise ValueError(f"{name} have shape {values.shape}; needed: [..., C] with at least one label")


def _wide(dtype: Any) -> np.dtype:
    """The type of a unary from values of this type: float32 or wider, as far as JAX allows."""
    return jax.dtypes.canonicalize_dtype(jnp.promote_types(dtype, jnp.float32))


@jax.ensure_compile_time_eval()
def _have_a_greatest(logits: jax.Array | np.ndarray) -> bool:
    return bool((abs(logits.max(-1)) < np.inf).all()) if logits.size else True


@jax.ensure_compile_time_eval()
def _are_usable(probabilities: jax.Array | np.ndarray) -> bool:
    return bool(((probabilities >= 0) & (probabilities < np.inf)).all())
