"""The CRF's input without a network: a file of probabilities, or a label map with a confidence."""

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from deeplab_jax.crf.unary import unary_from_labels, unary_from_probabilities
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files, masks, palettes
from deeplab_jax.imaging.palettes import VOID

# Smaller probabilities, zeros included, are raised to this; it is below the smallest positive float16.
PROBABILITY_FLOOR = 1e-8

_FIELDS = masks.Fields("the file of --classes", "store what is unlabelled as the id of --unknown")

Slices = tuple[slice, slice]


@dataclass(frozen=True)
class Rough:
    """Initial probabilities of every pixel.

    Attributes:
      ids: uint8 [C], the class id of each channel, ascending.
      palette: uint8 [256, 3].
    """

    ids: np.ndarray
    palette: np.ndarray

    def unary(self, window: Slices) -> jax.Array:
        """Returns -log P of a window, float32 [h, w, C]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Probabilities(Rough):
    """A memory-mapped array of probabilities [H, W, C]."""

    values: np.ndarray
    path: Path

    @classmethod
    def from_file(cls, path: Path, size: tuple[int, int]) -> "Probabilities":
        """Opens a `.npy` file, float16 to float64 [H, W, C], for a photograph of `size` (H, W); nothing is unpickled.

        Raises:
          UserError: it cannot be read, is of another type or shape.
        """
        path = Path(path)
        try:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError as e:
            raise UserError(f"{path}: no such file") from e
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
            raise UserError(f"{path}: is not a .npy file of numbers; save it with numpy.save(path, array)") from e
        if not isinstance(values, np.ndarray):
            raise UserError(f"{path}: is an archive of arrays; save a single array with numpy.save(path, array)")
        if values.dtype.newbyteorder("=") not in (np.float16, np.float32, np.float64):  # of either byte order
            raise UserError(f"{path}: holds {values.dtype}; probabilities must be float16, float32 or float64")
        if values.ndim == 2:
            raise UserError(f"{path}: has shape {list(values.shape)}, one value for each pixel; probabilities must be "
                            "[H, W, C]: save numpy.stack([1 - p, p], -1) for an object and its background")  # fmt: skip
        if values.ndim == 4 and values.shape[0] == 1:
            raise UserError(f"{path}: has shape {list(values.shape)}, a batch of one image; probabilities must be "
                            "[H, W, C]: save array[0]")  # fmt: skip
        if values.ndim != 3:
            raise UserError(f"{path}: has shape {list(values.shape)}; probabilities must be [H, W, C]")
        if values.shape[:2] != size:
            raise UserError(f"{path}: has shape {list(values.shape)}{_shape_hint(values.shape, size)}")
        if not 2 <= values.shape[2] <= 256:
            raise UserError(f"{path}: has {values.shape[2]} classes; there must be 2 to 256")
        return cls(np.arange(values.shape[2], dtype=np.uint8), palettes.voc_palette(), values, path)

    def unary(self, window: Slices) -> jax.Array:
        """Returns -log P of a window, float32 [h, w, C].

        Raises:
          UserError: a value is NaN or outside 0..1, or all of a pixel's are 0.
        """
        p = np.asarray(self.values[window])
        low, high = float(p.min()), float(p.max())
        if math.isnan(low) or math.isnan(high):
            raise UserError(f"{self.path}: holds NaN; probabilities must be numbers in 0..1")
        if low < 0 or high > 1.01:
            raise UserError(f"{self.path}: holds values from {low:.4g} to {high:.4g}; give probabilities in 0..1 "
                            "(the softmax of scores)")  # fmt: skip
        total = float(p.sum(-1, dtype=np.float32).max())
        if total > 1.05:
            raise UserError(f"{self.path}: the probabilities of a pixel sum to {total:.3g}, where classes exclude each "
                            "other; scores of independent classes (sigmoid) must be made one distribution: add a "
                            "background, and divide by the sum (or give the softmax of the scores)")  # fmt: skip
        if not p.any(-1).all():
            raise UserError(f"{self.path}: all classes of a pixel have probability 0; they must sum to 1")
        return unary_from_probabilities(p, PROBABILITY_FLOOR)


def _shape_hint(shape: tuple[int, ...], size: tuple[int, int]) -> str:
    expected = f"but the photograph is {size[0]} high and {size[1]} wide: it must be [{size[0]}, {size[1]}, C]"
    if shape[1:] == size:
        return f", {expected}; it looks like [C, H, W], so transpose it with numpy.moveaxis(array, 0, -1)"
    if shape[:2] == size[::-1]:
        return f", {expected}; rows and columns look swapped"
    return f", {expected}"


@dataclass(frozen=True)
class RoughLabels(Rough):
    """A label map with the same confidence wherever it is known, uniform elsewhere."""

    channels: np.ndarray  # int16 [H, W], -1 = unknown
    confidence: float
    given: np.ndarray  # uint8 [H, W], as in the file

    @property
    def is_settled(self) -> bool:
        """Whether fewer than two labels occur, so that the map cannot change."""
        return len(self.ids) < 2

    @classmethod
    def from_file(
        cls, path: Path, size: tuple[int, int], unknown: int, confidence: float, colors: np.ndarray | None = None
    ) -> "RoughLabels":
        """Reads a label map (ids, or colors of classes) for a photograph of `size` (H, W).

        Only the ids that occur in it are labels. With fewer than two there is nothing to refine (`is_settled`).

        Args:
          unknown: the id of pixels without a label; with `colors` void (255) is unknown in any case.
          colors: the classes' colors, uint8 `[K, 3]`, if the map is colored.

        Raises:
          UserError: it cannot be read, holds ids of a lossy compression, or has another size; or `unknown` is a class
            of a colored map that has a color of its own.
        """
        labels, by_color = masks.read_single(path, colors, _FIELDS)
        if colors is not None and by_color:
            _check_unknown(path, unknown, colors)
        if labels.shape != size:
            raise UserError(f"{path}: is {labels.shape[0]} high and {labels.shape[1]} wide, but the photograph is "
                            f"{size[0]} high and {size[1]} wide; they must be equal")  # fmt: skip
        without = [unknown] if colors is None else [unknown, VOID]
        ids = np.setdiff1d(np.unique(labels), without).astype(np.uint8)
        if len(ids) >= 2 and not 1 / len(ids) < confidence < 1:
            raise UserError(f"--confidence={confidence:g}: with {len(ids)} labels it must be above {1 / len(ids):.3g} "
                            "(a guess) and below 1")  # fmt: skip
        channel_of = np.full(256, -1, np.int16)
        channel_of[ids] = np.arange(len(ids))
        palette = _readable_palette(path, ids) if colors is None else palettes.from_colors(colors)
        return cls(ids, palette, channel_of[labels], confidence, labels)

    def unary(self, window: Slices) -> jax.Array:
        """Returns -log P of a window, float32 [h, w, C]: P = confidence for the pixel's label, the rest shared."""
        return unary_from_labels(self.channels[window], len(self.ids), self.confidence, unknown=-1)


def _check_unknown(path: Path, unknown: int, colors: np.ndarray) -> None:
    """Raises `UserError` if `unknown` would leave out a class of a colored map; one in a void color may be meant."""
    if unknown < len(colors) and not (colors[unknown] == masks.VOID_COLORS).all(-1).any():
        raise UserError(f"{path}: has the colors of --classes, of which --unknown={unknown} would leave out class "
                        f"{unknown}, {tuple(colors[unknown].tolist())}; leave out --unknown: black, white and (224, "
                        "224, 192) are unknown already where no class has them")  # fmt: skip


def _readable_palette(path: Path, ids: np.ndarray) -> np.ndarray:
    """The label map's own palette if its colors are all different, else VOC's."""
    palette = files.read_palette(path)
    used = palette[ids].astype(int)
    apart = np.abs(used[:, None] - used[None]).sum(-1) + 1000 * np.eye(len(ids), dtype=int)
    return palette if apart.min(initial=255) >= 96 else palettes.voc_palette()
