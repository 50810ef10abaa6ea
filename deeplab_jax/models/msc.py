"""v1's multi-scale prediction: side branches from the image and the first four pools (v1 section 4.3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.layers import Conv, classifier_init, relu

WIDTH = 128
SOURCES = ("data", "pool1", "pool2", "pool3", "pool4")


class SideBranches(nn.Module):
    """Five branches 3x3 128 - 1x1 128, concatenated and classified; their scores are added to the main ones.

    The paper concatenates the branches to the last feature map and classifies the whole. A classifier over a
    concatenation is the sum of classifiers over its parts, and written as a sum the main classifier keeps its learned
    weights, as "we only adjust the newly added weights" requires.

    How the branches reach the score map's stride was not verified against the released files: here the 3x3 conv is
    strided.

    Attributes:
      architecture: the network's description.
      num_classes: number of score channels.
    """

    architecture: Architecture
    num_classes: int

    @nn.compact
    def __call__(self, features: dict[str, jax.Array], size: tuple[int, int]) -> jax.Array:
        """Scores of the side branches.

        Args:
          features: the trunk's maps by name, [B, h_i, w_i, C_i].
          size: (h, w) of the main score map.

        Returns:
          [B, h, w, num_classes].
        """
        dtype = self.architecture.compute_dtype
        maps = []
        for i, source in enumerate(SOURCES):
            x = features[source]
            # The first four sources have strides 1, 2, 4, 8; pool4's map has the scores' stride except at output stride
            # 32.
            source_stride = min(2**i, 8) if i < 4 else min(self.architecture.output_stride, 16)
            stride = self.architecture.output_stride // source_stride
            x = relu(Conv(WIDTH, 3, stride, dtype=dtype, name=f"{source}_1")(x))
            x = relu(Conv(WIDTH, 1, dtype=dtype, name=f"{source}_2")(x))
            maps.append(_fitted(x, size))
        joined = jnp.concatenate(maps, -1)
        classifier = Conv(self.num_classes, 1, use_bias=False, dtype=dtype, kernel_init=classifier_init, name="fc8_msc")
        return classifier(joined)


def _fitted(x: jax.Array, size: tuple[int, int]) -> jax.Array:
    """A map cut to the size of the main scores, or with its last row and column repeated.

    v1's base pools give maps of one position more before pool4; Caffe's pools round up where convolutions round down.
    """
    missing = [max(0, wanted - given) for wanted, given in zip(size, x.shape[1:3], strict=True)]
    padded = jnp.pad(x, ((0, 0), (0, missing[0]), (0, missing[1]), (0, 0)), mode="edge") if any(missing) else x
    return padded[:, : size[0], : size[1]]
