"""Sizes of photographs, in pixels: above `cut_above` cut into overlapping pieces, above `refuse_above` refused.

And what training may do to them: the lowest and highest side of a crop, and scale.
"""

CUT_ABOVE = 4_000_000
REFUSE_ABOVE = 200_000_000
CROP_SIDES = (1, 1 << 14)
CROP_SCALES = (0.01, 16.0)
