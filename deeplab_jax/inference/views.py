"""A network's scores of several views of the same images, test-time scales and mirror images, averaged."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.imaging.mirror import swap_table
from deeplab_jax.inference.tiling import STRIDE
from deeplab_jax.models.layers import resize_bilinear

LOG_FLOOR = -30.0  # lower limit of log-probabilities: exp(-30) is negligible, and sums stay finite


@partial(jax.jit, static_argnames=("model", "scales", "mirror", "swaps", "extra", "resize", "multiple"))
def network_scores(
    model,
    variables: dict,
    images: jax.Array,
    sizes: jax.Array,
    light: jax.Array | None = None,
    *,
    scales: tuple[float, ...],
    mirror: bool,
    swaps: tuple[tuple[int, int], ...] = (),
    extra: int = 1,
    resize: str = "corners",
    multiple: int | None = None,
) -> tuple[jax.Array, ...]:
    """Log-probabilities at the padded size, averaged over scales and mirroring.

    Args:
      images: [B, H, W, 3] uint8, padded with the border's own colours, so that resizing blends in no other colour.
      sizes: [B, 2] int32, the size of each photograph within the padding.
      light: [1, 2] of the photograph that the images are tiles of, for networks that take each image's own light.
      scales: see `Segmenter`.
      mirror: whether to average with the mirrored images.
      swaps: pairs of classes that are exchanged in the mirrored images.
      extra: the excess of sizes over a multiple of the output stride, at every scale.
      resize: "corners" or "half_pixel".
      multiple: each photograph gets the scores that it would have if `images` were only padded to the next multiple of
        this plus `extra`; None = those of `images` as they are, for models that do not take a `canvas`.

    Returns:
      B arrays [H, W, C] float32.
    """
    size = images.shape[1:3]
    y, x = jnp.arange(size[0]), jnp.arange(size[1])
    valid = (y < sizes[:, :1])[:, :, None] & (x < sizes[:, 1:])[:, None, :]
    images = images.astype(jnp.float32)
    # Column of the mirrored photograph; its padding stays at the right, in the color of its own border.
    flipped = jnp.maximum(sizes[:, 1:] - 1 - x, 0)

    count = images.shape[0]
    canvas = None
    if multiple is not None:
        canvas = jnp.minimum(jnp.maximum(-((extra - sizes) // multiple), 1) * multiple + extra, jnp.asarray(size))
    if mirror:  # in one batch with the images, for half the program
        images = jnp.concatenate([images, jnp.take_along_axis(images, flipped[:, None, :, None], axis=2)])
        valid = jnp.concatenate([valid, valid])
        canvas = None if canvas is None else jnp.concatenate([canvas, canvas])
    views = []
    given = {} if light is None else {"light": light}
    for scale in scales:
        target = tuple(round((n - extra) * scale / STRIDE) * STRIDE + extra for n in size)
        if canvas is not None:
            given["canvas"] = jnp.round((canvas - extra) * scale / STRIDE).astype(jnp.int32) * STRIDE + extra
        scaled, inside = images, valid
        if target != size:
            scaled = resize_bilinear(images, target, resize)
            rows, columns = (_nearest(n, m, resize) for n, m in zip(size, target))
            inside = valid[:, rows][:, :, columns]
        logits, _ = model.apply(variables, scaled, train=False, valid=inside, **given)
        log_probs = jax.nn.log_softmax(resize_bilinear(logits.astype(jnp.float32), size, resize))
        views.append(log_probs[:count])
        if mirror:
            turned = jnp.take_along_axis(log_probs[count:], flipped[:, None, :, None], axis=2)
            views.append(turned[..., swap_table(swaps)[: turned.shape[-1]]] if swaps else turned)
    mean = views[0] if len(views) == 1 else jax.nn.logsumexp(jnp.stack(views), axis=0) - jnp.log(len(views))
    mean = jnp.where(mean < LOG_FLOOR, LOG_FLOOR, mean)  # a maximum loses NaN on CPUs, and the error with it
    return tuple(mean[i] for i in range(count))


def _nearest(n: int, m: int, resize: str) -> np.ndarray:
    """The nearest of n positions for each of m resized ones: [m] int."""
    if resize == "corners":
        return np.round(np.linspace(0, n - 1, m)).astype(int)
    return ((2 * np.arange(m) + 1) * n) // (2 * m)
