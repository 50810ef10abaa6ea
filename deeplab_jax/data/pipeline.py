"""Training batches: batch n is a pure function of the seed and n, independent of threads and processes."""

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np

from deeplab_jax.data import reading
from deeplab_jax.data.augment import VOID, Augmentation, augment
from deeplab_jax.data.dataset import Example, SegmentationDataset
from deeplab_jax.errors import UserError
from deeplab_jax.limits import CROP_SCALES, CROP_SIDES

_ORDER, _AUGMENT = 0, 1  # two independent streams of random numbers
_BATCHES_AHEAD = 4
_STAGE_FORM = (
    "needs entries (share of the steps, (height, width), (scale, ...)), shares of at least 0 and at most 1 in total"
)


class TrainBatches:
    """Endless iterator over training batches from `first_step` on; created by `train_batches`.

    Example g of the run is row g % batch_size of batch g // batch_size. Each epoch is a permutation of the data set
    drawn from (seed, epoch); the augmentation of example g is drawn from (seed, g). The examples are a
    `grain.MapDataset`, read by number in any order: the position of a run is a number, not the state of a reader.
    """

    def __init__(self, dataset: SegmentationDataset, config, *, first_step: int, rows: Sequence[int]):
        self.dataset, self.rows = dataset, rows
        self.batch_size, self.seed = config.batch_size, config.seed
        spec = Augmentation.from_config(config.data, config.model.preprocessing == "own_rgb")
        self.stages = [
            (s.end, dataclasses.replace(spec, crop=(s.crop[0], s.crop[1]), scales=s.scales)) for s in stages(config)
        ]
        self._permutations: dict[int, np.ndarray] = {}
        numbers = grain.MapDataset.range(first_step * len(rows), sys.maxsize)
        options = grain.ReadOptions(max(1, config.data.workers), prefetch_buffer_size=_BATCHES_AHEAD * len(rows))
        self._batches = iter(numbers.map(self._element).to_iter_dataset(options).batch(len(rows)))

    @property
    def skipped(self) -> set[str]:
        """Names of corrupt examples that were replaced by the next ones (`config.data.on_corrupt = "skip"`)."""
        return self.dataset.skipped

    def __iter__(self) -> "TrainBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._batches)

    def close(self) -> None:
        """Stops the threads."""
        self._batches.close()

    def _element(self, number: int) -> dict[str, np.ndarray | np.generic]:
        """The `number`-th example of the run among those that this process reads."""
        step, place = divmod(number, len(self.rows))
        image, label, valid = self.example(step, self.rows[place])
        return {"image": image, "label": label, "valid": valid, "index": np.int32(self.rows[place])}

    def position(self, number: int) -> int:
        """The index in the data set of the run's example `number`."""
        epoch, place = divmod(number, len(self.dataset))
        order = self._permutations.get(epoch)
        if order is None:
            order = np.random.default_rng([self.seed, _ORDER, epoch]).permutation(len(self.dataset))
            self._permutations[epoch] = order
            for old in [e for e in list(self._permutations) if e < epoch - 2]:
                self._permutations.pop(old, None)
        return int(order[place])

    def example(self, step: int, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Row `row` of global batch `step`: image, label, valid as `augment` returns them."""
        number = step * self.batch_size + row
        source = self.source(number)
        spec = next((spec for end, spec in self.stages if step < end), self.stages[-1][1])
        if source.label is None:
            raise UserError(f"{source.name}: has no label to learn from; choose another config.data.train_split")
        return augment(source.image, source.label, spec, np.random.default_rng([self.seed, _AUGMENT, number]))

    def source(self, number: int) -> Example:
        """The source of the run's example `number`: its photograph, or the next one that can be decoded."""
        first = self.position(number)
        for k in range(len(self.dataset)):
            example = reading.read(self.dataset, (first + k) % len(self.dataset))
            if example is not None:
                return example
        raise reading.all_corrupt(self.dataset)


class Stage(NamedTuple):
    """A part of a run with crops and scales of its own.

    Attributes:
      end: the first step after it.
      crop: height and width, pixels.
      scales: of `config.data.scales`' form.
      field: its place in the config after "config.data.": "stages[0]", or "" for `crop` and `scales`.
    """

    end: int
    crop: tuple[int, ...]
    scales: tuple[float, ...]
    field: str

    def named(self, name: str) -> str:
        """The name of this stage's `crop` or `scales` in messages."""
        return f"config.data.{self.field}: {name}" if self.field else f"config.data.{name}"


def stages(config) -> tuple[Stage, ...]:
    """The stages of a run that have steps: those of `config.data.stages`, then `crop` and `scales` to the end.

    Raises:
      UserError: an entry is not (share, crop, scales), or the sum of the shares is not between 0 and 1.
    """
    found, begin, share = [], 0, 0.0
    for i, entry in enumerate(config.data.stages):
        try:
            part, crop, scales = entry[0], tuple(entry[1]), tuple(float(s) for s in entry[2])
            share += part
            fits = len(entry) == 3 and part >= 0 and share < 1 + 1e-9  # 0.05 + 0.55 + 0.3 + 0.1 is more than 1
        except (TypeError, ValueError, IndexError) as e:
            raise UserError(f"config.data.stages={config.data.stages}: {_STAGE_FORM}") from e
        if not fits:
            raise UserError(f"config.data.stages={config.data.stages}: {_STAGE_FORM}")
        end = min(round(share * config.num_steps), config.num_steps)
        if end > begin:
            found.append(Stage(end, crop, scales, f"stages[{i}]"))
        begin = max(begin, end)
    rest = Stage(config.num_steps, tuple(config.data.crop), tuple(float(s) for s in config.data.scales), "")
    return (*found, rest)


def check_augmentation(config) -> None:
    """Raises UserError for crops, scales or stages that are impossible."""
    for stage in stages(config):
        scales, crop = stage.scales, stage.crop
        if config.data.continuous_scale and len(scales) != 2:
            raise UserError(
                f"{stage.named('scales')}: with continuous_scale, give two numbers, the smallest and the largest"
            )
        if not scales or min(scales) <= 0:
            raise UserError(f"{stage.named('scales')}={scales}: needs at least one scale, all above 0")
        if len(crop) != 2 or not all(isinstance(n, int) and n > 0 for n in crop):
            raise UserError(f"{stage.named('crop')}={crop}: must be two sizes in pixels, height and width")
        for name, values, (least, most) in (("scales", scales, CROP_SCALES), ("crop", crop, CROP_SIDES)):
            if not all(least <= v <= most for v in values):
                raise UserError(f"{stage.named(name)}={values}: must be between {least:g} and {most:g}")


def train_batches(
    dataset: SegmentationDataset,
    config,
    *,
    first_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
) -> TrainBatches:
    """Batches for training, from `first_step` on, prepared ahead by `config.data.workers` threads.

    Args:
      dataset: a training split, with labels.
      config: `batch_size` (global), `seed`, `data` and `optimizer.accumulate` are used.
      first_step: the position; resuming needs nothing else.
      process_index, process_count: this process gets rows `[p * m / P, (p + 1) * m / P)` of each of a batch's
        micro-batches of m rows, so that a micro-batch holds the same examples for any number of processes.

    Returns:
      An iterator of dicts: `image` uint8 `[b, h, w, 3]` RGB, `label` uint8 `[b, h, w]` (255 = void and padding),
      `valid` bool `[b, h, w]` (False = padding), `index` int32 `[b]`, the row within the global batch.

    Raises:
      UserError: the batch does not divide by processes and micro-batches, or a setting is impossible.
    """
    check_augmentation(config)
    accumulate = config.optimizer.accumulate
    if config.batch_size % (process_count * accumulate):
        micro = f" times config.optimizer.accumulate={accumulate}" if accumulate > 1 else ""
        raise UserError(
            f"config.batch_size={config.batch_size}: must be divisible by the {process_count} processes{micro}"
        )
    rows = np.arange(config.batch_size).reshape(accumulate, process_count, -1)[:, process_index].ravel().tolist()
    return TrainBatches(dataset, config, first_step=first_step, rows=rows)


def prefetch(batches: Iterator, transfer: Callable = lambda batch: batch, size: int = 2) -> Iterator:
    """Yields `transfer(batch)` in order, `size` of them started before they are requested.

    With `transfer = jax.device_put` or a sharded variant, copies to the device overlap the step.
    """
    ahead: deque = deque()
    for batch in batches:
        ahead.append(transfer(batch))
        if len(ahead) > size:
            yield ahead.popleft()
    yield from ahead


__all__ = ["VOID", "Stage", "TrainBatches", "check_augmentation", "prefetch", "stages", "train_batches"]
