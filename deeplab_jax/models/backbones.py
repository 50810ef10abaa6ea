"""The registry of backbones. A new one is a module with its `BACKBONE`, and a line in `BACKBONES`."""

from typing import Any

from deeplab_jax.models import resnet, vgg
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbone import Backbone

BACKBONES: dict[str, Backbone] = {
    "resnet101": resnet.BACKBONE,
    "resnet50": resnet.BACKBONE,
    "resnet_small": resnet.SMALL,
    "vgg16": vgg.BACKBONE,
}


def backbone_of(architecture: Architecture) -> Backbone:
    """The entry of an architecture's backbone.

    Raises:
      ValueError: there is no backbone of that name; the sentence names the field.
    """
    name = architecture.backbone
    if name not in BACKBONES:
        raise ValueError(f"config.model.backbone={name!r} is not one of {', '.join(map(repr, BACKBONES))}")
    return BACKBONES[name]


def architecture_of(config: Any) -> Architecture:
    """The description of the network of `config.model`, checked.

    Raises:
      ValueError: the fields describe no network; the sentence names the field.

    >>> from deeplab_jax.config import load_config
    >>> architecture_of(load_config("voc_vgg16_largefov").model).backbone
    'vgg16'
    """
    architecture = Architecture.from_config(config)
    backbone_of(architecture).check(architecture)
    architecture.check()
    return architecture
