"""The gain of searched parameters on photographs of a group (a drive, a site) that the search did not see."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from deeplab_jax.search.grid import Candidate, Ledger, objective_of, score


class GroupGain(NamedTuple):
    """One group left out: its number of images, and its objective without and with the CRF, fractions in 0..1."""

    group: str
    images: int
    network: float
    crf: float

    @property
    def gain(self) -> float:
        return self.crf - self.network


def gains_on_unseen(
    ledger: Ledger, settings: Sequence[Candidate], groups: Sequence[str | None], objective: str
) -> list[GroupGain]:
    """For each group, the gain of the setting that is best on the images of all other groups.

    Nothing is measured again: the choice is among settings that the search has measured on every image. The search
    itself narrowed down its grid on images of all groups; an exhaustive search of one pass does not.

    Args:
      ledger: of the search.
      settings: those measured on every image.
      groups: the group of each image; with fewer than two groups there is nothing to leave out.
      objective: one of `grid.OBJECTIVES`.

    Returns:
      One entry per group with labels, in the order of the images; empty if there is one group or an image has none.
    """
    names = list(dict.fromkeys(groups))
    if len(names) < 2 or None in names or not settings:
        return []
    found = []
    for name in filter(None, names):
        inside = [i for i, group in enumerate(groups) if group == name]
        outside = [i for i, group in enumerate(groups) if group != name]
        chosen = max(settings, key=lambda s: objective_of(score(ledger, s, outside), objective))
        alone, after = (objective_of(score(ledger, s, inside), objective) for s in (None, chosen))
        if math.isnan(after - alone):  # without labels nothing is gained or lost
            continue
        found.append(GroupGain(name, len(inside), alone, after))
    return found


def sentence(gains: Sequence[GroupGain], objective: str) -> str:
    """One line of text in percent points; "" without gains."""
    if not gains:
        return ""
    each = ", ".join(f"{g.group} {100 * g.gain:+.2f} ({g.images} images)" for g in gains)
    mean = sum(g.gain for g in gains) / len(gains)
    return f"{objective} gained on a group that the search did not see: {each}; mean {100 * mean:+.2f}"
