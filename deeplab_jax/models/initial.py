"""Initial values of a network's variables: its modules state the distributions, NumPy draws the numbers.

Inside a compiled program, draws take longer to compile than a training step (ResNet-101: 44 million numbers in 104
arrays). `plan` traces a network without drawing anything, and `draw` gives each variable numbers of its own, which
depend on nothing but the seed and the variable's name: they are the same on every host and device. `module.init` works
as in any Flax module; its numbers are JAX's.
"""

import contextvars
import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

_planning = contextvars.ContextVar("planning", default=False)


class Planned(flax.struct.PyTreeNode, meta.AxisMetadata):
    """A variable that has not been drawn: its shape, and the initializer that the module gave it.

    During `plan` it is a box, in Flax's sense, around the traced value.

    Attributes:
      value: anything with `shape` and `dtype`.
      initializer: a `Normal` or `Constant`; None for one that only Flax can evaluate.
    """

    value: Any
    initializer: Any = flax.struct.field(pytree_node=False, default=None)

    @property
    def shape(self) -> tuple[int, ...]:
        """The variable's shape."""
        return self.value.shape

    @property
    def size(self) -> int:
        """Its number of values."""
        return math.prod(self.shape)

    def unbox(self) -> Any:
        """The value that the module computes with."""
        return self.value

    def replace_boxed(self, value: Any) -> "Planned":
        """The same variable with another value."""
        return self.replace(value=value)

    def add_axis(self, index: int, params: dict) -> "Planned":
        """Flax's lifted transformations call it; the shape is known without it."""
        del index, params
        return self

    def remove_axis(self, index: int, params: dict) -> "Planned":
        """The inverse of `add_axis`."""
        del index, params
        return self


@dataclasses.dataclass(frozen=True)
class Normal:
    """Initializer of kernels [..., C_in, C_out]: normal numbers of mean 0.

    Attributes:
      std: their deviation; None = sqrt(2 / fan_out), fan_out the kernel's positions times C_out (He et al., 2015).
    """

    std: float | None = None

    def __call__(self, key: jax.Array | None, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        """As Flax calls it: drawn by JAX from `key`; a `Planned` during `plan`."""
        if _planning.get():
            return _planned(self, shape, dtype)
        return _normal(key, tuple(shape), self.std, dtype)

    def draw(self, generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Float32 array of this shape, drawn by NumPy."""
        std = math.sqrt(2 / (math.prod(shape[:-2]) * shape[-1])) if self.std is None else self.std
        values = generator.standard_normal(shape, np.float32)
        values *= np.float32(std)
        return values


# Flax evaluates a parameter's shape each time that a layer runs: under `jit` the result is cached.
@jax.jit(static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], std: float | None, dtype: Any) -> jax.Array:
    he = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return (he if std is None else nn.initializers.normal(std))(key, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Constant:
    """Initializer that fills an array with one value."""

    value: float

    def __call__(self, key: jax.Array | None, shape: Sequence[int], dtype: Any = jnp.float32) -> Any:
        """As Flax calls it; `key` is not used. A `Planned` during `plan`."""
        del key
        return _planned(self, shape, dtype) if _planning.get() else jnp.full(shape, self.value, dtype)

    def draw(self, generator: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Float32 array of this shape; nothing is drawn."""
        del generator
        return np.full(shape, self.value, np.float32)


def _planned(initializer: Normal | Constant, shape: Sequence[int], dtype: Any) -> Any:
    return Planned(lax.broadcast(np.zeros((), dtype), shape), initializer)


ZEROS, ONES = Constant(0.0), Constant(1.0)


def plan(model: nn.Module) -> dict:
    """The variables of a `DeepLab`, each a `Planned`: their shapes without their values. Nothing is compiled.

    >>> from deeplab_jax.config import load_config
    >>> from deeplab_jax.models import create_model
    >>> conv1 = plan(create_model(load_config("voc_aspp_l").model, 21))["params"]["backbone"]["conv1"]["kernel"]
    >>> conv1.shape, conv1.initializer
    ((7, 7, 3, 64), Normal(std=None))
    """
    token = _planning.set(True)
    try:
        traced = jax.eval_shape(_initialize(model), 0)
    finally:
        _planning.reset(token)
    boxed = jax.tree.map(lambda x: x if isinstance(x, Planned) else Planned(x), traced, is_leaf=_is_planned)
    return dict(boxed)


def is_planning() -> bool:
    """Whether this is called by `plan`, in which initializers return what they would draw as `Planned`."""
    return _planning.get()


def shapes(variables: dict) -> dict:
    """The result of `plan` as Flax's initialization has it: a `jax.ShapeDtypeStruct` for each variable."""
    return jax.tree.map(lambda leaf: leaf.value, variables, is_leaf=_is_planned)


def draw(model: nn.Module, variables: dict, seed: int) -> dict:
    """Values for all variables that are still planned; the others stay.

    Args:
      model: the network, needed for variables whose initializer is not one of this file's.
      variables: the result of `plan`, in which values may have taken the place of some `Planned`.
      seed: with the variable's name it determines the numbers.

    Returns:
      The variables as arrays, float32.
    """
    flat = flatten_dict(variables)
    rest = [path for path, leaf in flat.items() if _is_planned(leaf) and leaf.initializer is None]
    if rest:
        initialize = _initialize(model)
        flat |= jax.jit(lambda seed: {path: flatten_dict(initialize(seed))[path] for path in rest})(seed)
    drawn = {p: leaf.initializer.draw(_generator(seed, p), leaf.shape) for p, leaf in flat.items() if _is_planned(leaf)}
    return dict(unflatten_dict(flat | drawn))


def _initialize(model: nn.Module) -> Callable[[Any], Mapping]:
    """Flax's initialization as a function of the seed, on a small image.

    The variables depend neither on the image's size nor on the number of scales, which share their weights.
    """
    architecture = dataclasses.replace(model.architecture, scales=(1.0,))
    small, side = model.clone(architecture=architecture), 32 + architecture.size_extra

    def initialize(seed: Any) -> Mapping:
        key = jax.random.key(seed)
        return small.init({"params": key, "dropout": key}, jnp.zeros((1, side, side, 3), jnp.float32), train=False)

    return initialize


def _generator(seed: int, path: tuple[str, ...]) -> np.random.Generator:
    """A generator of one variable's own numbers."""
    digest = hashlib.sha256(f"{seed}/{'/'.join(path)}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def _is_planned(leaf: Any) -> bool:
    return isinstance(leaf, Planned)
