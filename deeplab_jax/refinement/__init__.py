"""The CRF alone, on rough labels or probabilities that come as files."""
