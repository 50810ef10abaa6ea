"""The networks of DeepLab v1 and v2, as Flax Linen modules."""

from deeplab_jax.models.deeplab import (
    DeepLab,
    create_model,
    is_classifier,
    is_frozen,
    output_size,
    preprocess,
)

__all__ = ["DeepLab", "create_model", "is_classifier", "is_frozen", "output_size", "preprocess"]
