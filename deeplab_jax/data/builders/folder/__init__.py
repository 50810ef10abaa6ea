"""The user's own photographs and masks."""
