"""Heads: from the trunk's last map to class scores.

The last classifier layers, which have 10 times the learning rate, are named `fc1*` and `fc8*`.
"""

import functools
import operator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.cpu import convolution
from deeplab_jax.models.layers import (
    BatchNorm,
    Conv,
    ConvWeights,
    Dropout,
    Upsample,
    classifier_init,
    conv_init,
    fold_keys,
    relu,
)
from deeplab_jax.models.msc import SideBranches

FC_WIDTH = {"fc": 4096, "largefov": 1024, "aspp": 1024}  # v1 Table 2; v2 section 4.2


class VGGHead(nn.Module):
    """fc6 - relu - dropout - fc7 - relu - dropout - fc8: one branch, or v2's ASPP of several, their scores summed.

    Attributes:
      architecture: the network's description.
      num_classes: number of score channels.
    """

    architecture: Architecture
    num_classes: int

    @nn.compact
    def __call__(self, features: dict[str, jax.Array], train: bool, keys: jax.Array | None) -> jax.Array:
        """features["last"] [B, h, w, C] -> scores [B, h', w', num_classes]; keys: [B] dropout keys or None."""
        a, x = self.architecture, features["last"]
        # Under a frozen trunk the main head is a fixed function that the side branches correct.
        fixed = a.msc and a.freeze_trunk
        scores = self._main(x, train and not fixed, keys)
        if a.msc:
            scores = lax.stop_gradient(scores) if fixed else scores
            size = scores.shape[1], scores.shape[2]
            scores = scores + SideBranches(a, self.num_classes, name="msc")(features, size)
        return scores

    def _main(self, x: jax.Array, train: bool, keys: jax.Array | None) -> jax.Array:
        a = self.architecture
        if a.head == "plain":
            return Conv(self.num_classes, 1, dtype=a.compute_dtype, kernel_init=classifier_init, name="fc8")(x)
        width = a.head_width or FC_WIDTH[a.head]
        kernel = 3 if a.head == "aspp" else a.head_kernel
        scores = []
        for i, rate in enumerate(a.rates):
            suffix = f"_{i + 1}" if a.head == "aspp" else ""
            y = relu(Conv(width, kernel, rate=rate, dtype=a.compute_dtype, name=f"fc6{suffix}")(x))
            y = Dropout(a.dropout, name=f"drop6{suffix}")(y, train, fold_keys(keys, 2 * i))
            y = relu(Conv(width, 1, dtype=a.compute_dtype, name=f"fc7{suffix}")(y))
            y = Dropout(a.dropout, name=f"drop7{suffix}")(y, train, fold_keys(keys, 2 * i + 1))
            classify = Conv(
                self.num_classes, 1, dtype=a.compute_dtype, kernel_init=classifier_init, name=f"fc8{suffix}"
            )
            scores.append(classify(y))
        return functools.reduce(operator.add, scores)


class ResNetHead(nn.Module):
    """v2's ResNet heads: parallel single 3x3 atrous convs directly to the classes, summed; or one 1x1 (`plain`).

    Attributes:
      architecture: the network's description.
      num_classes: number of score channels.
    """

    architecture: Architecture
    num_classes: int

    @nn.compact
    def __call__(self, features: dict[str, jax.Array], train: bool, keys: jax.Array | None) -> jax.Array:
        """features["last"] [B, h, w, C] -> scores [B, h, w, num_classes]."""
        a, x = self.architecture, features["last"]
        if a.head == "plain":
            return Conv(self.num_classes, 1, dtype=a.compute_dtype, kernel_init=classifier_init, name="fc1")(x)
        names = [f"fc1_c{i}" for i in range(len(a.rates))] if a.head == "aspp" else ["fc1"]
        layers = [
            ConvWeights(self.num_classes, a.head_kernel, r, classifier_init, name=n) for n, r in zip(names, a.rates)
        ]
        kernels, biases = zip(*(layer(x) for layer in layers))
        scores = convolution.sum_of_atrous_convs(x, [k.astype(a.compute_dtype) for k in kernels], a.rates)
        return scores + sum(biases).astype(a.compute_dtype)


class SmallHead(nn.Module):
    """Parallel atrous convs and a 1x1 branch of `head_width` channels with batch norm, concatenated and classified.

    With `fine_branch`, a branch from the trunk's stride-4 map joins them before the classifier, like v1's side
    branches, and the scores have stride 4.

    Attributes:
      architecture: the network's description.
      num_classes: number of score channels.
      axis_name: mapped axis for synchronized batch norm.
    """

    architecture: Architecture
    num_classes: int
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features: dict[str, jax.Array], train: bool, keys: jax.Array | None) -> jax.Array:
        """features["last"], ["res2"] [B, h, w, C] -> scores [B, h, w, num_classes], or at res2's size."""
        a, x = self.architecture, features["last"]

        def unit(x: jax.Array, name: str, width: int, kernel: int, rate: int = 1) -> jax.Array:
            conv = Conv(
                width, kernel, rate=rate, use_bias=False, dtype=a.compute_dtype, kernel_init=conv_init, name=name
            )
            norm = BatchNorm(a.frozen_batch_norm, self.axis_name, a.compute_dtype, name=f"bn_{name}")
            return relu(norm(conv, x, train))

        branches = [unit(x, f"aspp_c{i}", a.head_width, 3, rate) for i, rate in enumerate(a.rates)]
        x = jnp.concatenate([*branches, unit(x, "aspp_1x1", a.head_width, 1)], -1)
        if a.fine_branch:
            fine = unit(features["res2"], "fine", a.fine_branch, 1)
            size = fine.shape[1], fine.shape[2]
            coarse = Upsample(a.resize, name="upsample")(unit(x, "project", a.fine_branch, 1), size)
            x = unit(jnp.concatenate([coarse, fine], -1), "fuse", a.fine_branch, 3)
        return Conv(self.num_classes, 1, dtype=a.compute_dtype, kernel_init=classifier_init, name="fc1")(x)
