"""CamVid with the full network, for an accelerator; start it from converted ImageNet weights."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.num_steps = 8000
    config.data.update(name="camvid", train_split="train", holdout=40, crop=(321, 321))
    config.loss.class_weights = ("sqrt",)
    config.eval.update(every=1000, select_split="holdout")
    return config
