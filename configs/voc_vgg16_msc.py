"""v1 DeepLab-MSc: side branches on a trained DeepLab (v1 Table 1: 61.30, 65.21 with CRF)."""

from deeplab_jax.configs import voc_vgg16


def get_config():
    config = voc_vgg16.get_config()
    # Start from the trained network without side branches: --config.init_from=runs/voc_vgg16
    config.model.update(msc=True, freeze_trunk=True)  # "we only adjust the newly added weights" (v1 section 4.3)
    config.crf.preset = "v1_msc"
    return config
