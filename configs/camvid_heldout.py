"""The `camvid` config with 40 training photographs held out, which choose the checkpoint and the CRF's parameters.

For comparisons, and to search again. `camvid` itself trains on all photographs, with the parameters found in this way.
"""

from deeplab_jax.configs import camvid


def get_config():
    config = camvid.get_config()
    config.data.holdout = 40
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
    config.eval.update(every=2100, select_split="holdout")
    return config
