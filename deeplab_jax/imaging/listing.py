"""Which files a command works on, and what their results are called."""

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import IMAGE_SUFFIXES

PHOTOGRAPHS = frozenset(IMAGE_SUFFIXES)
VIDEOS = frozenset({".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".mts", ".3gp", ".ogv"})
# Folders that systems and tools put between data: hidden ones, and these.
SYSTEM_FOLDERS = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
)
_LONGEST_ENDING = len("_iterations.png")
_LONGEST_NAME = 255  # bytes that file systems take


def walk(folder: Path, suffixes: Iterable[str] = PHOTOGRAPHS, exclude: Path | None = None) -> Iterator[Path]:
    """The files below a folder with these suffixes, in any case, sorted by path.

    Symbolic links are followed, but not into a folder that one is already in. Hidden files and folders, those of
    `SYSTEM_FOLDERS` and folders with an image's suffix are no images.

    Args:
      exclude: a resolved folder that is not entered.
    """
    suffixes = frozenset(suffixes)
    found = []

    def enter(here: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            entries = list(os.scandir(here))
        except OSError as e:
            raise UserError(f"{here}: cannot be read ({e.strerror}); check its permissions") from e
        for entry in entries:
            if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS:
                continue
            try:
                is_folder = entry.is_dir()
                place = os.stat(entry.path) if is_folder else None
            except OSError:  # a broken or circular link
                continue
            if is_folder:
                key = (place.st_dev, place.st_ino)
                if key not in above and (exclude is None or Path(entry.path).resolve() != exclude):
                    enter(entry.path, above | {key})
            elif os.path.splitext(entry.name)[1].lower() in suffixes and entry.is_file():
                found.append(Path(entry.path))

    root = os.stat(folder)
    enter(os.fspath(folder), frozenset({(root.st_dev, root.st_ino)}))
    return iter(sorted(found))


@dataclass(frozen=True)
class Input:
    """A file that was named, or found below a folder that was named.

    Attributes:
      path: where it is.
      root: the named folder, or the folder of the named file.
    """

    path: Path
    root: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS

    def stem(self, level: int = 0) -> str:
        """The name of the results, without an ending; each level tells more inputs apart than the one before.

        Level 0 is the path below `root` without its suffix (`trip/a`), level 1 keeps the suffix (`trip/a.jpg`), and
        each further level puts one more of the root's own folders in front (`photos/trip/a.jpg`).
        """
        relative = self.path.relative_to(self.root)
        if level == 0:
            relative = relative.with_suffix("")
        else:
            parents = self.root.resolve().parts[1:]
            relative = Path(*parents[len(parents) - min(level - 1, len(parents)) :], relative)
        return relative.with_name(_short(relative.name)).as_posix()


def _short(name: str) -> str:
    """A name to which every ending of a result fits: cut, with a digest of the whole, where it is too long."""
    encoded = os.fsencode(name)
    room = _LONGEST_NAME - _LONGEST_ENDING
    if len(encoded) <= room:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: room - 9].decode(errors='ignore')}~{digest}"


def find_inputs(paths: Iterable[str | Path], exclude: str | Path | None = None) -> list[Input]:
    """Lists the photographs and videos that `paths` name: files as given, folders searched to the bottom, sorted.

    A file given by name is taken whatever its suffix; below a folder, what `walk` finds is. A file reached twice is
    listed once.

    Args:
      exclude: a folder whose files are left out (where the results go, if that lies inside a folder of `paths`).

    Raises:
      UserError: a path does not exist, or there is nothing to work on.
    """
    found: dict[Path, Input] = {}
    exclude = Path(exclude).resolve() if exclude is not None else None
    paths = [Path(path) for path in paths]
    for path in paths:
        if path.is_dir():
            skip = None if exclude == path.resolve() else exclude
            for file in walk(path, PHOTOGRAPHS | VIDEOS, skip):
                found.setdefault(file.resolve(), Input(file, path))
        elif path.exists():
            found.setdefault(path.resolve(), Input(path, path.parent))
        else:
            raise UserError(f"{path}: no such file or folder")
    if not found:
        raise UserError(f"{', '.join(map(str, paths)) or 'no PATH given'}: no photograph or video to work on")
    return list(found.values())


def result_stems(inputs: Sequence[Input], endings: Sequence[str] = ("", "_overlay")) -> list[str]:
    """Names the results of each input so that no two inputs write the same file.

    Args:
      endings: what is put after a stem to name its PNG files; `a_overlay.jpg` must not meet the overlay of `a.jpg`.

    >>> result_stems([Input(Path("in") / name, Path("in")) for name in ("a.jpg", "a.png", "b.png")])
    ['a.jpg', 'a.png', 'b']
    """
    levels = [0] * len(inputs)
    while True:
        stems = [item.stem(level) for item, level in zip(inputs, levels)]
        writers = defaultdict(set)
        for i, stem in enumerate(stems):
            for ending in endings:
                writers[stem + ending].add(i)
        clashing = set().union(*(ids for ids in writers.values() if len(ids) > 1))
        if not clashing:
            return stems
        for i in clashing:
            levels[i] += 1
