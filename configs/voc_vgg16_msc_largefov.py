"""v1 DeepLab-MSc-LargeFOV: side branches on a trained LargeFOV (v1 Table 1: 64.21, 68.70 with CRF)."""

from deeplab_jax.configs import voc_vgg16_largefov


def get_config():
    config = voc_vgg16_largefov.get_config()
    # Start from the trained network without side branches: --config.init_from=runs/voc_vgg16_largefov
    config.model.update(msc=True, freeze_trunk=True)  # "we only adjust the newly added weights" (v1 section 4.3)
    config.crf.preset = "v1_msc_largefov"
    return config
