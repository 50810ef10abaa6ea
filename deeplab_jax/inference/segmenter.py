"""Photograph -> marginals: the single path shared by evaluation, prediction, parameter search and the local page."""

import inspect
import threading
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax import crf
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.light import mean_and_deviation
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.inference import buckets, tiling
from deeplab_jax.inference.finite import most_probable, require_finite
from deeplab_jax.inference.views import LOG_FLOOR, network_scores

_PLANNED_MULTIPLE = 32  # for sides, if sizes are known and few anyway


@dataclass(frozen=True)
class Segmentation:
    """The result for one photograph.

    Attributes:
      labels: [H, W] uint8, the most probable class.
      marginals: [H, W, C] float32 (float16 for a large photograph), non-negative, sums to 1 over C.
      class_names: C names.
      palette: [256, 3] uint8 RGB.
    """

    labels: np.ndarray
    marginals: np.ndarray
    class_names: tuple[str, ...]
    palette: np.ndarray = field(repr=False)

    @property
    def entropy(self) -> np.ndarray:
        """Entropy of the marginals, [H, W] float32, in nats: 0 where certain, log C where all classes are equal."""
        rows = np.empty(self.labels.shape, np.float32)
        for y, q in enumerate(self.marginals):  # row by row: no second copy of the marginals
            q = q.astype(np.float32)
            rows[y] = -(q * np.log(np.maximum(q, 1e-12))).sum(-1)
        return rows


