"""The division of a folder's examples into training, validation and test splits."""

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files
from deeplab_jax.imaging.pairing import normal

_FOLDERS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip


def folders(sources: Sequence[base.Source]) -> dict[str, np.ndarray]:
    """The splits that the topmost folders of the examples' names define; {} if they define none.

    Raises:
      UserError: some examples are in folders of splits, others beside them.
    """
    of = _split_names(sources)
    found = {name for name in of if name}
    if "train" not in found or len(found) < 2:
        return {}
    outside = next((s for s, name in zip(sources, of) if name is None), None)
    if outside is not None:
        raise UserError(
            f"{outside.image}: is beside the folders {' and '.join(sorted(found))}, so it is in no split; move it, "
            "or name the splits with config.data.train_list and config.data.val_list"
        )
    return {split: np.array([i for i, name in enumerate(of) if name == split]) for split in sorted(found)}


def unlabelled(sources: Sequence[base.Source]) -> set[str]:
    """Names of examples that need no mask: those of a test folder in which no image has one."""
    of = _split_names(sources)
    test = [s for s, name in zip(sources, of) if name == "test"]
    if any(s.label is not None for s in test) or "train" not in of:
        return set()
    return {s.name for s in test}


def _split_names(sources: Sequence[base.Source]) -> list[str | None]:
    """The split that the topmost folder of each example's name is called after, or None."""
    return [_FOLDERS.get(s.name.split("/")[0].casefold()) if "/" in s.name else None for s in sources]


def test_examples(sources: Sequence[base.Source]) -> np.ndarray:
    """The examples of a test folder beside one for training."""
    of = _split_names(sources)
    return np.array([i for i, name in enumerate(of) if name == "test" and "train" in of], int)


def select(builder, sources: Sequence[base.Source], split: str, seed: int) -> np.ndarray | None:
    """The numbers of a split's examples; None = all.

    Args:
      builder: of `folder`, for its options and paths.
      sources: all examples.
      split: train, val, test or all.
      seed: draws the validation images if neither folders nor lists name them.

    Raises:
      UserError: a list cannot be read or names an image that does not exist, or a split would be empty.
    """
    options = builder.options
    lists = {"train": options.train_list, "val": options.val_list}
    by_folder = folders(sources) if not any(lists.values()) else {}
    test = test_examples(sources)  # also where lists divide the others
    rest = np.setdiff1d(np.arange(len(sources)), test)
    if split == "all":
        return rest if len(test) else None
    if split == "test":
        return test
    if split in by_folder and "val" in by_folder:
        return by_folder[split]
    if lists.get(split):
        return _listed(builder, f"{split}_list", sources)
    other = "val" if split == "train" else "train"
    if lists[other]:
        return np.setdiff1d(rest, _listed(builder, f"{other}_list", sources))
    fraction = options.val_fraction
    if not 0 <= fraction < 1:
        raise UserError(f"config.data.val_fraction={fraction}: must be at least 0 and below 1")
    count = min(max(1, round(fraction * len(rest))), len(rest) - 1) if fraction else 0
    order = np.random.default_rng([seed, 77]).permutation(len(rest))
    return rest[np.sort(order[:count] if split == "val" else order[count:])]


def _listed(builder, field: str, sources: Sequence[base.Source]) -> np.ndarray:
    """The examples that a list names, in its order, each once; or those in a folder."""
    path = builder._resolve(field)
    names = [s.name for s in sources]
    if path.is_dir():
        inside = path.resolve()
        folders_of = [Path(str(s.image)).parent.resolve() for s in sources]  # links to images elsewhere count here
        chosen = [i for i, folder in enumerate(folders_of) if inside in (folder, *folder.parents)]
        if not chosen:
            raise UserError(f"config.data.{field}={path}: is a folder with no image of {builder.options.images}")
        return np.array(chosen)
    find = _Names(names)
    listed: dict[int, None] = {}
    for line in base.read_names(path):
        found = find(line) or find(_first_of_pair(line))
        if not found:
            raise UserError(f"{path}: names '{line}', but there is no such image in {builder.options.images}")
        if len(found) > 1:
            several = " and ".join(f"'{names[i]}'" for i in found[:2])
            raise UserError(f"{path}: '{line}' may be {several} in {builder.options.images}; write its folder too")
        listed[found[0]] = None
    return np.array(list(listed))


class _Names:
    """Finds examples by their names in a list: paths that end with an example's name, or with which a name ends."""

    def __init__(self, names: Sequence[str]):
        self._by_name = {_parts(name): i for i, name in enumerate(names)}
        self._by_end: dict[tuple[str, ...], list[int]] = {}
        for parts, i in self._by_name.items():
            for start in range(len(parts)):
                self._by_end.setdefault(parts[start:], []).append(i)

    def __call__(self, text: str) -> list[int]:
        """The numbers of examples that `text` may name, with or without an image's suffix; empty if there are none."""
        path = PurePosixPath(text.replace("\\", "/"))
        spellings = [path.with_suffix(""), path] if path.suffix.lower() in files.IMAGE_SUFFIXES else [path]
        return next((found for s in spellings if (found := self._find(_parts(s.as_posix())))), [])

    def _find(self, parts: tuple[str, ...]) -> list[int]:
        if parts in self._by_name:
            return [self._by_name[parts]]
        if parts in self._by_end:  # the list omits folders
            return self._by_end[parts]
        ends = (parts[start:] for start in range(1, len(parts)))  # the list has additional folders
        return next(([self._by_name[end]] for end in ends if end in self._by_name), [])


def _parts(name: str) -> tuple[str, ...]:
    return tuple(part for part in PurePosixPath(normal(name)).parts if part not in ("/", ".", ".."))


def _first_of_pair(line: str) -> str:
    """The image of a line `image mask` or `image 1`, as in VOC's lists; "" for other lines.

    If only the second word has an image's suffix, the line is one name with a space in it.
    """
    words = line.split()
    if len(words) != 2:
        return ""
    first, second = (PurePosixPath(w).suffix.lower() in files.IMAGE_SUFFIXES for w in words)
    return words[0] if first or not second else ""
