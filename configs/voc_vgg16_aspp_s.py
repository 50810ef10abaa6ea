"""v2 VGG-16 with ASPP-S, the small field of view (v2 Table 3: 66.98, 69.73 with CRF)."""

from deeplab_jax.configs import voc_vgg16_aspp_l


def get_config():
    config = voc_vgg16_aspp_l.get_config()
    config.model.head_rates = (2, 4, 8, 12)
    return config
