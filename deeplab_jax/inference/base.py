"""The base of a workdir's network and an exported artifact: a photograph in, a `Segmentation` out."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from deeplab_jax.crf.params import check_iterations
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import read_photograph
from deeplab_jax.inference.segmenter import Segmentation


class Segmenting(ABC):
    """`segment(photograph)`; see `Segment` and `Artifact`.

    Attributes:
      class_names: C names.
      palette: uint8 [256, 3].
      crf_iterations: the default number of iterations.
      refuse_above: files of more pixels are refused.
      batch_size, workers: the number of photographs that `predict` passes at once, and of its threads.
    """

    class_names: tuple[str, ...]
    palette: np.ndarray
    crf_iterations: int
    refuse_above: int
    batch_size: int = 1
    workers: int = 1

    def __call__(self, photograph: str | os.PathLike | np.ndarray, iterations: int | None = None) -> Segmentation:
        """Segments a photograph.

        Args:
          photograph: a file, or RGB uint8 [H, W, 3].
          iterations: of the CRF, 0 to 10,000; 0 = without the CRF, None = the model's.

        Returns:
          `labels` [H, W], `marginals` [H, W, C], `entropy` [H, W], `class_names`, `palette`, at the photograph's size.

        Raises:
          UserError: the file cannot be read or is too large, the array is not a photograph, or `iterations` is out of
            range.
        """
        ((labels, marginals),) = self.many([self._image(photograph)], iterations, marginals=True)
        assert marginals is not None
        return Segmentation(labels, marginals, self.class_names, self.palette)

    @abstractmethod
    def many(
        self, images: Sequence[np.ndarray], iterations: int | None = None, marginals: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Segments several photographs, uint8 [H, W, 3] each, together.

        Returns:
          For each (labels uint8 [H, W], marginals [H, W, C] if requested else None: float32, float16 for a large one).

        Raises:
          UserError: a photograph of another shape, type or size than the model accepts.
        """

    def plan(self, sizes: Sequence[tuple[int, int]]) -> None:  # noqa: B027
        """Announces the sizes (H, W) of the photographs to come; an artifact's programs are fixed."""

    @property
    def programs(self) -> dict[str, int]:
        """The number of programs used, by kind."""
        return {}

    @property
    @abstractmethod
    def identity(self) -> list:
        """JSON values that distinguish this model and its settings from others."""

    @abstractmethod
    def remark(self, size: tuple[int, ...]) -> str:
        """A remark on how a photograph of size (H, W) is segmented; "" if unchanged."""

    def _count(self, iterations: int | None) -> int:
        """The number of iterations to use; an excessive one is refused before anything is computed."""
        count = self.crf_iterations if iterations is None else iterations
        try:
            check_iterations(count)
        except ValueError as e:
            raise UserError(str(e)) from e
        return int(count)

    def _image(self, photograph: str | os.PathLike | np.ndarray) -> np.ndarray:
        if isinstance(photograph, str | os.PathLike):
            return read_photograph(photograph, refuse_above=self.refuse_above)
        image = np.asarray(photograph)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(
                f"photograph: is {image.dtype} {list(image.shape)}; give a file, or RGB as uint8 [H, W, 3] in 0..255"
            )
        return image
