"""PASCAL VOC 2012 segmentation, with SBD's extra annotations."""
