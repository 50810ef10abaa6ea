"""The updates of mean field, over any points and kernels (Kraehenbuhl and Koltun 2011, Algorithm 1)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from deeplab_jax.crf import convergent, frank_wolfe, incremental
from deeplab_jax.crf.filters import Turn
from deeplab_jax.crf.kernels import Kernel, attraction
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import is_traced


def iterate(
    negative_unary: jax.Array, kernels: Sequence[Kernel], compatibility: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """T updates from softmax(-U).

    Args:
      negative_unary: [N, C].
      kernels: over the same N points.
      compatibility: [C, C] or None for Potts.
      options: `iterations`, `update` and its regularizer, `return_all` and `storage_dtype` are used.

    Returns:
      The logits of the marginals [N, C], and those of all iterations [T + 1, N, C] if asked for, else None.
    """
    if incremental.covers(kernels, options) and (is_traced(options.iterations) or options.iterations > 0):
        return _iterate_incrementally(negative_unary, list(kernels), compatibility, options)
    if options.update == "frank_wolfe":
        return frank_wolfe.iterate(negative_unary, kernels, compatibility, options)
    return _iterate_anew(negative_unary, kernels, compatibility, options)


def _iterate_incrementally(
    negative_unary: jax.Array, kernels: list[Kernel], compatibility: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """The result of `incremental.iterate`; gradients are those of the same updates with every message recomputed."""

    @jax.custom_vjp
    @sequential_vmap  # images take their turns, as in a batch: see `traced_lattice.build`
    def run(iterations: int | jax.Array, *differentiable: Any) -> tuple[jax.Array, jax.Array | None]:
        count = options.iterations if options.return_all else iterations
        unary, filters, mu = differentiable
        return incremental.iterate(unary, filters, mu, count, options.return_all)

    def forward(iterations: int | jax.Array, *differentiable: Any) -> tuple[tuple[jax.Array, jax.Array | None], Any]:
        anew = dataclasses.replace(
            options, iterations=iterations if is_traced(options.iterations) else options.iterations
        )
        return jax.vjp(lambda unary, filters, mu: _iterate_anew(unary, filters, mu, anew), *differentiable)

    run.defvjp(forward, lambda pull, gradient: (None, *pull(gradient)))
    return run(options.iterations, negative_unary, kernels, compatibility)


def _iterate_anew(
    negative_unary: jax.Array, kernels: Sequence[Kernel], compatibility: jax.Array | None, options: Options
) -> tuple[jax.Array, jax.Array | None]:
    """Like `iterate`; every message is recomputed."""
    step = update_function(negative_unary, kernels, compatibility, options)
    store = options.storage_dtype or negative_unary.dtype
    in_turn = incremental.covers(kernels, options)

    def body(q: jax.Array, n: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        q = q.astype(negative_unary.dtype)
        logits = step(q, n if in_turn else None)
        shown = (step(q, None) if in_turn else logits) if options.return_all else None
        return jax.nn.softmax(logits, axis=-1).astype(store), shown

    if is_traced(options.iterations):  # one program for any number of iterations; without a history
        times = options.iterations - 1 if in_turn else options.iterations
        one = lambda n, x: step(jax.nn.softmax(x, axis=-1), n if in_turn else None)  # noqa: E731
        logits = lax.fori_loop(0, times, one, negative_unary)
        if in_turn:
            logits = lax.cond(times >= 0, lambda x: one(None, x), lambda x: x, logits)
        return logits, None
    if options.iterations == 0:
        return negative_unary, negative_unary[None] if options.return_all else None
    times = int(options.iterations) - 1
    q, history = lax.scan(body, jax.nn.softmax(negative_unary, axis=-1).astype(store), jnp.arange(times))
    logits = step(q.astype(negative_unary.dtype), None)
    if history is not None:
        history = jnp.concatenate([negative_unary[None], history, logits[None]])
    return logits, history


def update_function(
    negative_unary: jax.Array, kernels: Sequence[Kernel], compatibility: jax.Array | None, options: Options
) -> Callable[[jax.Array, Turn], jax.Array]:
    """The function from marginals q [N, C] and a turn (see `filters.apply`) to the logits of the next ones."""

    def parallel(q: jax.Array, turn: Turn) -> jax.Array:
        return negative_unary + attraction(q, kernels, compatibility, turn)

    if options.update == "parallel":
        return parallel
    curvature = convergent.curvature(kernels, compatibility, negative_unary.shape[-1])
    return lambda q, turn: convergent.solve(parallel(q, turn) + curvature * q, curvature)
