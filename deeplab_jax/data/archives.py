"""Downloaded archives: checked, and unpacked without writing outside their folder."""

import gzip
import hashlib
import shutil
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

from tqdm import tqdm

from deeplab_jax.errors import UserError


class DamagedArchiveError(UserError):
    """A file that is not a complete archive; `path` names it."""

    def __init__(self, path: Path, why: str):
        super().__init__(f"{path} is damaged: {why}")
        self.path = path


def check_md5(path: Path, md5: str) -> None:
    """Raises `DamagedArchiveError` if the file's MD5 differs."""
    with open(path, "rb") as f:
        if hashlib.file_digest(f, "md5").hexdigest() != md5:
            raise DamagedArchiveError(path, "its MD5 is not the published one")


def unpack(archives: Sequence[Path], folder: Path) -> Path:
    """Unpacks zip and tar archives into one folder, emptied before, and returns it.

    Only files are written, and only below `folder`: links, absolute names and names with `..` are left out. TFDS's own
    extraction would import TensorFlow, and keep files in memory when the disk is too slow.

    Raises:
      DamagedArchiveError: a file is damaged or not an archive. OSError: a disk error.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with tqdm(desc="unpacking", unit="file", mininterval=1, leave=False) as progress:
        for archive in archives:
            try:
                for name, content in _files(archive):
                    path = PurePosixPath(name)
                    if path.is_absolute() or ".." in path.parts:
                        continue
                    target = folder / path
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with open(target, "wb") as out:
                        shutil.copyfileobj(content, out, 2**20)
                    progress.update()
            except Exception as e:  # zipfile, tarfile and zlib raise many exceptions on damaged files
                if isinstance(e, OSError) and not isinstance(e, gzip.BadGzipFile):
                    raise
                raise DamagedArchiveError(archive, str(e) or type(e).__name__) from e
    return folder


def _files(path: Path) -> Iterator[tuple[str, IO[bytes]]]:
    """Name and content of each file in an archive, without links; read to its end, where the checksum is."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.is_dir():
                    with archive.open(member) as content:
                        yield member.filename, content
    else:
        with tarfile.open(path) as tar:
            for entry in tar:
                file = tar.extractfile(entry) if entry.isfile() else None
                if file is not None:
                    yield entry.name, file
            while tar.fileobj.read(2**20):  # damage may look like the end of the archive
                pass
