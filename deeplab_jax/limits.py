"""Sizes of photographs, in pixels: `cut_above` in overlapping pieces, `refuse_above` unread. Nothing else is meant."""

CUT_ABOVE = 4_000_000
REFUSE_ABOVE = 200_000_000
