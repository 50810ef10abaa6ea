"""Reading examples that may be damaged: the first stops, or each one is skipped, named once and counted."""

import contextlib
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import CorruptImageError

if TYPE_CHECKING:
    from deeplab_jax.data.dataset import Example

_named: set[tuple[str, str, str]] = set()  # folder, split and name of examples already reported by this process


def read(dataset, i: int):
    """Example `i` of a data set, or None if it cannot be decoded and the data set skips such examples.

    Args:
      dataset: supports `ds[i]`; `skip_corrupt` of a `SegmentationDataset` decides whether to skip, and `skipped`
        collects names.
      i: its number.

    Raises:
      UserError: it cannot be decoded and is not to be skipped; names it.
    """
    try:
        return dataset[i]
    except CorruptImageError as e:
        if not skips(dataset):
            raise UserError(f"{e}, or set config.data.on_corrupt=skip to continue without it") from e
        name = name_of(dataset, i)
        dataset.skipped.add(name)
        told = (str(dataset.folder), dataset.split, name)
        if told not in _named:
            _named.add(told)
            logging.getLogger(__name__).warning("%s; skipped (%d so far)", e, len(dataset.skipped))
        return None


def known_sizes(dataset, indices: Iterable[int]) -> list[tuple[int, int]]:
    """(H, W) of the examples that have a header, without decoding them; empty if the data set has no sizes."""
    sizes = []
    if hasattr(dataset, "size"):
        for i in indices:
            with contextlib.suppress(CorruptImageError):  # reported when it is read
                sizes.append(dataset.size(i))
    return sizes


def readable(dataset) -> Iterator[tuple[int, "Example"]]:
    """(number, example) of those that can be decoded, in order.

    Raises:
      UserError: there is none, or like `read`.
    """
    found = False
    for i in range(len(dataset)):
        example = read(dataset, i)
        if example is not None:
            found = True
            yield i, example
    if not found:
        raise all_corrupt(dataset)


def skips(dataset) -> bool:
    """Whether damaged examples of this data set are to be skipped."""
    return bool(getattr(dataset, "skip_corrupt", False))


def name_of(dataset, i: int) -> str:
    """The name of an example, which need not be readable."""
    return dataset.record(i)["name"].decode()


def all_corrupt(dataset) -> UserError:
    """The error for a split in which nothing can be decoded."""
    name, split = getattr(dataset, "name", "data set"), getattr(dataset, "split", "")
    return UserError(f"{name} split '{split}': every image is corrupt; check config.data.dir")
