"""Data sets and training batches, without TensorFlow.

`open_dataset(config.data, split)` gives photographs and labels, `train_batches(ds, config, first_step=n)` the batches.
"""

from deeplab_jax.data.dataset import Example, SegmentationDataset, has_holdout, holdout_indices, open_dataset
from deeplab_jax.data.pipeline import prefetch, stages, train_batches

__all__ = [
    "Example",
    "SegmentationDataset",
    "has_holdout",
    "holdout_indices",
    "open_dataset",
    "prefetch",
    "stages",
    "train_batches",
]
