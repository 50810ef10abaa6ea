"""Regularized Frank-Wolfe inference (Le-Huu and Alahari, NeurIPS 2021), of which mean field is a case.

The relaxed energy of marginals Q is quadratic, E(Q) = sum_i q_i.U_i - 1/2 sum_ij q_i^T M_ij q_j with M as in
`convergent`; at labellings it is the CRF's energy up to a constant. Each iteration minimizes its tangent at Q plus a
regularizer, pixel by pixel, and moves towards the minimizer P:

    P = argmin_P dE(Q).P + t R(P),    Q <- Q + a (P - Q),    0 <= a <= 1.

- "entropy", R = sum_i p_i.log p_i: P is the softmax of -dE / t. With t = 1 and a = 1 that is the parallel update.
- "euclidean", R = 1/2 sum_i |p_i|^2: P is the projection of -dE / t onto the simplex; marginals become exactly 0 and 1.

The step a minimizes E(Q + a (P - Q)) + t ((1 - a) R(Q) + a R(P)), an upper bound that is quadratic in a, over the whole
image. So E + t R never rises (as far as the filter is symmetric), also where the parallel update oscillates. What the
kernels send is linear in Q, so that the step needs no filtering beside that of P: T + 1 in all for T iterations.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.crf.kernels import Kernel, attraction
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import IMPOSSIBLE, is_traced

REGULARIZERS = ("entropy", "euclidean")
_SMALLEST = 1e-30  # of a marginal where its logarithm is multiplied


def iterate(
    negative_unary: jax.Array, kernels: Sequence[Kernel], compatibility: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """T steps from softmax(-U); arguments and results as in `iteration.iterate`.

    Differentiable, through the step's length too.
    """
    dtype = negative_unary.dtype
    strength = jnp.asarray(options.regularization, dtype)
    store = options.storage_dtype or dtype

    def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, received = state[0].astype(dtype), state[1]
        descent = negative_unary + received  # -dE(Q)
        p = minimizer(descent, strength, options.regularizer)
        towards, change = p - q, attraction(p, kernels, compatibility) - received
        gain = _gain(descent, q, p, strength, options.regularizer)
        curvature = -(change * towards).sum()
        # Where the bound is concave or its minimum lies beyond P, the step goes all the way.
        short = curvature > jnp.maximum(gain, 0)
        length = jnp.where(short, jnp.maximum(gain, 0) / jnp.where(short, curvature, 1), 1)
        return (q + length * towards).astype(store), received + length * change

    first = jax.nn.softmax(negative_unary, axis=-1)
    state = first.astype(store), attraction(first, kernels, compatibility)
    if is_traced(options.iterations):
        return _logits(lax.fori_loop(0, options.iterations, lambda _, s: step(s), state)[0].astype(dtype)), None

    def body(state: tuple, _: None) -> tuple[tuple, jax.Array | None]:
        state = step(state)
        return state, _logits(state[0].astype(dtype)) if options.return_all else None

    state, history = lax.scan(body, state, length=int(options.iterations))
    if history is not None:
        history = jnp.concatenate([negative_unary[None], history])
    return (_logits(state[0].astype(dtype)) if options.iterations else negative_unary), history


def minimizer(descent: jax.Array, strength: jax.Array | float, regularizer: str) -> jax.Array:
    """The P in the simplex that minimizes -descent.P + strength R(P), per point; descent [N, C], P [N, C]."""
    if regularizer == "entropy":
        return jax.nn.softmax(_divided(descent, strength), axis=-1)
    return project(_divided(descent, strength))


def _divided(descent: jax.Array, strength: jax.Array | float) -> jax.Array:
    """Scores over the regularizer's weight; ruled-out labels stay finite."""
    return jnp.maximum((descent - descent.max(-1, keepdims=True)) / strength, IMPOSSIBLE)


def project(values: jax.Array) -> jax.Array:
    """The nearest points of the simplex to values [N, C], and their gradient: max(v - level, 0) that sums to 1.

    The level rises by Newton steps on that sum, which end at the exact one after at most C of them (Michelot 1986).
    """
    values = values - values.max(-1, keepdims=True)
    fixed = lax.stop_gradient(values)

    def level_of(values: jax.Array, inside: jax.Array) -> jax.Array:
        total = jnp.where(inside, values, 0).sum(-1, keepdims=True)
        return (total - 1) / jnp.maximum(inside.sum(-1, keepdims=True), 1)

    def shrink(state: tuple) -> tuple:
        inside, _ = state
        smaller = inside & (fixed > level_of(fixed, inside))
        return smaller, (smaller != inside).any()

    # A value of at least 1 below the largest is outside whatever the others are.
    start = fixed > -1
    inside, _ = lax.while_loop(lambda state: state[1], shrink, (start, jnp.asarray(True)))
    p = jnp.where(inside, jnp.maximum(values - level_of(values, inside), 0), 0)
    return p / p.sum(-1, keepdims=True)  # rounding


def _gain(descent: jax.Array, q: jax.Array, p: jax.Array, strength: jax.Array, regularizer: str) -> jax.Array:
    """How fast the bound falls from Q towards its minimizer P: descent.(P - Q) - strength (R(P) - R(Q)), at least 0.

    Summed from terms that vanish with P - Q: a difference of sums over the image would be noise near the end.
    """
    if regularizer == "entropy":  # strength times the KL divergence of Q from P
        log_p = jax.nn.log_softmax(_divided(descent, strength), axis=-1)
        log_q = jnp.log(jnp.maximum(q, _SMALLEST))
        return strength * (p - q + jnp.where(q > 0, q * (log_q - log_p), 0)).sum()
    return ((descent - 0.5 * strength * (p + q)) * (p - q)).sum()


def _logits(q: jax.Array) -> jax.Array:
    """log q, of which the softmax is q, zeros included."""
    return jnp.where(q > 0, jnp.log(jnp.where(q > 0, q, 1)), IMPOSSIBLE)
