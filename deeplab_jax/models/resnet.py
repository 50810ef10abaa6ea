"""Atrous ResNets: the released ResNet-101, ResNet-50, and a small one of basic blocks (He et al., 2015; v2 section
3.1).

Layers carry the released Caffe names: conv1, res2a_branch1, res2a_branch2a, bn2a_branch2a, ..., res4b22_branch2c.
"""

import dataclasses
import functools

import flax.linen as nn
import jax

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbone import Backbone, check_resnet, refuse_fine_branch
from deeplab_jax.models.heads import ResNetHead, SmallHead
from deeplab_jax.models.layers import BatchNorm, Conv, Pool, pooled_size, relu

# Bottleneck counts and widths (of the last 1x1 conv) of each stage.
BOTTLENECKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
BOTTLENECK_WIDTHS = (256, 512, 1024, 2048)
STEM_WIDTH = 64


class ResNet(nn.Module):
    """A ResNet without its classifier, atrous from the stage at which the output stride is reached.

    Attributes:
      architecture: the network's description.
      axis_name: mapped axis for synchronized batch norm.
    """

    architecture: Architecture
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Runs the trunk.

        Args:
          x: [B, H, W, 3], preprocessed.
          train: whether trained batch norm uses the batch's statistics.

        Returns:
          "res2", "res3", ...: the last map of each stage, [B, h, w, width]; "last": the deepest of them.
        """
        a = self.architecture
        stem = STEM_WIDTH if a.backbone in BOTTLENECKS else a.widths[0]
        conv = Conv(stem, 7, 2, use_bias=False, dtype=a.compute_dtype, name="conv1")
        norm = BatchNorm(a.frozen_batch_norm, self.axis_name, a.compute_dtype, name="bn_conv1")
        x = relu(norm(conv, x, train))
        x = Pool(3, 2, 1, name="pool1")(x)
        plain = nn.remat(_block, static_argnums=(2, 3, 4, 5, 6, 7)) if a.remat else _block
        run = _shared_block if _can_share(self) else plain
        features = {}
        for number, (names, width, stride, first_rate, rate) in enumerate(stages(a), start=2):
            for i, name in enumerate(names):
                step, before = (stride, first_rate) if i == 0 else (1, rate)
                x = run(self, x, f"{number}{name}", width, step, before, rate, train)
            features[f"res{number}"] = x
        features["last"] = x
        return features


def block_names(count: int) -> list[str]:
    """Caffe's names of a stage's blocks: a, b, c, ... and, in ResNet-101's stages of 4 and 23, a, b1, b2, ...

    ResNet-50's stages of 4 and 6 are named a, b1, b2, ... here too, so that one rule suffices.
    """
    if count <= 3:
        return list("abc"[:count])
    return ["a", *(f"b{i}" for i in range(1, count))]


def stages(a: Architecture) -> list[tuple[list[str], int, int, int, int]]:
    """The stages as (block names, width, stride of the first block, the rate before it, rate).

    The image reaches the stages at stride 4. From the second stage on each halves the map until the output stride is
    reached, and doubles the atrous rate from there. The rate before a stage is that of the first block's convolutions
    before its (omitted) stride, so that every second position equals the strided network's.
    """
    blocks = BOTTLENECKS.get(a.backbone, a.blocks)
    widths = BOTTLENECK_WIDTHS if a.backbone in BOTTLENECKS else a.widths
    stride, rate, result = 4, 1, []
    for i, (count, width) in enumerate(zip(blocks, widths)):
        step, first = 1, rate
        if i > 0 and stride < a.output_stride:
            step, stride = 2, stride * 2
        elif i > 0:
            rate *= 2
        result.append((block_names(count), width, step, first, rate))
    return result


def score_length(a: Architecture, n: int) -> int:
    """Score positions along a side of n pixels."""
    n = pooled_size(-(-n // 2), 3, 2, 1)
    if a.fine_branch:
        return n
    for _, _, stride, _, _ in stages(a):
        n = -(-n // stride)
    return n


def _can_share(trunk: ResNet) -> bool:
    """Whether nothing needs each block's modules to be called: no initialization, no interceptor, no intermediates."""
    interceptors = getattr(nn.module, "_global_interceptor_stack", "unknown")
    return not (trunk.is_initializing() or trunk.is_mutable_collection("intermediates") or len(interceptors))


