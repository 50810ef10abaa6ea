"""A run's folder: checkpoints, record, provenance, and the processes that share it. Who reads one need not train."""
