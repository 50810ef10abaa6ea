"""Code that only serves speed on CPUs: convolutions by taps and by Winograd's filtering, sums as matrix products."""
