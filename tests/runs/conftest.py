"""The small runs of tests/training, here too."""

from tests.training.conftest import runs, traced_once, whole_run  # noqa: F401
