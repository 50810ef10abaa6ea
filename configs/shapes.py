"""The embedded data set `shapes`: a small network in a minute on two CPU cores, then a search for its CRF's parameters.

`--config.crf.train=end_to_end --config.search.images=0` trains network and CRF together instead, which takes longer and
gains less here (docs/end_to_end.md).
"""

from deeplab_jax.configs import base


def get_config():
    config = base.get_config()
    config.batch_size = 8
    config.num_steps = 800
    config.model.update(
        backbone="resnet_small",
        widths=(32, 48, 64, 64),
        blocks=(1, 1, 1, 1),
        head="aspp",
        head_width=32,
        head_rates=(2, 4, 6),
        batch_norm="trained",
        preprocessing="torch_rgb",
    )
    config.crf.update(train_iterations=3, stride=4, preset="", iterations=5)
    config.crf.update(bilateral_xy_std=20.0, bilateral_rgb_std=12.0, bilateral_weight=3.0, gaussian_xy_std=2.0)
    config.data.update(name="shapes", train_split="train", crop=(97, 129), scales=(0.75, 1.25), continuous_scale=True)
    config.data.holdout = 60  # for the search
    config.loss.at = "pixels"
    config.optimizer.update(
        learning_rate=0.05, nesterov=True, classifier_multiplier=1.0, bias_multiplier=1.0, warmup_steps=20
    )
    config.search.update(images=40, passes=1)
    config.search.grid.update(
        bilateral_weight=(4.0, 8.0, 16.0),
        bilateral_xy_std=(8.0, 15.0, 30.0),
        bilateral_rgb_std=(12.0, 18.0, 27.0),
        gaussian_weight=(0.0,),
        gaussian_xy_std=(2.0,),
    )
    config.eval.update(crf_iterations=(0, 1, 2, 5, 10), size_multiple=8)
    config.checkpoint.every = 200
    return config
