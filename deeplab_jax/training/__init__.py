"""Training: losses, optimizer, the pmapped step, checkpoints, reporting, and the loop that tells their story."""
