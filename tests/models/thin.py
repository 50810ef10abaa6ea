"""The published networks with few channels and blocks: the same geometry, seconds instead of minutes."""

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.models import resnet, vgg


def narrow(monkeypatch):
    """Replaces the tables of widths and depths for one test."""
    monkeypatch.setattr(resnet, "BOTTLENECKS", {"resnet50": (1, 1, 2, 2), "resnet101": (1, 1, 2, 2)})
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", (8, 8, 12, 12))
    monkeypatch.setattr(resnet, "STEM_WIDTH", 4)
    monkeypatch.setattr(vgg, "WIDTHS", (2, 2, 2, 2, 2))


def shapes(model, size=(33, 33)):
    """The shapes of a network's variables; nothing is computed."""
    image = jnp.zeros((1, *size, 3))
    return jax.eval_shape(lambda key: model.init(key, image), jax.random.key(0))


def variables(model, size=(33, 33), positive=False):
    """Random variables in which biases and statistics matter; drawn by NumPy, as compiling `init` takes seconds."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        if path[-1].key == "kernel":
            value = noise * np.sqrt(2 / np.prod(leaf.shape[:-1]))
        elif path[-1].key in ("var", "scale"):
            value = 1 + 0.3 * abs(noise)
        else:
            value = 0.3 * noise
        return jnp.asarray(abs(value) if positive else value)

    return jax.tree_util.tree_map_with_path(draw, shapes(model, size))


def assert_close(actual, desired, tolerance=1e-4):
    """Equal to a share of the largest value: sums of many terms leave absolute errors where they cancel."""
    np.testing.assert_allclose(actual, desired, rtol=0, atol=tolerance * float(np.abs(desired).max()))
