"""CamVid road scenes."""
