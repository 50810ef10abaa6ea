"""The layers that all networks share: convolution, batch normalization, Caffe's pools, resize, dropout."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError
from jax import lax

from deeplab_jax.models.cpu import convolution, sums
from deeplab_jax.models.initial import ONES, ZEROS, Constant, Normal, is_planning

# The released ResNets' batch norm; torchvision's is the same.
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.9

classifier_init = Normal(0.01)  # v1 section 5: N(0, 0.01)
conv_init = Normal()


def parameter(
    module: nn.Module, name: str, initializer: nn.initializers.Initializer, shape: tuple[int, ...]
) -> jax.Array:
    """`module.param`, float32, for a module that runs often.

    Where the parameter exists, Flax traces its initializer at each call, to compare shapes; that is a quarter of
    the time of tracing a network.
    """
    if not module.has_variable("params", name):
        if isinstance(initializer, Normal | Constant) and is_planning():  # nothing needs the key that Flax would derive
            planned = initializer(None, shape)
            module.put_variable("params", name, planned)
            return planned.unbox()
        return module.param(name, initializer, shape, jnp.float32)
    value: jax.Array = module.get_variable("params", name)
    if value.shape != shape:
        raise ScopeParamShapeError(name, "/" + "/".join(module.path), value.shape, shape)
    return value


class Conv(nn.Module):
    """A convolution with explicit stride and atrous rate, centered padding of `rate * (kernel - 1)` in total.

    Parameters: `kernel` [k, k, C_in, features] and, if `use_bias`, `bias` [features], float32. With stride 1 the map
    keeps its size; with stride s the result equals `[::s, ::s]` of the stride-1 result.

    Attributes:
      features: output channels.
      kernel: side of the square kernel.
      stride: step between outputs.
      rate: atrous rate, the step between kernel taps.
      use_bias: whether a bias is added.
      dtype: type of the computation.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    rate: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32
    kernel_init: nn.initializers.Initializer = conv_init

    @nn.compact
    def __call__(self, x: jax.Array, factor: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), features]; `factor` [features] scales the kernel."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        weights = parameter(self, "kernel", self.kernel_init, shape)
        if factor is not None:
            weights = weights * factor
        y = convolution.conv(x.astype(self.dtype), weights.astype(self.dtype), self.stride, self.rate)
        if self.use_bias:
            y = y + parameter(self, "bias", ZEROS, (self.features,)).astype(self.dtype)
        return y

    def shape(self, x: jax.Array) -> tuple[int, ...]:
        """Shape of the result for x."""
        batch, *size, _ = x.shape
        return batch, *(-(-n // self.stride) for n in size), self.features


class ConvWeights(nn.Module):
    """The parameters of a `Conv` with bias, for layers that are computed together with others.

    Attributes:
      features: output channels.
      kernel: side of the square kernel.
      rate: atrous rate.
    """

    features: int
    kernel: int
    rate: int
    kernel_init: nn.initializers.Initializer = conv_init

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[B, H, W, C], of which only C is used -> kernel [k, k, C, features], bias [features], float32."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = parameter(self, "kernel", self.kernel_init, shape)
        return kernel, parameter(self, "bias", ZEROS, (self.features,))


class BatchNorm(nn.Module):
    """Batch normalization of a convolution's result: frozen, as the papers fine-tune it, or trained over all devices.

    Frozen: stored statistics and stored affine, both constants for the gradient. Trained: the statistics are those of
    the batch over all devices of `axis_name`, and evaluation uses their running averages.

    Stored statistics scale the kernel instead of the map, which is equivalent and needs no pass over the map, neither
    forward nor in the gradient.

    Attributes:
      frozen: whether statistics and affine are constants.
      axis_name: the mapped axis over which statistics are averaged, if any.
      dtype: type of the result; statistics are always float32.
    """

    frozen: bool
    axis_name: str | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, conv: Conv, x: jax.Array, train: bool) -> jax.Array:
        """conv(x), normalized: [B, H, W, C] -> the shape of the result of `conv`, which has no bias."""
        channels = (conv.features,)
        scale = parameter(self, "scale", ONES, channels)
        bias = parameter(self, "bias", ZEROS, channels)
        mean = self.variable("batch_stats", "mean", ZEROS, None, channels, jnp.float32)
        var = self.variable("batch_stats", "var", ONES, None, channels, jnp.float32)
        if self.frozen or not train:
            factor, offset = (_frozen_affine if self.frozen else _affine)(scale, bias, mean.value, var.value)
            return conv(x, factor) + offset.astype(self.dtype)
        y = conv(x).astype(jnp.float32)
        m, v = self._batch_statistics(y)
        if not self.is_initializing():
            mean.value = BATCH_NORM_MOMENTUM * mean.value + (1 - BATCH_NORM_MOMENTUM) * m
            var.value = BATCH_NORM_MOMENTUM * var.value + (1 - BATCH_NORM_MOMENTUM) * v
        return sums.affine(y, *_affine(scale, bias, m, v)).astype(self.dtype)

    def _batch_statistics(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        mean, square = sums.moments(x.astype(jnp.float32))
        if self.axis_name is not None and not self.is_initializing():
            # Every device holds the same number of positions, so the mean of means is the mean.
            mean, square = lax.pmean((mean, square), self.axis_name)
        return mean, jnp.maximum(square - jnp.square(mean), 0.0)


@jax.jit
def _affine(scale: jax.Array, bias: jax.Array, mean: jax.Array, var: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The factor and the offset that are equivalent to normalization, [C] each."""
    factor = scale * lax.rsqrt(var + BATCH_NORM_EPSILON)
    return factor, bias - mean * factor


@jax.jit
def _frozen_affine(*stored: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_affine`, a constant for the gradient."""
    return _affine(*lax.stop_gradient(stored))


@jax.jit
def relu(x: jax.Array) -> jax.Array:
    """max(x, 0), whose gradient uses the result, which is kept anyway, and not x, which would be recomputed.

    It is a select, not a maximum, because XLA copies a maximum into each of its consumers, and with it, block by
    block, the sums of a whole chain of residual blocks. NaN stays NaN.
    """
    return _relu(x)


@jax.custom_vjp
def _relu(x: jax.Array) -> jax.Array:
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _relu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y = _relu(x)
    return y, y


def _relu_backward(y: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(y > 0, dy, jnp.zeros_like(dy)),)


_relu.defvjp(_relu_forward, _relu_backward)


class Pool(nn.Module):
    """Caffe's pooling: sizes round up, padding is never the maximum, an average counts the padding that it covers.

    Attributes:
      window: side of the window.
      stride: step between windows.
      pad: padding on each side.
      kind: "max" or "average".
      ceil: whether to round the output size up, as Caffe does. False gives `[::stride, ::stride]` of the stride-1 pool,
        for pools that are strided only at output stride 16 or 32.
    """

    window: int
    stride: int
    pad: int = 0
    kind: str = "max"
    ceil: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, H, W, C] -> [B, h, w, C] with h, w by `pooled_size`."""
        return (max_pool if self.kind == "max" else average_pool)(x, self.window, self.stride, self.pad, self.ceil)


def pooled_size(n: int, window: int, stride: int, pad: int, ceil: bool = True) -> int:
    """Output length of Caffe's pooling over n positions: rounded up, without windows that start in the far padding."""
    if not ceil:
        return -(-(n + 2 * pad - window + 1) // stride)
    out = -(-(n + 2 * pad - window) // stride) + 1
    return out - 1 if pad and (out - 1) * stride >= n + pad else out


def _pool_padding(x: jax.Array, window: int, stride: int, pad: int, ceil: bool) -> list[tuple[int, int]]:
    """Padding of H and W with which a window reduction that rounds down has Caffe's size."""
    sizes = [pooled_size(n, window, stride, pad, ceil) for n in x.shape[1:3]]
    return [(pad, max((out - 1) * stride + window - n - pad, 0)) for out, n in zip(sizes, x.shape[1:3])]


def max_pool(x: jax.Array, window: int, stride: int, pad: int, ceil: bool = True) -> jax.Array:
    """Caffe's max pooling of [B, H, W, C]; see `Pool`."""
    rows, columns = _pool_padding(x, window, stride, pad, ceil)
    return convolution.max_pool(x, window, stride, (rows, columns))


def average_pool(x: jax.Array, window: int, stride: int, pad: int, ceil: bool = True) -> jax.Array:
    """Caffe's average pooling of [B, H, W, C]: the divisor is the window clipped at input + pad; see `Pool`."""
    padding = _pool_padding(x, window, stride, pad, ceil)
    sums = lax.reduce_window(
        x,
        np.zeros((), x.dtype)[()],
        lax.add,
        (1, window, window, 1),
        (1, stride, stride, 1),
        [(0, 0), *padding, (0, 0)],
    )
    counts = []
    for n, out in zip(x.shape[1:3], sums.shape[1:3]):
        start = np.arange(out) * stride - pad
        counts.append(np.minimum(start + window, n + pad) - start)
    return sums / jnp.asarray(np.outer(*counts)[..., None], x.dtype)


class Upsample(nn.Module):
    """`resize_bilinear` as a layer, so that it appears in the layer table."""

    resize: str = "corners"

    @nn.compact
    def __call__(self, x: jax.Array, size: tuple[int, int]) -> jax.Array:
        return resize_bilinear(x, size, self.resize)


class Dropout(nn.Module):
    """Dropout whose mask depends on the example's own key, hence not on the example's place in a batch.

    Attributes:
      rate: probability of a zero; the rest is divided by 1 - rate.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool, keys: jax.Array | None = None) -> jax.Array:
        """[B, H, W, C] and optional [B] keys -> the same shape. Without keys the "dropout" generator provides one."""
        if not train or self.rate == 0 or self.is_initializing():
            return x
        if keys is None:
            keys = jax.random.split(self.make_rng("dropout"), x.shape[0])
        keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


def fold_keys(keys: jax.Array | None, number: int) -> jax.Array | None:
    """[B] keys -> [B] separate keys for the `number`-th use; None stays None."""
    return None if keys is None else jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def resize_bilinear(x: jax.Array, size: Sequence[int], resize: str = "corners", step: float | None = None) -> jax.Array:
    """Bilinear resize without smoothing, the only resize in this package, in either of two conventions.

    "corners" (Caffe, the papers): output position i of m reads input position i * (n - 1) / (m - 1): zooming by z takes
    n to n + (n - 1)(z - 1), and where that position is an integer the value is copied, so that 321 -> 161 is exactly
    `[::2, ::2]`. "half_pixel" (PyTorch's align_corners=False): it reads (i + 1/2) * n / m - 1/2, kept within the input.

    Args:
      x: [..., H, W, C], finite.
      size: (h, w) of the result.
      resize: "corners" or "half_pixel".
      step: with "half_pixel", input positions per output position instead of n / m.

    Returns:
      [..., h, w, C] of x's type (float32 for integers).
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        x = jnp.asarray(x, jnp.float32)
    for axis, m in zip((-3, -2), size):
        n = x.shape[axis]
        if m == n:
            continue
        if resize == "corners" and 1 < m < n and (n - 1) % (m - 1) == 0:
            x = lax.slice_in_dim(x, 0, n, (n - 1) // (m - 1), axis=x.ndim + axis)
            continue
        matrix = jnp.asarray(interpolation_matrix(n, m, resize, step), x.dtype)
        y = jnp.tensordot(matrix, x, (1, x.ndim + axis), precision=lax.Precision.HIGHEST)
        x = jnp.moveaxis(y, 0, axis)
    return x


def interpolation_matrix(n: int, m: int, resize: str = "corners", step: float | None = None) -> np.ndarray:
    """[m, n] float64 weights of the resize from n to m positions (see `resize_bilinear`); rows sum to 1."""
    if resize == "corners":
        low, remainder = np.divmod(np.arange(m) * (n - 1), max(m - 1, 1))
        fraction = remainder / max(m - 1, 1)
    else:
        position = np.clip((np.arange(m) + 0.5) * (n / m if step is None else step) - 0.5, 0, n - 1)
        low = position.astype(int)
        fraction = position - low
    matrix = np.zeros((m, n))
    matrix[np.arange(m), low] = 1 - fraction
    matrix[np.arange(m), np.minimum(low + 1, n - 1)] += fraction
    return matrix
