"""A thin network on a few drawn scenes: an experiment in seconds."""

import os

import pytest

from deeplab_jax.config import load_config

TINY = (
    "model.widths=8,8,8,8",
    "model.blocks=1,1,1,1",
    "model.head_width=8",
    "crf.train_iterations=2",
    "crf.stride=8",
    "data.crop=33,33",
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
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    return load_config("shapes", [*TINY, f"data.cache_dir={root / 'shapes-cache'}"])
