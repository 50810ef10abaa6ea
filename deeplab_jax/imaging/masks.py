"""The samples that a mask stores, and their meaning: ids, or colors that are looked up.

A mask is decoded to the samples that the file stores (`read_stored`), never to those that a viewer would show. Their
meaning is decided for all masks of a data set together (`deeplab_jax.data.meaning`), and applied by `ids_of`.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.imaging import decoding, deep
from deeplab_jax.imaging.decoding import CorruptImageError
from deeplab_jax.imaging.palettes import VOID, voc_palette

# Colors that mean void in a colored label map unless a class has them: black, white, and PASCAL's boundary color.
VOID_COLORS = np.array([[0, 0, 0], [255, 255, 255], [224, 224, 192]], np.uint8)
NO_COLOR = -1  # the color of an index beyond its palette's end


class MaskKind(NamedTuple):
    """A row of `MASK_KINDS`.

    Attributes:
      name: its name in tests and docs.
      family: "gray", "palette" or "color": masks of one family are read in the same way in a data set.
      reads: the meaning of its samples; the row of docs/own_data.md.
      fits: whether a Pillow image is of this kind.
    """

    name: str
    family: str
    reads: str
    fits: Callable[[Image.Image], bool]


MASK_KINDS = (
    MaskKind("palette", "palette", "PNG, GIF, TIFF, BMP, TGA of 1 to 8 bits: the indices", lambda i: i.mode == "P"),
    MaskKind("1 bit", "gray", "PNG, TIFF, PBM: the stored 0 or 1", lambda i: i.mode == "1"),
    MaskKind("8 bits", "gray", "gray of 2, 4 or 8 bits, PNG, TIFF (white or black as zero), PGM, JPEG, JPEG 2000: the "
             "stored values", lambda i: i.mode == "L"),
    MaskKind("16 bits", "gray", "gray of 16 or 32 bits, PNG, TIFF, PGM, and 16 bits with opacity: the stored values",
             lambda i: i.mode.startswith("I")),
    MaskKind("float", "gray", "TIFF: whole numbers", lambda i: i.mode == "F"),
    MaskKind("gray with opacity", "gray", "the gray values; opacity is left out", lambda i: i.mode == "LA"),
    MaskKind("color", "color", "the colors; opacity is left out; of 16 bits the byte in use", lambda i: True),
)  # fmt: skip


class Stored(NamedTuple):
    """A decoded mask.

    Attributes:
      values: distinct stored samples, int32 `[N]`; for colors, R * 65536 + G * 256 + B.
      shown: int32 `[N]`, the color that each value shows, packed in the same way; `NO_COLOR` beyond a palette's end.
      family: of the kind.
      lossy: whether the file's compression invents values.
      inverse: int32 `[H, W]`, each pixel's index into `values`.
    """

    values: np.ndarray
    shown: np.ndarray
    family: str
    lossy: bool
    inverse: np.ndarray


class Meaning(NamedTuple):
    """How to read a data set's masks.

    Attributes:
      count: number of classes; None = not known.
      colors: uint8 `[K, 3]`, the classes' colors; None = the classes have none.
      ignore: stored ids that are void.
      reduce_zero: the stored 0 is void and ids count from 1.
      by_color: families whose colors are looked up; others hold ids.
      object_255: 255 marks the only object, with id 1.
    """

    num_classes: int | None = None
    colors: np.ndarray | None = None
    ignore: tuple[int, ...] = (VOID,)
    reduce_zero: bool = False
    by_color: frozenset[str] = frozenset()
    object_255: bool = False


class Fields(NamedTuple):
    """A command's own words in errors: for the place of the classes' colors, and for making an id void."""

    classes: str
    void: str


DATA_SETS = Fields("the classes file (config.data.classes)", "name it in config.data.ignore")


class Palette(NamedTuple):
    """The distinct stored values of a mask, without the map; fields as in `Stored`, and pixel counts, int64 `[N]`."""

    values: np.ndarray
    shown: np.ndarray
    counts: np.ndarray
    family: str
    lossy: bool
    size: tuple[int, int]


def read_stored(source: str | os.PathLike | bytes, name: str = "") -> Stored:
    """Decodes a mask to the samples that it stores, turned upright.

    Raises:
      UserError: no such file, or floats that are not ids. CorruptImageError: it cannot be decoded.
    """
    decoded = _decode(source, name)
    raw, inverse = _distinct(decoded.samples())
    return Stored(*decoded.meaning_of(raw), inverse)


def read_values(source: str | os.PathLike | bytes, name: str = "") -> Palette:
    """Like `read_stored`, without the map and at a fraction of its cost."""
    decoded = _decode(source, name)
    if decoded.image.mode in ("L", "P"):
        counts = np.array(decoded.image.histogram(), np.int64)
        raw = np.flatnonzero(counts).astype(np.int32)
        counts = counts[raw]
    else:
        raw, inverse = _distinct(decoded.samples())
        counts = np.bincount(inverse.ravel(), minlength=len(raw))
    width, height = decoded.image.size
    values, shown, family, lossy = decoded.meaning_of(raw)
    return Palette(values, shown, counts, family, lossy, (height, width))


class _Decoded(NamedTuple):
    """A mask as decoded by Pillow, and how its samples were stored before Pillow converted them for display."""

    image: Image.Image
    kind: MaskKind
    factor: float
    largest: int
    palette: np.ndarray | None
    lossy: bool
    where: str

    def samples(self) -> np.ndarray:
        """`[H, W]`, as Pillow shows them."""
        try:
            samples = _samples(self.image, self.kind)
        except Exception as e:  # Pillow does not convert every color space
            raise CorruptImageError(f"{self.where}: cannot be decoded as an image; replace or remove it") from e
        if self.kind.name == "float" and not ((np.abs(samples) < 2**31) & (samples == np.rint(samples))).all():
            raise UserError(f"{self.where}: holds fractions where class ids are expected; round them")
        return samples.astype(np.int32)

    def meaning_of(self, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, str, bool]:
        """(stored values, colors shown, family, lossy) of distinct samples as Pillow shows them."""
        if self.kind.family == "color":
            return raw, raw, "color", self.lossy
        if self.palette is not None:
            packed = packed_colors(self.palette)
            shown = np.where(raw < len(packed), packed[np.minimum(raw, len(packed) - 1)], NO_COLOR)
            return raw, shown.astype(np.int32), "palette", False
        gray = np.clip(raw if raw.max(initial=0) <= 255 else raw // 257, 0, 255)
        gray = raw * 255 if self.kind.name == "1 bit" else gray
        values = raw
        if self.factor < 0:
            values = self.largest - raw // int(-self.factor)
        elif (self.factor, self.largest) != (1, 255):
            values = np.rint(raw / self.factor).astype(np.int32)
        return values, gray * 65536 + gray * 256 + gray, "gray", self.lossy


def _decode(source: str | os.PathLike | bytes, name: str) -> _Decoded:
    data = decoding.read_source(source, name)
    where = decoding.named(source, name, "label")
    image = decoding.open_image(data, where, load=False)
    factor, largest = decoding.gray_packing(image)
    lossy, deep_color = decoding.is_lossy(image, data), deep.is_deep_color(image)
    image = decoding.loaded(image, data, where)
    if deep_color:
        image = deep.labels_of(image, data)
    kind = next(k for k in MASK_KINDS if k.fits(image))
    palette = np.array(image.getpalette("RGB"), np.int32).reshape(-1, 3) if image.mode == "P" else None
    if decoding.is_turned(image):
        image = decoding.upright(image)
    return _Decoded(image, kind, factor, largest, palette, lossy, where)


def ids_of(
    values: np.ndarray,
    shown: np.ndarray,
    family: str,
    lossy: bool,
    meaning: Meaning,
    where: str,
    fields: Fields = DATA_SETS,
) -> np.ndarray:
    """The class id of each stored value.

    Args:
      values, shown, family, lossy: as in `Stored`.
      meaning: the data set's.
      where: the file's name in errors.
      fields: the names of settings in errors; default those of data sets.

    Returns:
      uint8 `[N]`, 255 = void. Ids outside the classes are left as they are.

    Raises:
      UserError: colors without a table, a color that the table lacks, an id above 255.
    """
    if family in meaning.by_color:
        return _by_color(shown, meaning, lossy, where, fields)
    if family == "color":
        if not is_gray(shown):
            raise UserError(
                f"{where}: is a color picture where class ids are expected; give R G B for each class in "
                f"{fields.classes}, or save an index or palette PNG"
            )
        values = shown % 256
    if meaning.object_255:
        return np.where(values == 255, 1, values).astype(np.uint8)
    void = np.isin(values, meaning.ignore)
    if meaning.reduce_zero:
        void, values = void | (values == 0), values - 1
    wrong = (~void) & ((values > 255) | (values < 0))
    if wrong.any():
        shown_id = int(values[wrong].max() if (values[wrong] > 255).any() else values[wrong].min())
        raise UserError(
            f"{where}: holds the id {shown_id + meaning.reduce_zero}, and ids above 255 are not supported; "
            f"renumber them, or {fields.void}"
        )
    return np.where(void, VOID, values).astype(np.uint8)


def check_lossless(shown: np.ndarray, lossy: bool, where: str, fields: Fields = DATA_SETS) -> None:
    """Raises `UserError` for ids that a lossy compression may have invented: those of a gray file of several values."""
    if lossy and is_gray(shown) and len(shown) > 1:
        raise UserError(
            f"{where}: has lossy compression, which invents ids ({len(shown)} values); save masks as PNG, or give each "
            f"class its gray as R G B in {fields.classes}"
        )


def is_gray(packed: np.ndarray) -> bool:
    """Whether packed colors are all gray."""
    blue = packed % 256
    return bool(((blue == packed // 256 % 256) & (blue == packed // 65536)).all())


def read_label(
    source: str | os.PathLike | bytes,
    name: str = "",
    colors: np.ndarray | None = None,
    meaning: Meaning | None = None,
) -> np.ndarray:
    """Decodes a label map of any kind in `MASK_KINDS`.

    Args:
      source: a path, or the encoded bytes.
      name: its name in errors; default the path.
      colors: uint8 `[K, 3]`, RGB of class 0..K-1, used to read this single file if its samples are not ids: colors of
        the table, and `VOID_COLORS` outside it as void; in JPEGs the nearest of them.
      meaning: the meaning of a data set's masks, instead of `colors`.

    Returns:
      Class ids, uint8 `[H, W]`, 255 = void.

    Raises:
      UserError: no such file, colors without a table, or a color that the table lacks.
      CorruptImageError: it cannot be decoded.
    """
    return _read(_decode(source, name), colors, meaning, DATA_SETS)[0]


def read_single(path: str | os.PathLike, colors: np.ndarray | None, fields: Fields) -> tuple[np.ndarray, bool]:
    """`read_label` of a map that belongs to no data set, and whether its colors were looked up.

    Raises:
      UserError: like `read_label`, and for ids that the file's compression may have invented.
    """
    return _read(_decode(path, ""), colors, None, fields, intact=True)


def _read(
    decoded: _Decoded, colors: np.ndarray | None, meaning: Meaning | None, fields: Fields, intact: bool = False
) -> tuple[np.ndarray, bool]:
    """(ids, whether colors were looked up); `intact`: ids of a lossy compression are refused."""
    if decoded.image.mode in ("L", "P"):  # a table costs a fraction of sorting pixels
        raw = np.flatnonzero(decoded.image.histogram()).astype(np.int32)
    else:
        raw, inverse = _distinct(decoded.samples())
    values = decoded.meaning_of(raw)
    if meaning is None:
        meaning = Meaning() if colors is None else _of_one_file(*values, colors)
    _, shown, family, lossy = values
    by_color = family in meaning.by_color
    ids = ids_of(*values, meaning, decoded.where, fields)
    if intact and not by_color:
        check_lossless(shown, lossy, decoded.where, fields)
    if decoded.image.mode not in ("L", "P"):
        return ids[inverse], by_color
    pixels = np.array(decoded.image)
    if (ids == raw).all():
        return pixels, by_color
    table = np.zeros(256, np.uint8)
    table[raw] = ids
    return table[pixels], by_color


def read_palette(source: str | os.PathLike | bytes, name: str = "") -> np.ndarray:
    """The palette of a palette image, uint8 `[256, 3]`, completed with VOC's entries; VOC's for other images."""
    palette = voc_palette()
    image = decoding.open_image(source, name, load=False)
    if image.mode == "P":
        own = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
        palette[: len(own)] = own
    return palette


def packed_colors(rgb: np.ndarray) -> np.ndarray:
    """R * 65536 + G * 256 + B of `[..., 3]`, int32."""
    return (np.asarray(rgb, np.int32) << np.array([16, 8, 0], np.int32)).sum(-1, dtype=np.int32)


def color_text(packed: int) -> str:
    """A packed color as text.

    >>> color_text(65536 + 512 + 3)
    '(1, 2, 3)'
    """
    return str((int(packed) >> 16, int(packed) >> 8 & 255, int(packed) & 255))


def _of_one_file(values: np.ndarray, shown: np.ndarray, family: str, lossy: bool, colors: np.ndarray) -> Meaning:
    """By color if the single file suggests it; see `deeplab_jax.data.meaning` for whole data sets."""
    blue, gray = shown % 256, is_gray(shown)
    ids = ((values < len(colors)) | (values == VOID)).all()
    known = np.isin(shown, packed_colors(np.concatenate([colors, VOID_COLORS]))).all()
    classes = np.isin(shown, packed_colors(colors)).any()
    if family == "color":
        by_color = known or not (gray and ((blue < len(colors)) | (blue == VOID)).all())
    elif family == "palette":
        void = (values == VOID) & np.isin(shown, packed_colors(VOID_COLORS))  # stays void if a class has that color
        own = np.append(packed_colors(colors), NO_COLOR)[np.clip(values, 0, len(colors))]
        by_color = known and classes and not ((own == shown) | void).all()
    else:
        by_color = not ids and (known or (lossy and gray))
    return Meaning(len(colors), colors, by_color=frozenset({family} if by_color else ()))


def _by_color(shown: np.ndarray, meaning: Meaning, lossy: bool, where: str, fields: Fields) -> np.ndarray:
    if meaning.colors is None:
        raise UserError(f"{where}: colors are looked up, but no class has one; give R G B in {fields.classes}")
    table = np.concatenate([meaning.colors, VOID_COLORS]).astype(np.int32)
    ids = np.concatenate([np.arange(len(meaning.colors)), np.full(len(VOID_COLORS), VOID)]).astype(np.uint8)
    packed = packed_colors(table)
    order = np.argsort(packed, kind="stable")  # the first of equal colors: a class before void
    place = np.minimum(np.searchsorted(packed[order], shown), len(order) - 1)
    found = packed[order][place] == shown
    result = ids[order][place]
    if not found.all():
        if not lossy:
            first = color_text(shown[~found][0]) if shown[~found][0] != NO_COLOR else "of an index beyond its palette"
            raise UserError(
                f"{where}: holds the color {first}, which no class has; add it to the classes file or repaint it"
            )
        parts = np.stack([shown >> 16, shown >> 8 & 255, shown & 255], -1)
        nearest = ((parts[:, None] - table[None]) ** 2).sum(-1).argmin(1)
        result = np.where(found, result, ids[nearest])
    return result


def _samples(image: Image.Image, kind: MaskKind) -> np.ndarray:
    if kind.name == "gray with opacity":
        return np.asarray(image.getchannel(0))
    if kind.name == "1 bit":
        return np.asarray(image).astype(np.uint8)
    return packed_colors(np.asarray(image.convert("RGB"))) if kind.family == "color" else np.asarray(image)


def _distinct(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values of a map and each pixel's index into them; only the starts of long runs are sorted."""
    flat = samples.ravel()
    if not flat.size:
        return flat, samples
    if flat.min() >= 0 and flat.max() < 65536:
        present = np.zeros(int(flat.max()) + 1, bool)
        present[flat] = True
        return np.flatnonzero(present).astype(np.int32), (np.cumsum(present, dtype=np.int32) - 1)[samples]
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])
    values, place = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(np.append(starts, flat.size))
    return values, np.repeat(place.astype(np.int32), lengths).reshape(samples.shape)
