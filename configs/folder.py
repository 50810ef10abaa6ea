"""Your own photographs: set config.data.images and .masks, and config.data.classes if the classes have names."""

from deeplab_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 6
    config.num_steps = 5000
    config.model.update(
        backbone="resnet_small",  # trains from scratch; for pretrained weights see voc_aspp_l.py's model and init_from
        head="aspp",
        head_width=96,
        head_rates=(6, 12, 18),
        batch_norm="trained",
        preprocessing="torch_rgb",
    )
    config.data.update(
        name="folder",
        train_split="train",
        crop=(321, 321),
        scales=(0.5, 1.5),
        continuous_scale=True,
        brightness=0.2,
        contrast=0.2,
        saturation=0.2,
    )
    config.loss.class_weights = ("sqrt",)
    config.optimizer.update(
        learning_rate=0.05, nesterov=True, classifier_multiplier=1.0, bias_multiplier=1.0, warmup_steps=50
    )
    config.eval.update(size_multiple=64)
    return config
