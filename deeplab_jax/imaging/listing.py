"""Which files a command works on, and what their results are called."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import IMAGE_SUFFIXES

PHOTOGRAPHS = frozenset({*IMAGE_SUFFIXES, ".jfif", ".jpe", ".gif", ".pbm", ".pnm", ".jp2", ".tga"})
VIDEOS = frozenset({".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".mts", ".3gp", ".ogv"})


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
            return relative.with_suffix("").as_posix()
        parents = self.root.resolve().parts[1:]
        return Path(*parents[len(parents) - min(level - 1, len(parents)) :], relative).as_posix()


def find_inputs(paths: Iterable[str | Path], exclude: str | Path | None = None) -> list[Input]:
    """Lists the photographs and videos that `paths` name: files as given, folders searched to the bottom, sorted.

    A file given by name is taken whatever its suffix; below a folder, the known suffixes are, and hidden files are
    not. A file reached twice is listed once.

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
            for file in sorted(path.rglob("*")):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                known = file.suffix.lower() in PHOTOGRAPHS | VIDEOS
                if known and not hidden and file.is_file() and skip not in file.resolve().parents:
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
