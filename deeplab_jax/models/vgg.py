"""VGG-16 as DeepLab uses it: the last two pools keep the map's size, conv5 and fc6 are atrous (v1 section 3.1)."""

import flax.linen as nn
import jax

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbone import Backbone, refuse_fine_branch
from deeplab_jax.models.heads import VGGHead
from deeplab_jax.models.layers import Conv, Pool, pooled_size, relu

COUNTS = (2, 2, 3, 3, 3)  # 3x3 convs of each stage
WIDTHS = (64, 128, 256, 512, 512)  # and their channels


class VGG16(nn.Module):
    """conv1_1 to pool5 (and v1 LargeFOV's pool5a).

    Attributes:
      architecture: the network's description; `base_pools` chooses v1 DeepLab's pools.
      widths: channels of each of the five stages; () = the published ones.
    """

    architecture: Architecture
    widths: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> dict[str, jax.Array]:
        """Runs the trunk.

        Args:
          x: [B, H, W, 3], preprocessed.
          train: unused; trunks share a signature.

        Returns:
          "data", "pool1", ..., "pool4": the inputs of v1's side branches; "conv5_3"; "last". All [B, h, w, C].
        """
        del train
        a = self.architecture
        features = {"data": x}
        run = nn.remat(_stage, static_argnums=(2, 3, 4, 5)) if a.remat else _stage
        rate = 2 if a.output_stride == 8 else 1
        for number, (width, count) in enumerate(zip(self.widths or WIDTHS, COUNTS, strict=True), start=1):
            x = run(self, x, number, width, count, rate if number == 5 else 1)
            if number == 5:
                features["conv5_3"] = x
            x = _pool(a, number)(x)
            features[f"pool{number}"] = x
        if a.pool5a:
            x = Pool(3, 1, 1, "average", name="pool5a")(x)
        return {**features, "last": x}


def score_length(a: Architecture, n: int) -> int:
    """Score positions along a side of n pixels."""
    for number in range(1, 6):
        pool = _pool(a, number)
        n = pooled_size(n, pool.window, pool.stride, pool.pad, pool.ceil)
    return n


def _stage(trunk: VGG16, x: jax.Array, number: int, width: int, count: int, rate: int) -> jax.Array:
    for i in range(1, count + 1):
        x = relu(Conv(width, 3, rate=rate, dtype=trunk.architecture.compute_dtype, name=f"conv{number}_{i}")(x))
    return x


def _pool(a: Architecture, number: int) -> Pool:
    """The released pools at output stride 8; pool4 at 16, and also pool5 at 32, have stride 2."""
    name = f"pool{number}"
    if number <= 3:
        return Pool(2, 2, 1, name=name) if a.base_pools else Pool(3, 2, 1, name=name)
    stride = 2 if a.output_stride >= (16 if number == 4 else 32) else 1
    if number == 4 and a.base_pools:
        return Pool(2, stride, 0, ceil=False, name=name)
    return Pool(3, stride, 1, ceil=False, name=name)


def _check(a: Architecture) -> None:
    refuse_fine_branch(a)
    if a.msc and a.head == "aspp":
        raise ValueError("config.model.msc joins one feature map (v1); set config.model.head to 'fc' or 'largefov'")


BACKBONE = Backbone(
    trunk=lambda a, axis_name: VGG16(a, name="backbone"),
    head=lambda a, num_classes, axis_name: VGGHead(a, num_classes, name="head"),
    score_length=score_length,
    check=_check,
    batch_norm=False,
)
