"""v1 DeepLab-4x4: fc6 4x4 with hole 8 (v1 Table 2: 63.41, 67.14 with CRF)."""

from deeplab_jax.configs import voc_vgg16


def get_config():
    config = voc_vgg16.get_config()
    config.model.head_rates = (8,)  # with padding 12, which is unverified
    # The paper gives no separate CRF parameters for this network; DeepLab's are kept.
    return config
