"""Learning one weight per kernel and class on held-out images, by gradient descent through the mean field."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deeplab_jax.crf.kernels import choose_bilateral
from deeplab_jax.crf.mean_field import mean_field
from deeplab_jax.crf.params import WEIGHT_FIELDS
from deeplab_jax.search.grid import Candidate
from deeplab_jax.search.scores import ScoreStore, padded, shared_shapes

LEARNING_RATE = 0.1  # of Adam, at the start; falls to 0 as a cosine
ITERATIONS = 5  # of the mean field while learning (Zheng et al. 2015, section 6)
STRIDE = 2  # learning uses every other row and column


def learn_weights(
    store: ScoreStore,
    start: Candidate,
    *,
    passes: int,
    bilateral: str = "auto",
    size_multiple: int = 32,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> Candidate:
    """The non-negative weights with which the marginals make the labels most likely; the widths are unchanged.

    Thin classes lose by smoothing that helps large ones; with separate weights both can gain. The mean negative
    log-likelihood of the valid pixels is minimized, image by image, in an order drawn from `seed`.

    Args:
      store: the network's scores of the images.
      start: the initial weights; its widths and normalization are kept.
      passes: over the images, at least 1.
      bilateral: the filter, as in `mean_field`.
      size_multiple: images are padded to a multiple of this plus one, so that few shapes are compiled.
      seed: of the order.
      say: called with a line per pass.

    Returns:
      `start` with a tuple of C numbers for each of its two weights.

    Raises:
      UserError: an image can no longer be read.
    """
    classes = store[0][0].shape[-1]
    weights = {name: jnp.full(classes, jnp.float32(getattr(start.params, name))) for name in WEIGHT_FIELDS}
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, passes * len(store)))
    state = optimizer.init(weights)
    order = np.random.default_rng(seed)
    shape = shared_shapes(store, size_multiple)
    for number in range(passes):
        losses = []
        for i in order.permutation(len(store)):
            log_probs, image, label = store[i]
            whole = padded(log_probs, image, label, shape(label.shape))
            example = [x[::STRIDE, ::STRIDE] for x in whole]
            filter_name = choose_bilateral(bilateral, example[0].shape[0], example[0].shape[1])
            loss, gradient = _loss_and_gradient(weights, *example, start=start, bilateral=filter_name)
            updates, state = optimizer.update(gradient, state)
            weights = jax.tree.map(lambda w: jnp.maximum(w, 0), optax.apply_updates(weights, updates))
            losses.append(loss)
        say(f"weights per class: pass {number + 1} of {passes}, loss {np.mean(losses):.4f}")
    learned = {name: _numbers(values) for name, values in weights.items()}
    return with_weights(start, learned)


@partial(jax.jit, static_argnames=("start", "bilateral"))
def _loss_and_gradient(
    weights: dict[str, jax.Array],
    unary: jax.Array,
    image: jax.Array,
    label: jax.Array,
    mask: jax.Array,
    *,
    start: Candidate,
    bilateral: str,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    def loss(weights: dict[str, jax.Array]) -> jax.Array:
        params = dataclasses.replace(start.params, **weights).at_stride(STRIDE)
        log_q = mean_field(
            unary,
            image,
            params,
            ITERATIONS,
            bilateral=bilateral,
            normalization=start.normalization,
            mask=mask,
            return_log=True,
        )
        valid = (label < unary.shape[-1]) & mask
        likelihood = jnp.take_along_axis(log_q, jnp.where(valid, label, 0)[..., None].astype(jnp.int32), -1)[..., 0]
        return -jnp.where(valid, likelihood, 0).sum() / jnp.maximum(valid.sum(), 1)

    return jax.value_and_grad(loss)(weights)


def with_weights(start: Candidate, weights: Mapping[str, tuple[float, ...]]) -> Candidate:
    """`start` with weights per class instead of the factor for thin classes."""
    bilateral, gaussian = (tuple(weights[name]) for name in WEIGHT_FIELDS)
    return start._replace(bilateral_weight=bilateral, gaussian_weight=gaussian, thin_factor=1.0, thin=())


def _numbers(values: jax.Array) -> tuple[float, ...]:
    return tuple(round(float(v), 4) for v in values)
