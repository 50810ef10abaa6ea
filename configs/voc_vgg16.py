"""v1 DeepLab: fc6 4x4 with hole 4, 4096 filters (v1 Table 1: 59.80, 63.74 with CRF)."""

from deeplab_jax.configs import voc_vgg16_largefov


def get_config():
    config = voc_vgg16_largefov.get_config()
    config.batch_size = 20
    config.model.update(head="fc", head_kernel=4, head_rates=(4,), base_pools=True, pool5a=False)
    config.data.crop = (306, 306)
    config.crf.preset = "deeplab_v1"
    return config
