"""The meaning of a data set's masks, decided from all of them together: ids or colors, and the number of classes."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.imaging import decoding, masks
from deeplab_jax.imaging.masks import VOID_COLORS, Meaning, check_lossless, color_text, ids_of, is_gray, packed_colors
from deeplab_jax.imaging.palettes import VOID

_MANY = 4096  # distinct values that are kept for a mask; a photograph among the masks has more


class Facts(NamedTuple):
    """The contents of one mask, without the map itself.

    Attributes:
      name: its name in errors.
      size: height, width.
      values, shown: int32 `[N]`, as in `masks.Stored`.
      counts: int64 `[N]`, pixels of each.
      family, lossy: as in `masks.Stored`.
      frames: pages or frames of the file, of which the first is read.
    """

    name: str
    size: tuple[int, int]
    values: np.ndarray
    shown: np.ndarray
    counts: np.ndarray
    family: str
    lossy: bool
    frames: int = 1

    def ids(self, meaning: Meaning) -> np.ndarray:
        """The class id of each value, uint8 `[N]`; raises `UserError` like `masks.ids_of`."""
        return ids_of(self.values, self.shown, self.family, self.lossy, meaning, self.name)

    def id_counts(self, meaning: Meaning) -> np.ndarray:
        """Pixels of each id, int64 `[256]`."""
        return np.bincount(self.ids(meaning), self.counts, minlength=256).astype(np.int64)


def facts_of(data: bytes, name: str, colors: np.ndarray | None) -> Facts:
    """Reads a mask for `decide`; raises like `masks.read_stored`."""
    stored = masks.read_values(data, name)
    values, shown, counts = stored.values, stored.shown, stored.counts
    if stored.lossy and stored.family == "color" and colors is not None:  # thousands of colors near the classes'
        table = packed_colors(np.concatenate([colors, VOID_COLORS]))
        meaning = Meaning(len(colors), colors, by_color=frozenset({"color"}))
        ids = ids_of(values, shown, "color", True, meaning, name)
        present = np.unique(ids)
        counts = np.bincount(ids, counts, minlength=256)[present].astype(np.int64)
        values = shown = np.where(present == VOID, table[-1], table[np.minimum(present, len(colors) - 1)])
    if len(values) > _MANY:
        most = np.sort(np.argsort(-counts, kind="stable")[:_MANY])
        values, shown, counts = values[most], shown[most], counts[most]
    return Facts(name, stored.size, values, shown, counts, stored.family, stored.lossy, _frames(data, name))


def _frames(data: bytes, name: str) -> int:
    """Pages or frames of a mask; kinds that can only have one are not opened."""
    several = data[:4] in (b"II*\0", b"MM\0*", b"GIF8", b"RIFF") or b"acTL" in data[:128]
    return decoding.frames_of(decoding.open_image(data, name, load=False)) if several else 1


def decide(
    facts: Sequence[Facts],
    count: int | None,
    colors: np.ndarray | None,
    ignore: Iterable[int] = (VOID,),
    reduce_zero: bool = False,
) -> tuple[Meaning, list[str]]:
    """How to read the masks of a data set.

    Masks hold ids, unless the classes have colors and the stored values are not ids, or palettes hold the classes'
    colors in another order. Masks of only 0 and 255 show one object.

    Args:
      facts: of every mask that can be decoded.
      count: number of classes; None = the ids that occur.
      colors: uint8 `[K, 3]`, the classes' colors; None = they have none.
      ignore: stored ids that are void.
      reduce_zero: the stored 0 is void and ids count from 1.

    Returns:
      The meaning (with the number of classes), and notes on it for the user.

    Raises:
      UserError: masks can be read as ids and by color, with different results; or settings that exclude each other.
    """
    ignore = tuple(int(i) for i in ignore)
    meaning = Meaning(count, colors, ignore, reduce_zero)
    notes: list[str] = []
    several = [f for f in facts if f.frames > 1]
    if several:
        more = f" and {len(several) - 1} more" if len(several) > 1 else ""
        notes.append(f"{several[0].name}{more}: has {several[0].frames} pages or frames; the first is read")
    of = {family: [f for f in facts if f.family == family] for family in ("gray", "palette", "color")}
    by_color = set()
    if colors is not None:
        if of["gray"] and _gray_by_color(of["gray"], meaning, notes):
            by_color.add("gray")
        if of["palette"] and _palettes_by_color(of["palette"], meaning):
            by_color.add("palette")
        if of["color"] and _colors_by_color(of["color"], meaning):
            by_color.add("color")
    meaning = meaning._replace(by_color=frozenset(by_color))
    if by_color and reduce_zero:
        raise UserError(
            "config.data.reduce_zero=true: is for masks of ids, but these are looked up by their colors; leave it out"
        )
    if count is None:
        meaning = _counted(facts, meaning, notes)
    return meaning, notes


def _counted(facts: Sequence[Facts], meaning: Meaning, notes: list[str]) -> Meaning:
    """The meaning with the number of classes that the stored ids imply."""
    for f in facts:
        check_lossless(f.shown, f.lossy, f.name)
    stored = {int(v) for f in facts for v in f.shown % 256 if f.family == "color"}
    stored |= {int(v) for f in facts for v in f.values if f.family != "color"}
    if stored == {0, 255} and not meaning.reduce_zero:
        notes.append("masks hold 0 and 255 only: 255 is read as the object, class 1")
        return meaning._replace(num_classes=2, object_255=True)
    used = {int(i) for f in facts for i in _ids_or_none(f, meaning)} - {VOID}
    largest = max(used, default=0)
    if len(used) <= largest and used:
        skipped = sorted(set(range(largest)) - used)
        notes.append(
            f"without config.data.classes the classes are the numbers 0 to {largest}, of which {len(skipped)} never "
            f"occur; the first is {skipped[0]}"
        )
    return meaning._replace(num_classes=largest + 1)


def _ids_or_none(facts: Facts, meaning: Meaning) -> np.ndarray:
    try:
        return facts.ids(meaning)
    except UserError:  # reported with the file's name when it is read
        return np.zeros(0, np.uint8)


def _are_ids(facts: Facts, meaning: Meaning) -> bool:
    """Whether all stored values are ids of classes or void."""
    values = facts.values
    if facts.family == "color":
        if not is_gray(facts.shown):
            return False
        values = facts.shown % 256
    lowest = 1 if meaning.reduce_zero else 0
    assert meaning.num_classes is not None, "called only with colors, and so with classes"
    inside = (values >= lowest) & (values < meaning.num_classes + lowest)
    return bool((inside | np.isin(values, (*meaning.ignore, *([0] if meaning.reduce_zero else [])))).all())


def _are_colors(facts: Facts, colors: np.ndarray) -> bool:
    """Whether all colors are those of classes or void; for lossy masks, whether gray classes may be intended."""
    if facts.lossy:
        return facts.family == "color" or bool((colors == colors[:, :1]).all(1).sum() >= 2)
    return bool(np.isin(facts.shown, packed_colors(np.concatenate([colors, VOID_COLORS]))).all())


def _readings(facts: Facts, meaning: Meaning) -> tuple[np.ndarray, np.ndarray]:
    """(ids, ids by color) of each value."""
    return facts.ids(meaning), facts.ids(meaning._replace(by_color=frozenset({facts.family})))


def _differs(facts: Facts, meaning: Meaning) -> np.ndarray:
    as_ids, as_colors = _readings(facts, meaning)
    return np.flatnonzero(as_ids != as_colors)


def _colors_of(meaning: Meaning) -> np.ndarray:
    assert meaning.colors is not None, "called only if the classes have colors"
    return meaning.colors


def _gray_by_color(family: list[Facts], meaning: Meaning, notes: list[str]) -> bool:
    colors = _colors_of(meaning)
    classes = packed_colors(colors)
    as_ids = all(_are_ids(f, meaning) for f in family)
    as_colors = all(_are_colors(f, colors) for f in family)
    as_colors &= any(f.lossy or np.isin(f.shown, classes).any() for f in family)
    if as_ids and as_colors and any(f.lossy for f in family):
        return False  # ids that the lossy compression has left intact
    if as_ids and as_colors:
        different = next((f for f in family if len(_differs(f, meaning))), None)
        if different is None:
            return False
        stored = {int(v) for f in family for v in (f.values if f.family == "gray" else f.shown % 256)}
        if meaning.num_classes == 2 and stored <= {0, 255} and (colors == 255).all(1).any():
            notes.append("masks hold 0 and 255 only: they are looked up by color, so that 255 is the class of color "
                         "255 255 255, not void")  # fmt: skip
            return True
        raise _two_readings(different, meaning)
    if as_ids or as_colors:
        return as_colors
    fits_ids = sum(_are_ids(f, meaning) for f in family)
    return sum(_are_colors(f, colors) for f in family) > fits_ids


def _two_readings(facts: Facts, meaning: Meaning) -> UserError:
    as_ids, as_colors = _readings(facts, meaning)
    at = _differs(facts, meaning)[0]
    of = lambda i: "void" if i == VOID else f"class {i}"  # noqa: E731
    return UserError(
        f"{facts.name}: can be read in two ways: the stored {facts.values[at]} is {of(as_ids[at])} as an id, but "
        f"{of(as_colors[at])} by its color {color_text(facts.shown[at])}; take the colors out of config.data.classes "
        "to read ids, or save the masks as RGB in the classes' colors"
    )


def _palettes_by_color(family: list[Facts], meaning: Meaning) -> bool:
    colors = _colors_of(meaning)
    classes = packed_colors(colors)
    known = [f for f in family if _are_colors(f, colors)]
    shuffled = [f for f in known if np.isin(f.shown, classes).any() and len(_differs_safely(f, meaning))]
    if not shuffled:
        return not all(_are_ids(f, meaning) for f in family) and len(known) == len(family)
    if len(known) == len(family):
        return True
    shows: dict[int, set[int]] = {}
    for f in family:
        for value, color in zip(f.values.tolist(), f.shown.tolist()):
            shows.setdefault(value, set()).add(color)
    fits_ids = [f for f in family if _are_ids(f, meaning)]
    if all(len(colors) == 1 for colors in shows.values()) and len(fits_ids) == len(family):
        return False  # one palette for all, with colors that no class has: its colors are arbitrary
    if len(known) > len(family) - len(known):
        return True
    ours = {f.name for f in known}
    other = next(f for f in family if f.name not in ours)
    raise UserError(
        f"{shuffled[0].name}: its palette shows the classes' colors under other ids, but that of {other.name} shows "
        "colors that no class has; export all masks in the same way"
    )


def _differs_safely(facts: Facts, meaning: Meaning) -> np.ndarray:
    """Like `_differs`, but for void that a palette shows black or white, as a class may be too: it stays void."""
    try:
        found = _differs(facts, meaning)
    except UserError:
        return np.zeros(0, int)
    void = np.isin(facts.values, meaning.ignore) & np.isin(facts.shown, packed_colors(VOID_COLORS))
    return found[~void[found]]


def _colors_by_color(family: list[Facts], meaning: Meaning) -> bool:
    """RGB masks are looked up, except gray ones whose values are ids but not the color of a class."""
    colors = _colors_of(meaning)
    if all(_are_colors(f, colors) for f in family):
        return True
    return not all(_are_ids(f, meaning) for f in family)
