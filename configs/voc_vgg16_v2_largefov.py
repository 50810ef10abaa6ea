"""v2 VGG-16 LargeFOV: fc6 3x3 at rate 12, without v1's pool5a, poly schedule (v2 Table 3: 65.76, 69.84 with CRF)."""

from deeplab_jax.configs import voc_vgg16_aspp_l


def get_config():
    config = voc_vgg16_aspp_l.get_config()
    config.model.update(head="largefov", head_rates=(12,))
    return config
