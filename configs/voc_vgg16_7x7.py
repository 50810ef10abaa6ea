"""v1 DeepLab-7x7: fc6 7x7 with hole 4 (v1 Table 1: 64.38, 67.64 with CRF)."""

from deeplab_jax.configs import voc_vgg16


def get_config():
    config = voc_vgg16.get_config()
    config.model.head_kernel = 7  # with padding 12, which is unverified
    # The paper gives no separate CRF parameters for this network; DeepLab's are kept.
    return config
