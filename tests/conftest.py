"""Shared fixtures: where real data is, and JAX set up for small tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder that DEEPLAB_TEST_DATA names; a test that needs it and does not find it is skipped."""
    folder = os.environ.get("DEEPLAB_TEST_DATA", "")
    if not folder or not Path(folder).is_dir():
        pytest.skip("DEEPLAB_TEST_DATA does not name a folder with the real photographs")
    return Path(folder)
