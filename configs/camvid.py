"""CamVid from scratch on two CPU cores in an hour: a small atrous ResNet with ASPP and a stride-4 side branch.

Output stride 16 halves the cost of a step and the first steps use smaller photographs, for more epochs in the hour.
"""

from deeplab_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 6
    config.num_steps = 8400
    config.model.update(
        backbone="resnet_small",
        widths=(48, 96, 128, 160),
        blocks=(2, 2, 2, 2),
        head="aspp",
        head_width=64,
        head_rates=(6, 12, 18),
        output_stride=16,
        fine_branch=32,
        batch_norm="trained",
        preprocessing="own_rgb",  # its drives differ in light: docs/ablations.md
    )
    config.data.update(
        name="camvid",
        train_split="train",
        holdout=40,  # chooses the checkpoint and the CRF's parameters
        crop=(241, 321),
        scales=(0.7, 1.5),
        continuous_scale=True,
        stages=((0.6429, (161, 209), (0.47, 1.0)),),  # 5400 steps, each at half the cost
        brightness=0.25,
        contrast=0.25,
        saturation=0.6,
        color_cast=0.15,  # with the wide saturation: other cameras and weather, docs/ablations.md
    )
    config.loss.class_weights = ("fourth_root",)
    config.loss.at = "pixels"  # thin classes: docs/ablations.md
    config.optimizer.update(
        learning_rate=0.05,
        nesterov=True,
        classifier_multiplier=1.0,
        bias_multiplier=1.0,
        warmup_steps=50,
        ema=0.995,
    )
    config.search.images = 40
    config.search.passes = 1
    config.search.objective = "both"
    config.search.thin = ("pole", "sign")  # smoothing that helps cars and houses wipes these out
    config.search.grid.update(
        bilateral_weight=(0.5, 1.0, 2.0),
        bilateral_xy_std=(30.0, 60.0),
        bilateral_rgb_std=(3.0, 6.0),
        gaussian_weight=(0.0, 1.0),
        gaussian_xy_std=(1.0,),
        thin_factor=(1.0, 2.0, 3.0, 4.0),
    )
    config.eval.update(every=2100, select_split="holdout", scales=(0.75, 1.0, 1.25, 1.5), mirror=True, size_multiple=16)
    config.checkpoint.every = 700
    return config
