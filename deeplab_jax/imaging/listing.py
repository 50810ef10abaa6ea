"""The files that a command processes, and the names of their results."""

import hashlib
import os
import stat
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from deeplab_jax.console import say, shown
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import IMAGE_SUFFIXES

PHOTOGRAPHS = frozenset(IMAGE_SUFFIXES)
VIDEOS = frozenset({".mp4", ".mov", ".m4v", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".mts", ".3gp", ".ogv"})
# Folders that systems and tools create among data: hidden ones, and these.
SYSTEM_FOLDERS = frozenset(
    {"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"}
)
_ENDINGS = (".png", "_overlay.png", "_iterations.png", "_probs.npy", ".mp4")  # of the files that commands write
_LONGEST_ENDING = max(map(len, _ENDINGS))
_LONGEST_NAME = 255  # bytes that file systems accept


def walk(
    folder: Path,
    suffixes: Iterable[str] = PHOTOGRAPHS,
    exclude: Path | None = None,
    complain: Callable[[str], None] | None = None,
) -> Iterator[Path]:
    """The files below a folder with these suffixes, in any case, sorted by path.

    Symbolic links are followed, but not back into an enclosing folder. Hidden files and folders, and those of
    `SYSTEM_FOLDERS`, are skipped. A pipe, a device, a socket or a dangling link is left out, which is reported on
    stderr.

    Args:
      exclude: a resolved folder that is not entered.
      complain: called with a sentence for each folder that cannot be read; the rest is listed.

    Raises:
      UserError: a folder cannot be read, if there is no `complain`.
    """
    suffixes = frozenset(suffixes)
    complain = complain or _refuse
    found = []

    def enter(here: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            entries = list(os.scandir(here))
        except OSError as e:
            complain(f"{shown(here)}: cannot be read ({e.strerror}); check its permissions")
            return
        for entry in entries:
            if entry.name.startswith(".") or entry.name.casefold() in SYSTEM_FOLDERS:
                continue
            try:
                is_folder = entry.is_dir()
                place = os.stat(entry.path) if is_folder else None
            except PermissionError:
                complain(f"{shown(entry.path)}: cannot be entered; check its permissions and those of its folder")
                continue
            except OSError:  # a broken or circular link
                continue
            if place is not None:
                key = (place.st_dev, place.st_ino)
                if key not in above and (exclude is None or Path(entry.path).resolve() != exclude):
                    enter(entry.path, above | {key})
            elif os.path.splitext(entry.name)[1].lower() in suffixes:
                if entry.is_file():
                    found.append(Path(entry.path))
                else:
                    _leave_out(entry.path)

    root = os.stat(folder)
    enter(os.fspath(folder), frozenset({(root.st_dev, root.st_ino)}))
    return iter(sorted(found))


_left_out: set[str] = set()  # paths already reported; a folder may be listed several times


def _leave_out(path: str) -> None:
    if path in _left_out:
        return
    _left_out.add(path)
    try:
        check_file(path)
    except UserError as e:
        say(f"warning: {str(e).partition(';')[0]}; left out")


@dataclass(frozen=True)
class Input:
    """A file given by name, or found in a folder given by name.

    Attributes:
      path: its path.
      root: the given folder, or the folder of the given file.
    """

    path: Path
    root: Path

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in VIDEOS

    def stem(self, level: int = 0) -> str:
        """The name of the results, without an ending; each level distinguishes more inputs than the previous one.

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
    """A name with room for every ending of a result: if too long, cut, with a digest of the whole."""
    encoded = os.fsencode(name)
    room = _LONGEST_NAME - _LONGEST_ENDING
    if len(encoded) <= room:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: room - 9].decode(errors='ignore')}~{digest}"


def find_inputs(
    paths: Iterable[str | Path], exclude: str | Path | None = None, complain: Callable[[str], None] | None = None
) -> list[Input]:
    """Lists the photographs and videos that `paths` name: files as given, folders searched recursively, sorted.

    A file given by name is accepted whatever its suffix; in a folder, the files that `walk` finds are. A file reached
    twice by one path is listed once, by a link again. Anything but a regular file (a pipe, a device, a socket) is
    refused if given by name, and left out in a folder.

    Args:
      exclude: a folder whose files are left out (the results' folder, if it is inside a folder of `paths`).
      complain: called with a sentence for each path that cannot be read; the rest is listed. Without it, such a path is
        an error.

    Raises:
      UserError: a path does not exist or is not a file, a folder cannot be read, or there is nothing to process.
    """
    found: dict[Path, Input] = {}
    refused: list[str] = []
    exclude = Path(exclude).resolve() if exclude is not None else None
    paths = list(paths)
    if "" in paths:
        raise UserError("a PATH is empty; name a photograph, a video or a folder of them ('.' is this one)")
    given = [Path(path) for path in paths]
    for path in given:
        if path.is_dir():
            skip = None if exclude == path.resolve() else exclude
            for file in walk(path, PHOTOGRAPHS | VIDEOS, skip, complain):
                found.setdefault(Path(os.path.abspath(file)), Input(file, path))
        else:
            try:
                check_file(path)
            except UserError as e:
                refused.append(str(e))
                (complain or _refuse)(str(e))
            else:
                found.setdefault(Path(os.path.abspath(path)), Input(path, path.parent))
    if not found and refused:
        raise UserError("; ".join(refused))
    if not found:
        named = ", ".join(map(shown, given)) or "no PATH given"
        raise UserError(f"{named}: no photograph or video found")
    return list(found.values())


def check_file(path: str | os.PathLike) -> None:
    """Checks that something is a regular file, or a link to one.

    Raises:
      UserError: it does not exist, cannot be accessed, or is a folder, a pipe, a device or a socket.
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

    Two paths are the same if they lead to one file, also by links or another spelling.

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


def files_under(folder: str | os.PathLike, leave_out: str | None = None) -> list[Path]:
    """All files of a folder, for `check_outputs`, except those with a suffix that the command itself writes there."""
    found = [Path(base) / name for base, _, names in os.walk(os.fspath(folder)) for name in names]
    return [path for path in found if path.suffix != leave_out]


def _identity(path: str | os.PathLike) -> tuple | Path:
    """An identity that two names of one file share: device and inode if it exists, else its resolved path."""
    try:
        facts = os.stat(path)
        return facts.st_dev, facts.st_ino
    except (OSError, ValueError):
        return Path(path).resolve()


def _refuse(sentence: str) -> None:
    raise UserError(sentence)


def result_stems(inputs: Sequence[Input], endings: Sequence[str] = ("", "_overlay")) -> list[str]:
    """Names the results of each input so that no two inputs write the same file.

    No result has the name of a folder of another's: `dir.bmp` does not become `dir.png` next to `dir.png/a.jpg`.

    Args:
      endings: appended to a stem to name its PNG files; `a_overlay.jpg` must not collide with the overlay of `a.jpg`.

    Raises:
      UserError: two inputs would share a name whatever folders are put in front of it.

    >>> result_stems([Input(Path("in") / name, Path("in")) for name in ("a.jpg", "a.png", "b.png")])
    ['a.jpg', 'a.png', 'b']
    """
    levels = [0] * len(inputs)
    highest = 1 + max((len(root.resolve().parts) for root in {item.root for item in inputs}), default=0)
    while True:
        stems = [item.stem(level) for item, level in zip(inputs, levels)]
        folders = {parent.as_posix() for stem in stems for parent in PurePosixPath(stem).parents}
        writers = defaultdict(set)
        clashing: set[int] = set()
        for i, stem in enumerate(stems):
            for ending in endings:
                writers[stem + ending].add(i)
            if any(stem + ending in folders for ending in _ENDINGS):
                clashing.add(i)
        clashing = clashing.union(*(ids for ids in writers.values() if len(ids) > 1))
        if not clashing:
            return stems
        if all(levels[i] > highest for i in clashing):
            path = inputs[min(clashing)].path
            raise UserError(f"{shown(path)}: its results would have the names of another file's; rename it")
        for i in clashing:
            levels[i] += 1
