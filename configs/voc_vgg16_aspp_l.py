"""v2 VGG-16 with ASPP-L (v2 Table 3: 68.96, 71.57 with CRF)."""

from deeplab_jax.configs import base


def get_config():
    config = base.get_config()
    config.model.backbone = "vgg16"
    config.data.scales = (1.0,)  # mirror only
    config.optimizer.learning_rate = 1e-3
    config.crf.preset = "v2_vgg16"
    return config
