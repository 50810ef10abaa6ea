"""PASCAL-Context, 59 classes and background (v2: 45.7)."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.data.update(name="pascal_context", train_split="train")
    return config