class Segmenter:
    """Runs a network and its CRF on photographs of any size.

    Images are padded at the bottom and right, with a mask that sets the padding to the mean colour for the network and
    excludes it from the CRF, so that photographs of many sizes share a few compiled programs. `plan` chooses the padded
    shapes for sizes that are known in advance; without it, and for larger images, they are `size_multiple * k +
    size_extra`. Results do not depend on which images are batched together. Safe to call from several threads.

    Attributes:
      programs: (kind, shape, device) of the programs used; their number is the cost of compiling for
        a data set of many sizes.
    """

    def __init__(
        self,
        model,
        variables: dict,
        setting: crf.Setting,
        class_names: Sequence[str] = (),
        palette: np.ndarray | None = None,
        *,
        compatibility: np.ndarray | None = None,
        scales: Sequence[float] = (1.0,),
        mirror: bool = False,
        mirror_swaps: Sequence[tuple[int, int]] = (),
        tile: int = 0,
        batch_size: int = 1,
        size_multiple: int = 32,
        size_extra: int = 1,
        resize: str = "corners",
        devices: Sequence[jax.Device] | None = None,
    ):
        """Keeps a copy of `variables` on each device.

        Args:
          model: a module whose `apply(variables, images, train=False, valid=valid)` returns (scores, out). If it also
            takes a `canvas`, as `DeepLab` does, scores do not depend on the size to which a photograph is padded.
          variables: its variables.
          setting: of the CRF, for photographs at their own size; its iterations are what callers use by default,
            0 = without the CRF.
          class_names: C names.
          palette: [256, 3] uint8; None = PASCAL VOC's.
          compatibility: [C, C] label compatibility; None = Potts.
          scales: test-time scales whose probabilities are averaged.
          mirror: whether to average with the mirrored image.
          mirror_swaps: pairs of classes that a mirror exchanges (left and right parts).
          tile: side of the overlapping tiles in which larger images go through the network; 0 = whole images.
          batch_size: images of one padded shape that go through the network together.
          size_multiple: see the class; a multiple of 8.
          size_extra: the network's `Architecture.size_extra`.
          resize: the network's `Architecture.resize`, for test-time scales and the way back to the photograph.
          devices: the work is spread over these; default the first local device.
        """
        if size_multiple % tiling.STRIDE:
            raise ValueError(f"size_multiple={size_multiple} must be a multiple of {tiling.STRIDE}")
        self.model = model
        self.setting, self.compatibility = setting, compatibility
        self.class_names, self.palette = tuple(class_names), voc_palette() if palette is None else palette
        self.scales, self.mirror = tuple(float(s) for s in scales), mirror
        self.mirror_swaps = tuple((int(a), int(b)) for a, b in mirror_swaps)
        self.tile = tiling.padded_size(tile, size_multiple, size_extra) if tile else 0
        self.batch_size, self.size_multiple, self.size_extra = batch_size, size_multiple, size_extra
        self.resize = resize
        takes_canvas = "canvas" in inspect.signature(type(model).__call__).parameters
        self.canvas_multiple = min(size_multiple, _PLANNED_MULTIPLE) if takes_canvas else None
        self.devices = list(devices) if devices else jax.local_devices()[:1]
        self.programs: set[tuple] = set()
        self._shapes: list[tuple[int, int]] = []
        self._compiling: dict[tuple, threading.Lock] = {}
        self._variables = [jax.device_put(variables, d) for d in self.devices]
        self._lock = threading.Lock()
        self._next_device = 0

    # ---- what callers use ------------------------------------------------------------------------------------------

    def scores(self, images: Sequence[np.ndarray], light: np.ndarray | None = None) -> list[np.ndarray]:
        """The network's log-probabilities, float32 [H, W, C], of each [H, W, 3] uint8 RGB image at its own size.

        Args:
          images: the photographs, or pieces of one.
          light: `light_of` the photograph of which the images are pieces; None = each has its own.
        """
        padded = self._padded_scores(images, self._device(), light)
        return [np.asarray(s)[: i.shape[0], : i.shape[1]] for s, i in zip(padded, images, strict=True)]

    @overload
    def refine(
        self, log_probs: np.ndarray, image: np.ndarray, iterations: int, params: "crf.CRFParams | None" = None
    ) -> np.ndarray: ...
    @overload
    def refine(
        self, log_probs: np.ndarray, image: np.ndarray, iterations: Sequence[int], params: "crf.CRFParams | None" = None
    ) -> list[np.ndarray]: ...
    def refine(self, log_probs, image, iterations, params=None) -> np.ndarray | list[np.ndarray]:
        """Mean field on the photograph, at its own size.

        Args:
          log_probs: [H, W, C] float32, as returned by `scores`.
          image: [H, W, 3] uint8 RGB.
          iterations: one number, or several, all taken from one pass.
          params: overrides the setting's.

        Returns:
          Marginals [H, W, C] float32, or a list of them if `iterations` is a sequence.

        Raises:
          UserError: marginals are not finite.
        """
        one = isinstance(iterations, int | np.integer)
        counts = (int(iterations),) if one else tuple(iterations)
        h, w = image.shape[:2]
        found = self._mean_field(log_probs, image, counts, self._device(), params)
        cropped = [np.asarray(q)[:h, :w] for q in found]
        for q in cropped:
            require_finite(np.isfinite(q.min()))  # NumPy's minimum propagates NaN: no second array
        return cropped[0] if one else cropped

    def labels(
        self, images: Sequence[np.ndarray], iterations: Sequence[int], light: np.ndarray | None = None
    ) -> list[list[np.ndarray]]:
        """Most probable classes, [H, W] uint8, for each image and each number of CRF iterations.

        One network pass per image and one CRF pass; the marginals never leave the device. For `light` see `scores`.

        Raises:
          UserError: marginals are not finite.
        """
        device = self._device()
        result = []
        for scores, image in zip(self._padded_scores(images, device, light), images, strict=True):
            found = [most_probable(q) for q in self._mean_field(scores, image, tuple(iterations), device)]
            require_finite(all(finite for _, finite in found))
            result.append([np.asarray(labels)[: image.shape[0], : image.shape[1]] for labels, _ in found])
        return result

    def light_of(self, photograph: np.ndarray) -> np.ndarray | None:
        """[1, 2] float32, mean and standard deviation for networks that take each photograph's own, else None."""
        own = getattr(self.model, "architecture", None)
        if own is None or own.preprocessing != "own_rgb":
            return None
        return np.array([mean_and_deviation(photograph)], np.float32)

    @property
    def variables(self) -> dict:
        """The network's variables, on the first device."""
        return self._variables[0]

    def plan(self, sizes: Sequence[tuple[int, int]]) -> None:
        """Chooses few padded shapes for photographs of these sizes (H, W), replacing earlier ones."""
        self.pad_to(buckets.choose(sizes, min(self.size_multiple, _PLANNED_MULTIPLE), self.size_extra) if sizes else [])

    def pad_to(self, shapes: Sequence[tuple[int, int]]) -> None:
        """Pads each image to the smallest of these shapes that holds it; shapes are `padded_size`s."""
        self._shapes = sorted(shapes, key=lambda shape: shape[0] * shape[1])

    def padded_shape(self, size: tuple[int, int]) -> tuple[int, int]:
        """The (height, width) to which an image of this size is padded."""
        planned = buckets.smallest_holding(size, self._shapes)
        if planned:
            return planned
        height, width = (tiling.padded_size(n, self.size_multiple, self.size_extra) for n in size)
        return height, width

    def filter_used(self, size: tuple[int, int]) -> str:
        """The CRF's filter for an image of this size: "auto" depends on its padded shape, which is compiled."""
        return crf.choose_bilateral(
            self.setting.options["bilateral"], *self.padded_shape(size), self.devices[0].platform
        )

    # ---- the network -----------------------------------------------------------------------------------------------

    def _padded_scores(self, images: Sequence[np.ndarray], device: int, light: np.ndarray | None) -> list:
        """Log-probabilities of each image at its padded shape: device arrays, or host arrays if it was tiled."""
        groups = defaultdict(list)
        result: list[jax.Array | np.ndarray | None] = [None] * len(images)
        for i, image in enumerate(images):
            if self.tile and max(image.shape[:2]) > self.tile:
                result[i] = self._tiled_scores(image, device, self.light_of(image) if light is None else light)
            else:
                groups[self.padded_shape(image.shape[:2])].append(i)
        for members in groups.values():
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                shape = self.padded_shape(images[batch[0]].shape[:2])
                found = self._network([images[j] for j in batch], shape, device, light)
                for i, scores in zip(batch, found, strict=True):
                    result[i] = scores
        return result

    def _network(
        self, images: Sequence[np.ndarray], shape: tuple[int, int], device: int, light: np.ndarray | None
    ) -> list[jax.Array]:
        """At most `batch_size` images, padded to `shape`, through the network; empty images fill a short batch.

        `light` [1, 2] is that of the photograph of which the images are tiles or pieces; None = each has its own.
        """
        batch = np.zeros((self.batch_size, *shape, 3), np.uint8)
        sizes = np.ones((self.batch_size, 2), np.int32)
        for i, image in enumerate(images):
            batch[i] = tiling.pad(image, shape, mode="edge")
            sizes[i] = image.shape[:2]
        kind = ("network", *batch.shape, light is not None)
        run = partial(
            network_scores,
            self.model,
            scales=self.scales,
            mirror=self.mirror,
            swaps=self.mirror_swaps if self.mirror else (),
            extra=self.size_extra,
            resize=self.resize,
            multiple=self.canvas_multiple,
        )
        return list(self._run(kind, device, run, self._variables[device], batch, sizes, light))[: len(images)]

    def _tiled_scores(self, image: np.ndarray, device: int, light: np.ndarray | None) -> np.ndarray:
        """The same for a large image, in overlapping tiles whose probabilities are blended."""
        size, overlap = image.shape[:2], tiling.default_overlap(self.tile)
        rows, columns = (tiling.spans(n, self.tile, overlap) for n in size)
        windows = [(r, c) for r in rows for c in columns]
        height, width = self.padded_shape(size)
        shape = min(self.tile, height), min(self.tile, width)
        total = None
        for start in range(0, len(windows), self.batch_size):
            batch = windows[start : start + self.batch_size]
            tiles = [image[r.start : r.stop, c.start : c.stop] for r, c in batch]
            for (r, c), tile, scores in zip(batch, tiles, self._network(tiles, shape, device, light), strict=True):
                probs = np.exp(np.asarray(scores)[: tile.shape[0], : tile.shape[1]])
                weight = tiling.blend_weights(r, size[0], overlap)[:, None]
                weight = weight * tiling.blend_weights(c, size[1], overlap)[None]
                if total is None:
                    total = np.zeros((*self.padded_shape(size), probs.shape[-1]), np.float32)
                total[r.start : r.stop, c.start : c.stop] += weight[..., None] * probs
        assert total is not None, "there is at least one tile"
        valid = total[: size[0], : size[1]]
        valid /= valid.sum(-1, keepdims=True)
        np.log(valid, out=valid, where=valid > 0)
        np.maximum(valid, LOG_FLOOR, out=valid)
        return total

    def _mean_field(self, log_probs, image, counts: tuple[int, ...], device: int, params=None) -> list[jax.Array]:
        """Marginals at the padded shape after each number of iterations, from one run of the longest."""
        h, w = image.shape[:2]
        shape = self.padded_shape((h, w))
        if log_probs.shape[:2] != shape:
            log_probs = tiling.pad(np.asarray(log_probs, np.float32), shape)
        log_probs = jax.device_put(log_probs, self.devices[device])
        last = max(counts, default=0)
        found = {0: jnp.exp(log_probs)} if 0 in counts else {}
        if last:
            mask = np.zeros(shape, bool)
            mask[:h, :w] = True
            wanted = sorted(set(counts) - {0})
            several = len(wanted) > 1
            bilateral = self.filter_used((h, w))
            # Not inside a jit: mean_field chooses its own programs from the parameters' values.
            run = partial(
                crf.mean_field,
                iterations=last,
                bilateral=bilateral,
                normalization=self.setting.normalization,
                compatibility=None if self.compatibility is None else jnp.asarray(self.compatibility),
                return_all=wanted if several else False,
                prune=True,
            )
            image = jax.device_put(tiling.pad(image, shape), self.devices[device])
            params = self.setting.params if params is None else params
            kind = ("crf", bilateral, last, several, *log_probs.shape)
            try:
                q = self._run(kind, device, run, -log_probs, image, params, mask=mask)
            except ValueError as e:  # scores that are not finite, or weights for another number of classes
                raise UserError(f"the CRF cannot be run on the network's scores: {e}") from e
            found |= dict(zip(wanted, q, strict=True)) if several else {last: q}
        return [found[n] for n in counts]

    # ---- programs --------------------------------------------------------------------------------------------------

    def _device(self) -> int:
        """The next device in rotation."""
        with self._lock:
            self._next_device = (self._next_device + 1) % len(self.devices)
            return self._next_device

    def _run(self, kind: tuple, device: int, function, *args, **kwargs):
        """Calls `function`; if several threads need a program not yet compiled, one compiles and the others wait."""
        key = (*kind, device)
        with self._lock:
            mine = self._compiling.setdefault(key, threading.Lock())
        if key in self.programs:
            return function(*args, **kwargs)
        with mine:
            result = function(*args, **kwargs)
            self.programs.add(key)
            return result
