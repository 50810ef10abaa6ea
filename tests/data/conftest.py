"""A config whose prepared data sets are the test's own."""

import pytest

from deeplab_jax.configs import base


@pytest.fixture
def config(tmp_path):
    """A config whose cache is the test's own."""
    config = base.get_config()
    config.data.cache_dir = str(tmp_path / "cache")
    config.data.crop = (33, 49)
    config.data.workers = 2
    config.batch_size = 4
    return config
