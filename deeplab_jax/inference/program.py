"""The function in an artifact and a SavedModel: a photograph in, marginals out."""

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deeplab_jax.crf.adjustable import exact_radius, mean_field_any
from deeplab_jax.crf.params import MAX_ITERATIONS
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.inference.views import network_scores


def flat_weights(segmenter: Segmenter) -> dict[str, np.ndarray]:
    """The network's variables as {"params/backbone/conv1/kernel": array, ...}."""
    return {name: np.asarray(leaf) for name, leaf in flatten_dict(segmenter.variables, sep="/").items()}


def program(segmenter: Segmenter, bilateral: str):
    """The function that is exported: (weights, image, size, iterations) -> marginals [H, W, C] float32."""

    def marginals(weights: dict, image: jax.Array, size: jax.Array, iterations: jax.Array) -> jax.Array:
        (log_probs,) = network_scores(
            segmenter.model,
            unflatten_dict(weights, sep="/"),
            image[None],
            size[None],
            scales=segmenter.scales,
            mirror=segmenter.mirror,
            swaps=segmenter.mirror_swaps if segmenter.mirror else (),
            extra=segmenter.size_extra,
            resize=segmenter.resize,
            multiple=segmenter.canvas_multiple,
        )
        y, x = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])
        return mean_field_any(
            -log_probs,
            image,
            segmenter.setting.params,
            jnp.minimum(iterations, MAX_ITERATIONS),  # bounded for any caller
            (y < size[0]) & (x < size[1]),
            None if segmenter.compatibility is None else jnp.asarray(segmenter.compatibility),
            bilateral=bilateral,
            normalization=segmenter.setting.normalization,
            radius=exact_radius(segmenter.setting.params),
        )

    return marginals