def _shared_block(
    trunk: ResNet, x: jax.Array, name: str, width: int, stride: int, first_rate: int, rate: int, train: bool
) -> jax.Array:
    """`_block` of a trunk that has its variables, traced and differentiated once for all blocks of one form."""
    prefixes = f"res{name}_", f"bn{name}_"
    variables = {
        kind: {layer.replace(name, "", 1): values for layer, values in layers.items() if layer.startswith(prefixes)}
        for kind, layers in trunk.variables.items()
    }
    alone = _Block(trunk.architecture, trunk.axis_name, width, stride, first_rate, rate, parent=None)
    learns = train and not trunk.architecture.frozen_batch_norm and trunk.is_mutable_collection("batch_stats")
    run = functools.partial(_apply_block, alone, train=train, learns=learns)
    y, statistics = (jax.checkpoint(run) if trunk.architecture.remat else run)(variables, x)
    for layer, values in statistics.items():
        trunk.put_variable("batch_stats", layer.replace("_", f"{name}_", 1), values)
    return y


@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "learns"))
def _apply_block(block: "_Block", variables: dict, x: jax.Array, train: bool, learns: bool) -> tuple[jax.Array, dict]:
    """A block's result, and the new statistics of its batch norms if it `learns` them."""
    y, updates = block.apply(variables, x, train, mutable=["batch_stats"] if learns else [])
    return y, dict(updates["batch_stats"]) if learns else {}


class _Block(nn.Module):
    """One residual block by itself; its layers are named without the block's name: res_branch2a, bn_branch2a, ..."""

    architecture: Architecture
    axis_name: str | None
    width: int
    stride: int
    first_rate: int
    rate: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        return _block(self, x, "", self.width, self.stride, self.first_rate, self.rate, train)


def _block(
    trunk: ResNet | _Block, x: jax.Array, name: str, width: int, stride: int, first_rate: int, rate: int, train: bool
) -> jax.Array:
    """One residual block: a bottleneck in the published networks, two 3x3 convolutions in the small one."""
    a = trunk.architecture

    def unit(x: jax.Array, branch: str, width: int, kernel: int, stride: int = 1, rate: int = 1) -> jax.Array:
        conv = Conv(width, kernel, stride, rate, use_bias=False, dtype=a.compute_dtype, name=f"res{name}_{branch}")
        norm = BatchNorm(a.frozen_batch_norm, trunk.axis_name, a.compute_dtype, name=f"bn{name}_{branch}")
        return norm(conv, x, train)

    # Whether there is a projection depends only on the widths, so that all output strides share their parameters.
    shortcut = x[:, ::stride, ::stride] if x.shape[-1] == width else unit(x, "branch1", width, 1, stride)
    if a.backbone in BOTTLENECKS:
        # With the stride on the 3x3 conv, the first block's 3x3 runs before it, at the previous rate.
        on_1x1 = a.stride_on == "1x1"
        y = relu(unit(x, "branch2a", width // 4, 1, stride if on_1x1 else 1))
        y = relu(unit(y, "branch2b", width // 4, 3, 1 if on_1x1 else stride, rate if on_1x1 else first_rate))
        y = unit(y, "branch2c", width, 1)
    else:
        y = relu(unit(x, "branch2a", width, 3, stride, first_rate))
        y = unit(y, "branch2b", width, 3, 1, rate)
    return relu(shortcut + y)


def _head(a: Architecture, num_classes: int, axis_name: str | None) -> nn.Module:
    if a.head == "aspp" and a.head_width:
        return SmallHead(a, num_classes, axis_name, name="head")
    return ResNetHead(a, num_classes, name="head")


def _check_small(a: Architecture) -> None:
    fits = a.head == "aspp" and a.head_width
    check_resnet(dataclasses.replace(a, fine_branch=0))
    if not fits:
        refuse_fine_branch(a)
    if not a.blocks:
        raise ValueError("config.model.blocks=(): needs at least one stage")
    if len(a.widths) != len(a.blocks):
        raise ValueError(
            f"config.model.widths names {len(a.widths)} stages and config.model.blocks {len(a.blocks)}; "
            "give one number for each stage in both"
        )


def _trunk(a: Architecture, axis_name: str | None) -> nn.Module:
    return ResNet(a, axis_name, name="backbone")


BACKBONE = Backbone(_trunk, _head, score_length, stride_on=True)  # of bottlenecks
SMALL = Backbone(_trunk, _head, score_length, _check_small)
