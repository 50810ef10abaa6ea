"""A workdir's network and its CRF, on photographs of any size."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax.errors import FlaxError

from deeplab_jax.crf.params import FIELDS
from deeplab_jax.crf.setting import Setting
from deeplab_jax.errors import UserError
from deeplab_jax.files import reason
from deeplab_jax.inference.base import Segmenting
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.inference.tiling import STRIDE
from deeplab_jax.limits import CUT_ABOVE, REFUSE_ABOVE
from deeplab_jax.refinement.pieces import Piece, margin_of
from deeplab_jax.refinement.pieces import pieces as overlapping_pieces

# A piece of a large photograph sees at least this many pixels around the part that it labels.
_MARGIN = 128
# Pixels times classes of a piece: 50 megapixels with 21 classes and their probabilities then take less than 8 GB.
_PIECE_VALUES = 30_000_000


class Segment(Segmenting):
    """A network and its CRF: `segment(photograph)`. Safe to call from several threads.

    Attributes:
      class_names: C names.
      palette: uint8 [256, 3].
      crf_iterations: the default number of iterations.
      cut_above: photographs of more pixels go through network and CRF in overlapping pieces of at most this size,
        smaller with many classes.
      refuse_above: files of more pixels are refused.
      batch_size, workers: the number of photographs that `predict` passes at once, and of its threads.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        identity: Any = None,
        cut_above: int = CUT_ABOVE,
        refuse_above: int = REFUSE_ABOVE,
    ):
        self._segmenter, self._made_from = segmenter, identity
        self.class_names, self.palette = segmenter.class_names, segmenter.palette
        self.cut_above, self.refuse_above = cut_above, refuse_above
        self.batch_size = segmenter.batch_size
        on_host = segmenter.devices[0].platform == "cpu"
        self.workers = len(segmenter.devices) * (1 if on_host else 2)  # one of two computes while the other copies

    @property
    def segmenter(self) -> Segmenter:
        """The separate steps: scores, and mean field with other parameters."""
        return self._segmenter

    @property
    def crf(self) -> Setting:
        """The CRF's parameters, iterations, normalization and filter."""
        return self._segmenter.setting

    @property
    def crf_iterations(self) -> int:
        return self.crf.iterations

    @crf_iterations.setter
    def crf_iterations(self, iterations: int) -> None:
        self._segmenter.setting = replace(self.crf, iterations=iterations)

    @property
    def identity(self) -> list:
        """JSON values that distinguish this model and its settings from others."""
        learned = None if self._segmenter.compatibility is None else digest_of(self._segmenter.compatibility)
        values = [np.asarray(getattr(self.crf.params, name), np.float64).tolist() for name in FIELDS]
        rest = [self.crf.iterations, self.crf.normalization, self.crf.bilateral, self.cut_above, self._segmenter.scales]
        return [self._made_from, learned, values, *rest, self._segmenter.mirror]

    def use_crf(self, setting: Setting, keep_compatibility: bool = False) -> "Segment":
        """Changes the CRF's setting in place; returns itself.

        Args:
          setting: if it names no filter, the filter stays.
          keep_compatibility: whether to keep a label compatibility learned with the parameters.
        """
        self._segmenter.setting = replace(setting, bilateral=setting.bilateral or self.crf.bilateral)
        if not keep_compatibility:
            self._segmenter.compatibility = None
        self._segmenter.programs.clear()  # normalization, filter and compatibility are part of the compiled programs
        return self

    def many(
        self, images: Sequence[np.ndarray], iterations: int | None = None, marginals: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Segments several photographs, uint8 [H, W, 3] each, together.

        Returns:
          For each (labels uint8 [H, W], marginals [H, W, C] if requested else None: float32, float16 for a large one).
        """
        iterations = self._count(iterations)
        images = [self._image(image) for image in images]
        try:
            return self._many(images, iterations, marginals)
        except FlaxError as e:
            raise UserError(
                f"config.model: is not the network of these weights ({reason(e)}); give the config that they "
                "were trained with"
            ) from e

    def _many(
        self, images: Sequence[np.ndarray], iterations: int, marginals: bool
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        large = [self.pieces(image.shape[:2]) > 1 for image in images]
        whole = [image for image, is_large in zip(images, large) if not is_large]
        results: list[tuple[np.ndarray, np.ndarray | None]] = []
        if marginals:
            scores = self._segmenter.scores(whole) if whole else []
            refined = [self._segmenter.refine(s, image, iterations) for s, image in zip(scores, whole)]
            results.extend((q.argmax(-1).astype(np.uint8), q) for q in refined)
        else:
            found = self._segmenter.labels(whole, (iterations,)) if whole else []
            results.extend((labels, None) for (labels,) in found)
        remaining = iter(results)
        return [
            self._in_pieces(image, iterations, marginals) if is_large else next(remaining)
            for image, is_large in zip(images, large)
        ]

    def plan(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Chooses few compiled shapes for photographs of these sizes (H, W), or for the pieces of large ones."""
        windows = [piece.window for size in sizes for piece in self._pieces(size)]
        self._segmenter.plan([(y.stop - y.start, x.stop - x.start) for y, x in windows])

    @property
    def programs(self) -> dict[str, int]:
        """The number of programs used: {"network": n, "CRF": n}."""
        kinds = [kind[0] for kind in self._segmenter.programs]
        return {"network": kinds.count("network"), "CRF": kinds.count("crf")}

    def pieces(self, size: tuple[int, ...]) -> int:
        """The number of overlapping pieces in which a photograph of size (H, W) is segmented."""
        return len(self._pieces(size))

    def remark(self, size: tuple[int, ...]) -> str:
        """A remark on how a photograph of size (H, W) is segmented; "" if in one piece."""
        count = self.pieces(size)
        return f"  ({size[0] * size[1] / 1e6:.0f} megapixels, in {count} overlapping pieces)" if count > 1 else ""

    def _pieces(self, size: tuple[int, ...]) -> list[Piece]:
        margin = max(margin_of(self.crf.params), _MARGIN)
        limit = self.cut_above
        if size[0] * size[1] > limit:
            limit = min(limit, max(_PIECE_VALUES // len(self.class_names), 1))
        return overlapping_pieces((size[0], size[1]), limit, margin, align=STRIDE)

    def _in_pieces(self, image: np.ndarray, iterations: int, marginals: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Network and CRF piece by piece, so that memory is bounded by that of a piece and the results."""
        size = image.shape[:2]
        labels = np.empty(size, np.uint8)
        kept = np.empty((*size, len(self.class_names)), np.float16) if marginals else None
        light = self._segmenter.light_of(image)
        for piece in self._pieces(size):
            part = image[piece.window]
            if kept is None:
                ((found,),) = self._segmenter.labels([part], (iterations,), light)
                labels[piece.core] = found[piece.inside]
                continue
            q = self._segmenter.refine(self._segmenter.scores([part], light)[0], part, iterations)[piece.inside]
            kept[piece.core] = q
            labels[piece.core] = q.argmax(-1)
        return labels, kept


def digest_of(arrays: Any) -> str:
    """Identifies a set of weights."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
