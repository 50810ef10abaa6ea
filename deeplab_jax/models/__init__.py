"""The networks of DeepLab v1 and v2, as Flax Linen modules."""

from deeplab_jax.models.backbones import BACKBONES, architecture_of
from deeplab_jax.models.deeplab import (
    DeepLab,
    create_model,
    is_classifier,
    is_frozen,
    output_size,
    preprocess,
)

__all__ = [
    "BACKBONES",
    "DeepLab",
    "architecture_of",
    "create_model",
    "is_classifier",
    "is_frozen",
    "output_size",
    "preprocess",
]
