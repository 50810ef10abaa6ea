"""PASCAL-Person-Part."""
