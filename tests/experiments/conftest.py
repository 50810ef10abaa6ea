"""A thin network on a few drawn scenes: an experiment in seconds."""

import pytest

from deeplab_jax.config import load_config
from tests.training.conftest import few_scenes

TINY = (
    "model.widths=8,8,8,8",
    "model.blocks=1,1,1,1",
    "model.head_width=8",
    "crf.train=end_to_end",
    "crf.train_iterations=2",
    "crf.stride=8",
    "data.crop=33,33",
    "data.holdout=0",
    "search.images=0",
    "batch_size=4",
    "num_steps=4",
    "checkpoint.every=4",
    "eval.limit=3",
    "eval.crf_iterations=0,1,2",
    "eval.trimap_widths=3,",
    "eval.overlays=0",
)


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """The config `shapes`, made tiny; its scenes are drawn once for all tests."""
    return load_config("shapes", [*TINY, f"data.cache_dir={few_scenes(tmp_path_factory)}"])
