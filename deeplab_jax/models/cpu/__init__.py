"""What serves speed on CPUs alone: convolutions by taps and by Winograd's filtering, sums as matrix products."""
