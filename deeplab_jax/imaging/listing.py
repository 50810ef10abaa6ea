"""Which files a command works on, and what their results are called."""

import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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


def shown(path: str | os.PathLike) -> str:
    """A path as it may be printed: control characters, direction marks and bytes that are no UTF-8 are escaped.

    >>> shown("a\\nb"), shown("\\u202egpj.exe"), shown("Straße")
    ('a\\\\nb', '\\\\u202egpj.exe', 'Straße')
    """
    text = os.fspath(path)
    text = text.decode("utf-8", "surrogateescape") if isinstance(text, bytes) else text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def find_inputs(
    paths: Iterable[str | Path], exclude: str | Path | None = None, complain: Callable[[str], None] | None = None
) -> list[Input]:
    """Lists the photographs and videos that `paths` name: files as given, folders searched to the bottom, sorted.

    A file given by name is taken whatever its suffix; below a folder, the known suffixes are, and hidden files are
    not. A file reached twice is listed once. What is no regular file (a pipe, a device, a socket) is refused where it
    is named and left out below a folder.

    Args:
      exclude: a folder whose files are left out (where the results go, if that lies inside a folder of `paths`).
      complain: takes a sentence for each path that cannot be read; the rest is listed. Without it that is an error.

    Raises:
      UserError: a path does not exist or is no file, a folder cannot be read, or there is nothing to work on.
    """
    found: dict[Path, Input] = {}
    exclude = Path(exclude).resolve() if exclude is not None else None
    paths = [Path(path) for path in paths]
    for path in paths:
        if path.is_dir():
            skip = None if exclude == path.resolve() else exclude
            for file in sorted(_files_below(path, complain or _refuse)):
                known = file.suffix.lower() in PHOTOGRAPHS | VIDEOS
                if known and _is_file(file) and skip not in file.resolve().parents:
                    found.setdefault(file.resolve(), Input(file, path))
        else:
            try:
                check_file(path)
            except UserError as e:
                (complain or _refuse)(str(e))
            else:
                found.setdefault(path.resolve(), Input(path, path.parent))
    if not found:
        named = ", ".join(map(shown, paths)) or "no PATH given"
        raise UserError(f"{named}: no photograph or video to work on")
    return list(found.values())


def check_file(path: str | os.PathLike) -> None:
    """Checks that something is a regular file, or a link to one.

    Raises:
      UserError: it is not there, may not be looked at, or is a folder, a pipe, a device or a socket.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as e:
        raise UserError(f"{shown(path)}: no such file or folder") from e
    except (OSError, ValueError) as e:
        reason = getattr(e, "strerror", None) or e
        raise UserError(f"{shown(path)}: cannot be read ({reason}); check its name and permissions") from e
    if not stat.S_ISREG(mode):
        kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a pipe"), (stat.S_ISSOCK, "a socket"))
        kind = next((name for test, name in kinds if test(mode)), "a device")
        raise UserError(f"{shown(path)}: is {kind}, not a file; give a photograph, a video or a folder of them")


def check_outputs(outputs: Iterable[str | os.PathLike], inputs: Iterable[str | os.PathLike]) -> None:
    """Checks every path that a command is about to write against all that it reads.

    Two paths are the same where they lead to one file, by links or by another spelling too.

    Raises:
      UserError: an output would replace an input.
    """
    read = {_identity(path): path for path in inputs}
    for path in outputs:
        source = read.get(_identity(path))
        if source is not None:
            raise UserError(
                f"{shown(path)}: writing it would overwrite the input {shown(source)}; choose another --out"
            )


def _identity(path: str | os.PathLike) -> tuple | Path:
    """What two names of one file share: device and number of a file that is there, else its resolved path."""
    try:
        facts = os.stat(path)
        return facts.st_dev, facts.st_ino
    except (OSError, ValueError):
        return Path(path).resolve()


def _files_below(folder: Path, complain: Callable[[str], None]) -> Iterator[Path]:
    """Everything below a folder that is no folder and not hidden; links to folders are followed, each folder once."""
    seen: set[str] = set()

    def failed(error: OSError) -> None:
        complain(f"{shown(error.filename)}: cannot be read ({error.strerror}); check its permissions")

    for parent, folders, names in os.walk(folder, onerror=failed, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders[:] = []
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if names and not os.access(parent, os.X_OK):
            complain(f"{shown(parent)}: may be listed but not entered; check its permissions")
            continue
        yield from (Path(parent, name) for name in names if not name.startswith("."))


def _refuse(sentence: str) -> None:
    raise UserError(sentence)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # in a folder that may not be entered
        return False


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
