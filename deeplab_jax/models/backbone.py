"""The description of a backbone in the registry."""

import dataclasses
from collections.abc import Callable

import flax.linen as nn

from deeplab_jax.models.architecture import Architecture

VGG_FIELDS = ("msc", "pool5a", "base_pools")


def check_resnet(a: Architecture) -> None:
    """Raises ValueError if a field requests a feature that only VGG-16 or only the small ResNet has."""
    if a.head == "fc":
        raise ValueError(f"config.model.head='fc' is VGG-16's; with backbone '{a.backbone}' use 'largefov'")
    for name in VGG_FIELDS:
        if getattr(a, name):
            raise ValueError(f"config.model.{name} belongs to backbone 'vgg16', not to '{a.backbone}'")
    refuse_fine_branch(a)


def refuse_fine_branch(a: Architecture) -> None:
    """Raises ValueError if the small network's side branch is requested for another network."""
    if a.fine_branch:
        raise ValueError("config.model.fine_branch needs backbone 'resnet_small', head 'aspp' and a head_width above 0")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """One line of the registry.

    Attributes:
      trunk: (architecture, mapped axis of synchronized batch norm or None) -> a module named "backbone" that takes
        preprocessed images [B, H, W, 3] and `train`, and returns {"last": [B, h, w, C], ...}, the input of its head.
      head: (architecture, number of classes, mapped axis) -> a module named "head" that takes that dict, `train` and
        dropout keys, and returns scores [B, h, w, classes].
      score_length: (architecture, pixels along a side) -> score positions along it.
      check: raises ValueError with one sentence for fields that do not suit this backbone.
      batch_norm: whether it has batch norm, which cannot be frozen without stored statistics.
      stride_on: whether it depends on `config.model.stride_on`, which is then recorded with its weights.
    """

    trunk: Callable[[Architecture, str | None], nn.Module]
    head: Callable[[Architecture, int, str | None], nn.Module]
    score_length: Callable[[Architecture, int], int]
    check: Callable[[Architecture], None] = check_resnet
    batch_norm: bool = True
    stride_on: bool = False
