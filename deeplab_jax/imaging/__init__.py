"""Photographs and label maps as files and pictures."""
