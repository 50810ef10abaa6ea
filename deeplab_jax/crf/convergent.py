"""Mean-field updates that never raise the free energy (Kraehenbuhl and Koltun 2013, section 3).

The plain update changes all pixels at once and can oscillate. The free energy of Q is

    F(Q) = sum_i q_i.U_i + q_i.log q_i - 1/2 sum_ij q_i^T M_ij q_j,      M_ij = sum_m k_m(i, j) A_m,

with A_m = w_m for Potts (a number times the identity) and -mu w_m in general. Whatever keeps M from being positive
semi-definite (a compatibility that is not negative semi-definite, or i = j left out) is balanced by a diagonal
d_i >= 0: -1/2 Q^T (M + D) Q is concave and replaced by its tangent at the current Q, 1/2 Q^T D Q is convex and kept.
The rest separates into one strictly convex problem per pixel, min_q q.log q + d/2 |q|^2 - q.h over the simplex with
h = -U + (M + D) Q. Where M is already positive semi-definite, d = 0 and the update is the plain one.

The argument requires the kernels themselves to be positive semi-definite, as the Gaussian is: it holds for the `exact`
filter and, as far as the others resemble it, for them.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.crf.kernels import Kernel
from deeplab_jax.crf.params import Array, Value, is_traced

NEWTON_STEPS = 16  # 12 reach float64 precision for d up to 3e4, 16 up to 1e6


def affinity(weight: Value, compatibility: Array | None, labels: int, dtype: jnp.dtype) -> jax.Array:
    """A = -mu w [C, C] of one kernel (w alone for Potts): how much label l' elsewhere supports label l here."""
    weight = jnp.asarray(weight, dtype)
    matrix = weight if weight.ndim == 2 else jnp.broadcast_to(weight, (labels,)) * jnp.eye(labels, dtype=dtype)
    if compatibility is None:
        return matrix
    return -jnp.matmul(jnp.asarray(compatibility, dtype), matrix, precision=lax.Precision.HIGHEST)


def check_affinities(weights: Sequence[Value], compatibility: Array | None, labels: int, what: str) -> None:
    """Raises ValueError where a concrete weight and compatibility make an asymmetric affinity, which has no energy."""
    for weight in weights:
        if is_traced((weight, compatibility)):
            continue
        with jax.ensure_compile_time_eval():
            matrix = np.asarray(affinity(weight, compatibility, labels, jnp.float32))
        if not np.allclose(matrix, matrix.T, atol=1e-5 * max(1.0, np.abs(matrix).max())):
            raise ValueError(
                f"compatibility and kernel weights together are not symmetric in the labels, so that {what} has no "
                "energy to lower; give a symmetric compatibility, and per-class weights only with Potts"
            )


def curvature(kernels: Sequence[Kernel], compatibility: jax.Array | None, labels: int) -> jax.Array:
    """d [N, 1]: how much must be added to M's diagonal to make it positive semi-definite on the simplex."""
    total = jnp.zeros_like(kernels[0].sums) if kernels else jnp.zeros((1, 1))
    centre = jnp.eye(labels, dtype=total.dtype) - 1 / labels
    for kernel in kernels:
        matrix = affinity(kernel.weight, compatibility, labels, total.dtype)
        values = jnp.linalg.eigvalsh(centre @ (0.5 * (matrix + matrix.T)) @ centre)
        scale = kernel.before * kernel.after
        # diag(sums) - F is a graph Laplacian, so F <= diag(sums); and F is positive semi-definite.
        total += jnp.maximum(-values[0], 0) * scale * kernel.sums
        if not kernel.include_self:
            total += jnp.maximum(values[-1], 0) * scale
    return total


def solve(h: jax.Array, d: jax.Array) -> jax.Array:
    """log q of the minimizer of q.log q + d/2 |q|^2 - q.h over the simplex.

    It satisfies p + d exp(p) = h - lambda for p = log q, with lambda such that q sums to 1.

    Args:
      h: [N, C].
      d: [N, 1], at least 0.

    Returns:
      p [N, C], normalized.
    """
    h = h - h.max(-1, keepdims=True)
    p, shift = lax.stop_gradient(_root(h, d))
    # One Newton step of both equations together, whose derivative is that of their solution.
    q = jnp.exp(p)
    own = q / (1 + d * q)
    residual = p + d * q + shift - h
    step = (q.sum(-1, keepdims=True) - 1 - (own * residual).sum(-1, keepdims=True)) / own.sum(-1, keepdims=True)
    return jax.nn.log_softmax(p - (residual + step) / (1 + d * q), axis=-1)


def _root(h: jax.Array, d: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(p, lambda) of `solve`, for h of which the greatest is 0: Newton's steps, halving if one leaves the bracket."""
    labels = h.shape[-1]
    log_d = jnp.log(jnp.maximum(d, jnp.finfo(h.dtype).tiny))

    def log_q(shift: jax.Array) -> tuple[jax.Array, jax.Array]:
        """p, and w = d q, which solves w + log w = h - lambda + log d."""
        w = _omega(jnp.maximum(h - shift + log_d, -80))  # there d q no longer counts
        return jnp.where(w > 1, jnp.log(w) - log_d, h - shift - w), w

    def newton(_: int, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        shift, low, high = state
        p, w = log_q(shift)
        q = jnp.exp(p)
        total = q.sum(-1, keepdims=True)
        low, high = jnp.where(total > 1, shift, low), jnp.where(total > 1, high, shift)
        shift += jnp.log(total) * total / (q / (1 + w)).sum(-1, keepdims=True)
        return jnp.where((shift >= low) & (shift <= high), shift, 0.5 * (low + high)), low, high

    # The greatest q is 1 at one end, where the sum is too large, and 1/C at the other one.
    low, high = -d * jnp.ones_like(h[:, :1]), math.log(labels) - d / labels * jnp.ones_like(h[:, :1])
    shift, _, _ = lax.fori_loop(0, NEWTON_STEPS, newton, (low, low, high))
    return log_q(shift)[0], shift


def _omega(z: jax.Array) -> jax.Array:
    """w with w + log w = z (Wright's omega function), by steps of fourth order (Fritsch, Shafer and Crowley 1973)."""
    w = jax.nn.softplus(z)
    for _ in range(3):
        r = z - w - jnp.log(w)
        both = 2 * (1 + w) * (1 + w + r * (2 / 3))
        w *= 1 + r / (1 + w) * (both - r) / (both - 2 * r)
    return w
