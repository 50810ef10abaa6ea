"""Imports everything that a training needs."""

from tests.training.forked import preload

preload()
