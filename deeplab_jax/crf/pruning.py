"""Label pruning at inference: labels that win nowhere are left out of the filtering.

The rule: a label is kept if before the first iteration it is the likeliest of any pixel, or on average over any `RUN`
consecutive pixels, since noise of other labels may cancel in the filtering, or if its greatest marginal over all pixels
is at least `RATIO` of the greatest of all labels. The others receive no messages and are merged into one
more label, the rest, so that the kept labels have the same share of each pixel as before. The number of filtered labels
is the smallest of a few static sizes (`SIZES`) that holds the kept ones, chosen inside jit; spare places go to the next
most likely labels.

Nothing is pruned if the marginals of all iterations, a compatibility matrix, per-class weights or another update than
the parallel one are requested, if a weight is negative, so that unlikely labels gain from their absence, or where
gradients are taken.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.crf import iteration
from deeplab_jax.crf.kernels import Kernel
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import is_traced

RATIO = 0.125  # of the greatest marginal of all pixels and labels
RUN = 256  # pixels, row by row
SIZES = (3, 7, 11, 15, 23, 31, 63, 127)  # plus one for the rest, these fill the rows of vertex values


def iterate(
    negative_unary: jax.Array,
    kernels: Sequence[Kernel],
    compatibility: jax.Array | None,
    options: Options,
    mask: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    """Like `iteration.iterate`, with labels pruned; gradients are those without pruning.

    Points where `mask` [N] is False do not influence which labels are kept.
    """

    def whole(negative_unary: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, jax.Array | None]:
        return iteration.iterate(negative_unary, kernels, compatibility, options)

    labels = negative_unary.shape[1]
    sizes = [size for size in SIZES if size < labels]
    plain = all(np.ndim(kernel.weight) == 0 for kernel in kernels) and compatibility is None
    none = not is_traced(options.iterations) and options.iterations == 0
    # Other updates return log q, in which the merged labels have another share than their unary says.
    if not kernels or not plain or not sizes or options.return_all or none or options.update != "parallel":
        return whole(negative_unary, kernels)

    @jax.custom_vjp
    def pruned(negative_unary: jax.Array, kernels: Sequence[Kernel]) -> jax.Array:
        reached, kept = candidates(negative_unary, mask)
        order = jnp.argsort(-(reached + kept))
        attract = jnp.all(jnp.stack([jnp.asarray(kernel.weight) >= 0 for kernel in kernels]))
        needed = jnp.where(attract, kept.sum(), labels)

        def with_size(size: int) -> jax.Array:
            chosen = jnp.sort(order[:size])
            column = jnp.full(labels, size).at[chosen].set(jnp.arange(size))
            dropped = (column == size)[None]
            rest = jax.nn.logsumexp(jnp.where(dropped, negative_unary, -jnp.inf), axis=1, keepdims=True)
            heard = jnp.arange(size + 1) < size
            hearing = [
                dataclasses.replace(kernel, weight=jnp.where(heard, jnp.asarray(kernel.weight), 0))
                for kernel in kernels
            ]
            start = jnp.concatenate([negative_unary[:, chosen], rest], axis=1)
            logits, _ = iteration.iterate(start, hearing, None, options)
            return jnp.where(dropped, negative_unary, logits[:, column])

        branches = [lambda size=size: with_size(size) for size in sizes] + [lambda: whole(negative_unary, kernels)[0]]
        return lax.switch(jnp.searchsorted(jnp.asarray(sizes), needed), branches)

    def forward(negative_unary: jax.Array, kernels: Sequence[Kernel]) -> tuple[jax.Array, Any]:
        logits, pull = jax.vjp(lambda *x: whole(*x)[0], negative_unary, kernels)
        return logits, pull

    pruned.defvjp(forward, lambda pull, gradient: pull(gradient))
    return pruned(negative_unary, list(kernels)), None


def reached(q: np.ndarray, logits: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """For marginals and logits [C, N] on the host, whether each label wins somewhere, and its greatest marginal; [C].

    Points where `valid` [N] is 0 do not count.
    """
    wins = logits >= logits.max(axis=0)
    if valid is not None:
        q, wins = q[:, valid > 0], wins[:, valid > 0]
    won = wins.any(axis=1)
    if q.shape[1]:
        won[np.add.reduceat(q, range(0, q.shape[1], RUN), axis=1).argmax(axis=0)] = True
    return won, q.max(axis=1, initial=0)


def kept(wins: np.ndarray, greatest: np.ndarray) -> np.ndarray:
    """Which labels are kept, bool [C], from what `reached` found."""
    return wins | (greatest >= RATIO * greatest.max())


def candidates(logits: jax.Array, mask: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """For each label of logits [N, C], its greatest marginal over the pixels, and whether it is kept; both [C]."""
    q = jax.nn.softmax(logits, axis=1)
    wins = logits >= logits.max(axis=1, keepdims=True)
    if mask is not None:
        q, wins = jnp.where(mask[:, None], q, 0), wins & mask[:, None]
    reached = q.max(axis=0)
    runs = jnp.pad(q, ((0, -len(q) % RUN), (0, 0))).reshape(-1, RUN, q.shape[1]).sum(axis=1)
    most = runs.max(axis=1, keepdims=True)  # 0 where all pixels of a run are masked
    wins = wins.any(axis=0) | ((runs == most) & (most > 0)).any(axis=0)
    return reached, wins | (reached >= RATIO * reached.max())
