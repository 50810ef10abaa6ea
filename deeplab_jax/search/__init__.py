"""The CRF's parameters, searched coarse to fine on held-out images and learned from there (v2 section 5)."""
