"""Cityscapes, 19 classes, whole images in overlapping tiles, one input scale (v2: test 70.4)."""

from deeplab_jax.configs import voc_aspp_l


def get_config():
    config = voc_aspp_l.get_config()
    config.model.scales = (1.0,)  # the paper omits multi-scale inputs here
    config.data.update(name="cityscapes", train_split="train")
    config.eval.tile = 513  # the papers give no tile size: unverified
    config.eval.crf_iterations = (0, 10)  # marginals of every iteration at 2 megapixels would take gigabytes
    return config
