"""A run's folder: checkpoints, record, provenance, and the processes that share it. Needs no training code."""
