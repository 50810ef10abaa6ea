"""The network's scores of the held-out images, computed once and stored, and measuring the CRF on them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.console import Meter
from deeplab_jax.crf import plain
from deeplab_jax.crf.gaussian import TRUNCATE
from deeplab_jax.crf.kernels import choose_bilateral, image_kernels
from deeplab_jax.crf.mean_field import solve
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import WEIGHT_FIELDS, truncation_radius
from deeplab_jax.data import reading
from deeplab_jax.files import write_atomically, write_text
from deeplab_jax.inference import buckets
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.inference.tiling import padded_size
from deeplab_jax.metrics import trimap
from deeplab_jax.metrics.confusion import confusion_matrix
from deeplab_jax.runs.devices import in_order
from deeplab_jax.runs.job import Job
from deeplab_jax.search.grid import Candidate, Counts


class ScoreStore:
    """Log-probabilities of some images of a data set, float16 [H, W, C], one file each.

    Args:
      folder: their folder.
      dataset: the images.
      indices: the images to use; `complete` removes undecodable ones that are to be skipped.
      about: what the scores were computed with; scores about anything else are recomputed.
      job: the processes that share the images; all see the same folder.
    """

    def __init__(self, folder: Path, dataset, indices: Sequence[int], about: Mapping, job: Job | None = None):
        self.folder, self.dataset, self.indices, self.job = folder, dataset, list(indices), job or Job()
        text = json.dumps(about, sort_keys=True) + "\n"
        head = folder / "about.json"

        def is_mine() -> bool:
            return head.is_file() and head.read_text() == text

        if self.job.is_first and not is_mine():
            for old in folder.glob("*.npy"):
                old.unlink()
            write_text(head, text)
        self.job.wait_until(is_mine)

    def __len__(self) -> int:
        return len(self.indices)

    def path(self, i: int) -> Path:
        return self._file(self.indices[i])

    def complete(self, segmenter: Callable[[], Segmenter], say: Callable[[str], None] = print) -> None:
        """Computes missing scores on all devices of `segmenter`, which is created only if some are missing.

        Raises:
          UserError: an image cannot be decoded and is not to be skipped, or none can.
        """
        missing = [(i, index) for i, index in enumerate(self.indices) if not self.path(i).is_file()]
        meter = Meter(len(self))
        meter.known(len(self) - len(missing))
        damaged = set()

        def decoded() -> Iterator[tuple[int, np.ndarray]]:
            """This process's images; each process determines all damaged ones."""
            for i, index in missing:
                example = reading.read(self.dataset, index)
                if example is None:
                    damaged.add(index)
                elif self.job.owns(i):
                    yield index, example.image

        def compute(image: tuple[int, np.ndarray]) -> None:
            scores = network.scores([image[1]])[0].astype(np.float16)
            write_atomically(self._file(image[0]), partial(np.save, arr=scores))

        images = decoded()
        first = next(images, None)
        if first is not None:
            network = segmenter()
            network.plan(reading.known_sizes(self.dataset, self.indices))
            for _ in in_order(compute, chain([first], images), network.devices):
                if meter.tick():
                    left = f", {meter.left}" if meter.done < meter.total else ""
                    say(f"network: {meter.done} of {meter.total} images{left}")
        whole = [index for _, index in missing if index not in damaged]
        self.job.wait_until(lambda: all(self._file(index).is_file() for index in whole))
        self.indices = [index for index in self.indices if index not in damaged]
        if damaged:
            say(f"{len(damaged)} images cannot be decoded and are left out; {len(self)} remain")
        if not self.indices:
            raise reading.all_corrupt(self.dataset)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.npy"

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(log-probabilities float32 [H, W, C], image uint8 [H, W, 3], label uint8 [H, W])."""
        example = self.dataset[self.indices[i]]
        return np.load(self.path(i), allow_pickle=False).astype(np.float32), example.image, example.label


def shared_shapes(store: ScoreStore, size_multiple: int) -> Callable[[tuple[int, int]], tuple[int, int]]:
    """The padded size for each image of a store, one of few: sides are multiples of `size_multiple` plus one."""
    sizes = reading.known_sizes(getattr(store, "dataset", None), getattr(store, "indices", ()))
    shapes = buckets.choose(sizes, size_multiple) if sizes else []

    def shape(size: tuple[int, int]) -> tuple[int, int]:
        height, width = size
        alone = padded_size(height, size_multiple), padded_size(width, size_multiple)
        return buckets.smallest_holding(size, shapes) or alone

    return shape


def padded(
    log_probs: np.ndarray, image: np.ndarray, label: np.ndarray, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """An example of a `ScoreStore`, padded to a shared size.

    Returns:
      (unary [H', W', C], image [H', W', 3], label [H', W'] with 255 added, mask [H', W'] of the example's own pixels).
    """
    padding = [(0, whole - n) for whole, n in zip(shape, label.shape, strict=True)]
    mask = np.pad(np.ones(label.shape, bool), padding)
    label = np.pad(label, padding, constant_values=255)
    return np.pad(-log_probs, [*padding, (0, 0)]), np.pad(image, [*padding, (0, 0)]), label, mask


class CRFScorer:
    """Measures settings on stored scores (see `search.Scorer`).

    Args:
      store: the scores.
      objective: "mean_iou", or "trimap": mean IoU within `trimap_width` pixels of the true boundaries, or "both".
      iterations: of the mean field.
      bilateral: the filter.
      trimap_width: pixels.
      size_multiple: images are padded to a multiple of this plus one, and to few sizes if all are known.
    """

    def __init__(
        self,
        store: ScoreStore,
        objective: str = "mean_iou",
        iterations: int = 10,
        bilateral: str = "auto",
        trimap_width: int = 5,
        size_multiple: int = 32,
    ):
        self.store, self.objective = store, objective
        self.iterations, self.bilateral = iterations, bilateral
        self.trimap_width = trimap_width
        self._padded_shape = shared_shapes(store, size_multiple)

    def __len__(self) -> int:
        return len(self.store)

    def count(self, image: int, settings: Sequence[Candidate | None]) -> Iterator[tuple[Candidate | None, dict]]:
        """Yields (setting, {"mean_iou": counts, "trimap": counts}); settings of the same widths share one lattice."""
        log_probs, photograph, label = self.store[image]
        height, width, classes = log_probs.shape
        band = (~trimap.trimap(label, self.trimap_width)).astype(np.uint8)

        def counts(labels: np.ndarray) -> dict[str, Counts]:
            inside, outside = confusion_matrix(label, labels, classes, band, 2)
            return {"mean_iou": Counts.of(inside + outside), "trimap": Counts.of(inside)}

        if None in settings:
            yield None, counts(log_probs.argmax(-1))
        shape = self._padded_shape((height, width))
        chosen = choose_bilateral(self.bilateral, *shape)
        alike = sorted((s for s in settings if s is not None), key=lambda s: (s.widths, s.normalization, s))
        for _, same in groupby(alike, key=lambda s: (s.widths, s.normalization)):
            group = list(same)
            options = Options(
                iterations=self.iterations,
                normalization=group[0].normalization,
                bilateral=chosen,
                radius=truncation_radius(group[0].gaussian_xy_std, TRUNCATE),
            )
            labels = self._labels(log_probs, photograph, shape, group[0].params, options)
            for setting in group:
                yield setting, counts(labels(*(getattr(setting.params, name) for name in WEIGHT_FIELDS)))

    def _labels(self, log_probs, photograph, shape, params, options) -> Callable[..., np.ndarray]:
        """The labels [H, W] as a function of the two weights; by the filter that `mean_field` uses here."""
        if plain.covers(options, params):
            marginals = plain.for_weights(-log_probs, photograph, params, options)
            if marginals is not None:
                return lambda *weights: marginals(*weights).argmax(-1).astype(np.uint8)
        height, width, classes = log_probs.shape
        unary, pixels, _, mask = map(jnp.asarray, padded(log_probs, photograph, np.zeros((height, width)), shape))
        unary, mask = unary.reshape(-1, classes), mask.ravel()
        kernels = _kernels(pixels, params, mask, options)

        def labels(*weights) -> np.ndarray:
            found = _most_probable(unary, kernels, list(map(jnp.float32, weights)), mask, options)
            return np.asarray(found).reshape(shape)[:height, :width]

        return labels


@partial(jax.jit, static_argnames="options")
def _kernels(image, params, mask, options):
    return image_kernels(image, params, mask, options, jnp.float32)


@partial(jax.jit, static_argnames="options")
def _most_probable(unary, kernels, weights, mask, options):
    kernels = [kernel.replace(weight=weight) for kernel, weight in zip(kernels, weights)]
    return solve(unary, kernels, None, mask, options).argmax(-1).astype(jnp.uint8)
