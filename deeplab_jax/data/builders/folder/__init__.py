"""Anybody's own photographs and masks."""
