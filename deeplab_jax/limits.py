"""Sizes of photographs, in pixels: above `cut_above` cut into overlapping pieces, above `refuse_above` refused."""

CUT_ABOVE = 4_000_000
REFUSE_ABOVE = 200_000_000
