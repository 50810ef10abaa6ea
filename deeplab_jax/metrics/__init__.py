"""Confusion matrices, mean IoU, and accuracy in trimaps."""
