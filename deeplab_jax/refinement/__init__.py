"""The CRF alone, on rough labels or probabilities read from files."""
