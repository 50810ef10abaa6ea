"""Replaces the library of this name as if it were not installed."""

raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
