"""ResNet-101, one 1x1 classifier, three input scales (v2 Table 4: 71.27 before CRF; after MS-COCO 73.28)."""

from deeplab_jax.configs import voc_resnet101


def get_config():
    config = voc_resnet101.get_config()
    config.model.scales = (1.0, 0.75, 0.5)
    return config
