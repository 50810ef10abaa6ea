"""v1 DeepLab-LargeFOV: fc6 3x3 with hole 12, 1024 filters (v1 Table 1: 62.25, 67.64 with CRF)."""

from deeplab_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 30  # released; the paper says 20
    config.num_steps = 6000
    config.model.update(backbone="vgg16", head="largefov", head_rates=(12,), pool5a=True)
    config.data.scales = (1.0,)  # mirror only
    config.optimizer.update(learning_rate=1e-3, schedule="step", step_size=2000)
    config.crf.preset = "v1_largefov"
    return config
