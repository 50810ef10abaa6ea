"""Data sets and training batches, without TensorFlow.

`open_dataset(config.data, split)` returns photographs and labels, `train_batches(ds, config, first_step=n)` batches.
"""

import importlib

# Loaded lazily: tables of classes and annotations are also used where tensorflow-datasets is not installed.
_HOME = {
    "Example": "dataset", "SegmentationDataset": "dataset", "holdout_indices": "dataset", "has_holdout": "dataset",
    "open_dataset": "dataset", "require_labels": "dataset", "require_two_classes": "dataset",
    "prefetch": "pipeline", "stages": "pipeline", "train_batches": "pipeline",
}  # fmt: skip
__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'deeplab_jax.data' has no attribute '{name}'")
    return getattr(importlib.import_module(f"deeplab_jax.data.{_HOME[name]}"), name)
