"""One folder per data set, in TFDS's layout: `<name>/<name>_dataset_builder.py`."""
