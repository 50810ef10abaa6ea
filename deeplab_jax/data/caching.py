"""Prepared data sets on disk: keyed by the raw files' contents, built once under a lock, completely or not at all."""

import concurrent.futures
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import filelock
import tensorflow_datasets as tfds
from platformdirs import user_cache_dir
from tqdm import tqdm

from deeplab_jax.data.builders.base import SegmentationBuilder, Source, unpacked_folder
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_text


def cache_folder(configured: str) -> Path:
    """`config.data.cache_dir`, by default `datasets` in the user's cache folder; created if missing."""
    folder = Path(os.path.expanduser(configured)) if configured else Path(user_cache_dir("deeplab_jax")) / "datasets"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"{folder}: cannot be created ({e.strerror}); set config.data.cache_dir") from e
    if not os.access(folder, os.W_OK):
        raise UserError(f"{folder}: is not writable; set config.data.cache_dir to a folder of yours")
    return folder


def fingerprint(builder: SegmentationBuilder, splits: dict[str, list[Source]] | None, cache: Path) -> str:
    """A digest, 16 hex digits, of what the builder would prepare: its version and classes, names and file contents.

    Folders and times are not included, so a moved or copied data set keeps its fingerprint. Contents are read once; a
    record in `cache` keeps the digest for files of unchanged path, size and times.
    """
    digest = hashlib.blake2b(digest_size=8)
    digest.update(json.dumps([builder.name, str(builder.VERSION), *builder.classes().names]).encode())
    digest.update(builder.meaning_key().encode())
    if splits is not None:
        listed = [[split, [(s.name, s.label is not None) for s in sources]] for split, sources in splits.items()]
        digest.update(json.dumps(listed).encode())
        # Masks of several photographs: the contents below are of each file once, so which has which is told here. A
        # data set's one file of annotations needs no such list.
        masks = [s.label for sources in splits.values() for s in sources if isinstance(s.label, Path)]
        first = {path: n for n, path in reversed([*enumerate(masks)])}
        if len(first) < len(masks) and any(path.suffix != ".json" for path in first):
            digest.update(json.dumps([first[path] for path in masks]).encode())
        paths = [p for sources in splits.values() for s in sources for p in (s.image, s.label) if isinstance(p, Path)]
        digest.update(contents([*paths, *builder.extra_files()], cache).encode())
    return digest.hexdigest()


def prepare(builder_class: type[SegmentationBuilder], cache: Path, key: str, **arguments) -> SegmentationBuilder:
    """Returns a builder whose records are in `cache/<name>-<key>`, building them if they are missing.

    Several processes may call this at once: one builds, the others wait. A kill leaves at most a temporary folder,
    which the next build removes.

    Raises:
      UserError: the records cannot be written, or are damaged.
    """
    folder = cache / f"{builder_class.name}-{key}"

    def open_builder(where: Path) -> SegmentationBuilder:
        return builder_class(data_dir=os.fspath(where), file_format="array_record", **arguments)

    if not folder.is_dir():
        try:
            with filelock.FileLock(cache / f"{folder.name}.lock"):
                if not folder.is_dir():
                    _build(open_builder, folder, builder_class.name, arguments.get("raw"))
        except OSError as e:
            raise UserError(
                f"{folder}: cannot be written ({e.strerror or e}); set config.data.cache_dir to a folder with room"
            ) from e
        except RuntimeError as e:  # of the writer of records
            if not re.search(r"write\(\) failed|No space left|File too large", str(e)):
                raise
            raise UserError(
                f"{folder}: cannot be written (is the disk full?); set config.data.cache_dir to a folder with room"
            ) from e
    try:
        builder = open_builder(folder)
        parts = [Path(part) for split in builder.info.splits.values() for part in split.filepaths]
        whole = bool(parts) and all(part.is_file() and part.stat().st_size for part in parts)
    except Exception as e:  # TFDS' readers of its own files raise any
        raise damaged(folder) from e
    if not whole:
        raise damaged(folder)
    return builder


def damaged(folder: Path) -> UserError:
    """The error for prepared records that cannot be read."""
    return UserError(f"{folder}: its prepared records are damaged; delete this folder, and they are made again")


def _build(open_builder, folder: Path, name: str, raw: Path | None) -> None:
    temporary, downloads = folder.with_name(f".{folder.name}.building"), folder.parent / "downloads"
    shutil.rmtree(temporary, ignore_errors=True)
    for left in folder.parent.glob(f".{name}-*.building"):  # by a kill, of data that have changed since
        lock = filelock.FileLock(folder.parent / f"{left.name[1:].removesuffix('.building')}.lock", timeout=0)
        with contextlib.suppress(filelock.Timeout), lock:
            shutil.rmtree(left, ignore_errors=True)
    try:
        tfds.disable_progress_bar()  # this package's own bar counts images
        settings = tfds.download.DownloadConfig(manual_dir=os.fspath(raw) if raw else None)
        with contextlib.redirect_stdout(io.StringIO()):  # stdout belongs to the command's results
            open_builder(temporary).download_and_prepare(download_dir=os.fspath(downloads), download_config=settings)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if raw is None:
            shutil.rmtree(unpacked_folder(downloads, name), ignore_errors=True)


def digest_of(text: str) -> str:
    """A short digest of a text, for the name of a file."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def contents(paths: Iterable[Path], cache: Path) -> str:
    """A digest of the files' contents in this order, each read once."""
    paths = list(dict.fromkeys(paths))
    try:
        # The time of the last change tells files that were exchanged by renaming.
        stats = [(os.fspath(p.absolute()), (s := p.stat()).st_size, s.st_mtime_ns, s.st_ctime_ns) for p in paths]
    except FileNotFoundError as e:
        raise UserError(f"{e.filename}: no such file, but the data set lists it") from e
    except OSError as e:
        raise UserError(f"{e.filename}: cannot be read ({e.strerror})") from e
    memo = cache / "fingerprints" / hashlib.blake2b(json.dumps(stats).encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        return memo.read_text()
    digest = hashlib.blake2b(digest_size=16)
    many = len(paths) > 5000
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for part in tqdm(
            pool.map(_digest, paths), total=len(paths), desc="reading the raw files", disable=not many, leave=False
        ):
            digest.update(part)
    write_text(memo, digest.hexdigest())
    return digest.hexdigest()


def _digest(path: Path) -> bytes:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).digest()
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
