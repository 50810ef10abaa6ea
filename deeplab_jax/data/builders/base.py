"""The base of all TFDS builders of segmentation data sets: from a listing of files to checked, encoded records."""

from __future__ import annotations

import codecs
import concurrent.futures
import dataclasses
import errno
import itertools
import socket
import types
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from deeplab_jax.data import archives
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_file, reason
from deeplab_jax.imaging import files, listing, palettes
from deeplab_jax.imaging.classes import Classes

VOID = palettes.VOID
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)  # errors of the disk, not of the network


class File(Protocol):
    """A path, or a file within another one. Its `str` names it."""

    def read_bytes(self) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """One example before it is prepared: its name and its raw files (no label in test splits)."""

    name: str
    image: File | None = None
    label: File | None = None


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # untyped
    """Base of the builders. A data set defines its classes, its palette, and the files of each split.

    Records hold the photograph as it was encoded, the label as an 8-bit gray PNG of class ids (255 = void) and the
    name. Nothing here imports TensorFlow.
    """

    VERSION = tfds.core.Version("1.0.0")
    CLASSES = Classes()
    LABEL_TABLE: np.ndarray | None = None  # uint8 [256]: raw id -> class id or 255; None = unchanged
    URLS: tuple[str, ...] = ()  # the archives to download if `config.data.dir` is not set
    MD5S: Mapping[str, str] = types.MappingProxyType({})  # of archives whose SHA-256 is not in `checksums.tsv`
    NEEDS_FOLDER = True  # False: the data set can be generated or downloaded without `config.data.dir`

    def __init__(self, *, raw: Path | None = None, options=None, on_corrupt: str = "stop", **kwargs):
        """Args:
        raw: the data set's folder, only read; None = the folder from TFDS's download manager.
        options: `config.data`, for builders that need more than a folder.
        on_corrupt: "stop" at an undecodable file, or "skip": the record is kept, and reading will skip it.
        """
        self.raw = Path(raw) if raw else None
        self.options = options
        self.on_corrupt = on_corrupt
        super().__init__(**kwargs)

    @property
    def raw_folder(self) -> Path:
        """`self.raw` for `sources`: given, or downloaded before."""
        assert self.raw is not None, "the data set is not downloaded yet"
        return self.raw

    # Defined by each data set.

    def sources(self) -> dict[str, list[Source]]:
        """The examples of each stored split, in order, found under `self.raw`; `UserError` if they are missing."""
        raise NotImplementedError

    def classes(self) -> Classes:
        """Names of the classes (including the background if it is a class, excluding void) and their colors."""
        return self.CLASSES

    def available_splits(self, stored: Sequence[str] | None = None) -> list[str]:
        """The names that `open_dataset` accepts; `stored`: the keys of `sources()`; default: the prepared ones."""
        return list(self.info.splits if stored is None else stored)

    def select(self, split: str, seed: int) -> np.ndarray | None:
        """The stored examples of `split_expression(split)` that belong to it; None = all."""
        del split, seed
        return None

    def split_expression(self, split: str) -> str:
        """TFDS's expression for a split: stored splits, joined by `+`."""
        return split

    def sequence_of(self, name: str) -> str | None:
        """The video that an example comes from, whose frames resemble each other; None for single photographs."""
        return None

    def mask_colors(self) -> np.ndarray | None:
        """RGB of the classes by which masks are looked up, uint8 `[K, 3]`; None if masks hold ids."""
        return None

    def extra_files(self) -> list[Path]:
        """Files besides the sources' that affect the prepared records."""
        return []

    def read_label(self, source: Source) -> np.ndarray:
        """Class ids, uint8 `[H, W]`, before `LABEL_TABLE`."""
        return files.read_label(read_bytes(source.label), str(source.label))

    def meaning_key(self) -> str:
        """Whatever affects the reading of labels besides files and classes; part of the fingerprint."""
        return ""

    def encode(self, source: Source) -> tuple[bytes, bytes]:
        """(encoded photograph, label PNG or b"") of one example, checked.

        Raises:
          UserError: an unreadable file, a label of another size, an id outside the classes. The message has the name.
        """
        photograph = b""
        try:
            photograph = read_bytes(source.image)
            height, width = files.read_photograph(photograph, str(source.image)).shape[:2]
            if source.label is None:
                return photograph, b""
            label = self.read_label(source)
        except files.CorruptImageError:
            if self.on_corrupt == "skip":
                return photograph, b"corrupt"
            raise
        if label.shape != (height, width):
            raise UserError(
                f"{source.label}: is {label.shape[1]}x{label.shape[0]} but its image {source.image} is "
                f"{width}x{height}; a label must have its image's size"
            )
        if self.LABEL_TABLE is not None:
            label = self.LABEL_TABLE[label]
        check_ids(label, len(self.classes().names), source.label)
        return photograph, files.encode_png(label)

    # The interface to TFDS.

    def _info(self) -> tfds.core.DatasetInfo:
        info = self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.Image(shape=(None, None, 1)),
                    "name": tfds.features.Text(),
                }
            ),
            supervised_keys=("image", "label"),
            disable_shuffling=True,
        )
        # Google's bucket knows nothing about these data sets, and each query leaves a folder in the temporary folder.
        info.initialize_from_bucket = lambda: None
        return info

    def _split_generators(self, dl_manager) -> dict:
        if self.raw is None:
            self.raw = self._downloaded(dl_manager)
        splits = self.sources()
        progress = tqdm(
            total=sum(map(len, splits.values())),
            desc=f"preparing {self.name}",
            unit="image",
            mininterval=1,
            leave=False,
        )
        return {split: self._generate_examples(sources, progress) for split, sources in splits.items() if sources}

    def _download(self, dl_manager) -> Path | None:
        """The folder into which the archives of `URLS` were unpacked."""
        if not self.URLS:
            return Path(dl_manager.manual_dir)
        if not any(Path(dl_manager.download_dir).glob("*.INFO")):  # archives that are there need no network
            _check_hosts(self.URLS)
        paths = dict(zip(self.URLS, map(Path, dl_manager.download(list(self.URLS)))))
        for url, md5 in self.MD5S.items():
            archives.check_md5(paths[url], md5)
        return archives.unpack(list(paths.values()), unpacked_folder(dl_manager.download_dir, self.name))

    def _downloaded(self, dl_manager) -> Path | None:
        """`_download`, with failures raised as `UserError` (requests' errors are `OSError`s too).

        A damaged archive is removed, because TFDS would reuse it.

        Raises:
          UserError: an error of the server, the connection, a checksum or an archive. OSError: an error of the disk.
        """
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError
        from tensorflow_datasets.core.download.util import DownloadError

        tfds.enable_progress_bar()  # downloading gigabytes takes a while
        try:
            return self._download(dl_manager)
        except (OSError, DownloadError, NonMatchingChecksumError, archives.DamagedArchiveError) as e:
            if isinstance(e, OSError) and e.errno in _DISK:
                raise
            if isinstance(e, archives.DamagedArchiveError):
                for path in (e.path, e.path.with_name(f"{e.path.name}.INFO")):
                    path.unlink(missing_ok=True)
            lines = str(e).strip().splitlines() or [type(e).__name__]
            advice = "delete that file and try again" if isinstance(e, NonMatchingChecksumError) else "try again later"
            raise UserError(
                f"{self.name}: the download failed ({lines[0].rstrip(':. ')}); {advice}, or get the files by hand and "
                "name their folder with config.data.dir"
            ) from e
        finally:
            tfds.disable_progress_bar()

    def _generate_examples(self, sources: Sequence[Source], progress: tqdm | None = None) -> Iterator[tuple[int, dict]]:
        try:
            for i, (source, (image, label)) in enumerate(zip(sources, in_threads(self.encode, sources))):
                if progress is not None:
                    progress.update()
                yield i, {"image": image, "label": label, "name": source.name}
        except UserError:
            if progress is not None:
                progress.close()  # the sentence gets a line of its own
            raise


