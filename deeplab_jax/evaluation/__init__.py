"""From photographs to marginals, and from marginals to numbers."""
