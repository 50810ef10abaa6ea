"""ResNet-101 with one 3x3 classifier at rate 12 (v2 Table 4: 75.54 before CRF; after MS-COCO)."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.model.update(head="largefov", head_rates=(12,))
    return config
