"""The small runs of tests/training, here too."""

from tests.training.conftest import runs, whole_run  # noqa: F401
