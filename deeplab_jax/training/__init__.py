"""Training: losses, optimizer, the pmapped step, and the loop that combines them."""
