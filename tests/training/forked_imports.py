"""Importing this imports what a training needs."""

from tests.training.forked import preload

preload()
