"""PASCAL-Context."""