def _check_hosts(urls: Iterable[str]) -> None:
    """Raises OSError if a server's address cannot be found, as without a network: TFDS would try for minutes.

    Where a proxy is set, it finds the server.
    """
    proxies = urllib.request.getproxies()
    for parts in map(urllib.parse.urlsplit, urls):
        host = parts.hostname or ""
        if (parts.scheme in proxies or "all" in proxies) and not urllib.request.proxy_bypass(host):
            continue
        try:
            socket.getaddrinfo(host, parts.port)
        except OSError as e:
            raise OSError(f"{host}: {e.strerror}") from e


def unpacked_folder(downloads, name: str) -> Path:
    """The folder below TFDS's downloads in which a data set's archives are unpacked while its records are made."""
    return Path(downloads) / "unpacked" / name


def check_ids(label: np.ndarray, num_classes: int, where: object) -> None:
    """Raises `UserError` if `label`, uint8, holds an id that is neither a class nor 255."""
    wrong = (label >= num_classes) & (label != VOID)
    if wrong.any():
        ids = ", ".join(map(str, np.unique(label[wrong]).tolist()[:8]))
        raise UserError(
            f"{where}: holds the label id {ids}, but the classes are 0..{num_classes - 1} (255 = void); "
            "correct the label or the classes (python -m deeplab_jax.check_dataset lists every such file)"
        )


def read_bytes(path: File | None) -> bytes:
    """A file's bytes; `UserError` if it does not exist."""
    assert path is not None, "a drawn example has no file"
    try:
        return read_file(path) if isinstance(path, Path) else path.read_bytes()
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; the data set's list names it") from e
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e


def read_names(path: Path) -> list[str]:
    """The lines of a list file, without empty ones; `UserError` if there is no such file or nothing in it."""
    try:
        lines = text_of(read_file(path)).splitlines()
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; check config.data.dir") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a list of names ({reason(e)})") from e
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"{path}: is empty; it should name one image per line")
    return names


def text_of(data: bytes) -> str:
    """Text as saved by editors on any system: UTF-8 or UTF-16, with or without a byte order mark."""
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images directly in `folder`, by file name without suffix; `UserError` if there is no such folder."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check config.data.dir")
    return {p.stem: p for p in listing.walk(folder, files.IMAGE_SUFFIXES) if p.parent == folder}


def in_threads(function, items: Sequence, threads: int = 2) -> Iterator:
    """`map` with a few items computed ahead, in order."""
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        iterator = iter(items)
        ahead = [pool.submit(function, item) for item in itertools.islice(iterator, 4 * threads)]
        try:
            while ahead:
                result = ahead.pop(0).result()
                ahead += [pool.submit(function, item) for item in itertools.islice(iterator, 1)]
                yield result
        finally:
            for future in ahead:
                future.cancel()
