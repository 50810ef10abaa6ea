"""The v2 system: atrous ResNet-101, ASPP-L, three input scales (v2 Table 4: 76.35, 77.69 with CRF; after MS-COCO)."""

from deeplab_jax.configs import base


def get_config():
    config = base.get_config()
    config.model.scales = (1.0, 0.75, 0.5)
    return config
