"""Photographs of many sizes in one program: each gives what it gives alone.

Alone, a photograph is padded to its own canvas, the next size that suits the network, and beyond it convolutions and
pools see zeros. In a program for a larger size they would see what the layers make of the padding, so it is set to zero
before each of them.
"""

import contextlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.models.layers import Conv, Pool


def kept_out(canvas: jax.Array | None, size: tuple[int, ...], extra: int) -> contextlib.AbstractContextManager:
    """Convolutions and pools called inside see zeros beyond the canvas of each image; None changes nothing.

    Args:
      canvas: [B, 2] int32, heights and widths k * output stride + extra, at most `size`.
      size: (H, W) of the images that go through the network.
      extra: the network's `Architecture.size_extra`.
    """
    if canvas is None:
        return contextlib.nullcontext()

    def intercept(call: Any, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        module = context.module
        looks_around = isinstance(module, Pool) or (isinstance(module, Conv) and module.kernel > 1)
        if context.method_name == "__call__" and looks_around:
            args = within(args[0], canvas, size, extra), *args[1:]
        return call(*args, **kwargs)

    return nn.intercept_methods(intercept)


def within(x: jax.Array, canvas: jax.Array | None, size: tuple[int, ...], extra: int) -> jax.Array:
    """A map [B, h, w, C] of images of `size`, 0 beyond the canvas of each; see `kept_out`."""
    if canvas is None:
        return x
    inside = []
    for axis, (n, m) in enumerate(zip(size, x.shape[1:3], strict=True)):
        stride = 2 ** round(np.log2(n / m))
        length = (canvas[:, axis] - extra) // stride + m - (n - extra) // stride
        inside.append(jnp.arange(m) < length[:, None])
    return jnp.where(inside[0][:, :, None, None] & inside[1][:, None, :, None], x, 0)


def scaled(canvas: jax.Array | None, size: tuple[int, ...], new: tuple[int, ...], extra: int) -> jax.Array | None:
    """The canvas when images of `size` are resized to the size `new`."""
    if canvas is None or size == new:
        return canvas
    return (canvas - extra) * (jnp.asarray(new) - extra) // (jnp.asarray(size) - extra) + extra
