"""ResNet-101 with ASPP-S, the small field of view (rates as in v2 section 4.2, which gives VGG-16's numbers only)."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.model.head_rates = (2, 4, 8, 12)
    return config
