"""Downloads that fail, and archives that would write where they should not."""

import errno
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds
from tensorflow_datasets.core.download import download_manager, util

from deeplab_jax.data import archives, caching
from deeplab_jax.data.builders import base
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files
from deeplab_jax.imaging.classes import Classes

PICTURE = files.encode_png(np.zeros((4, 6, 3), np.uint8))
LABEL = files.encode_png(np.zeros((4, 6), np.uint8))


class Builder(base.SegmentationBuilder, skip_registration=True):
    """One photograph, from an archive that is there instead of a download; or a download that fails."""

    name = "toy"
    VERSION = tfds.core.Version("1.0.0")
    CLASSES = Classes(("background",))
    pkg_dir_path = Path(__file__).parent

    def _info(self):
        info = tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(None, None, 3)),
                    "label": tfds.features.Image(shape=(None, None, 1)),
                    "name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )
        info.initialize_from_bucket = lambda: None  # it would ask Google's server, and leave a temporary folder
        return info

    def _download(self, dl_manager):
        if isinstance(self.options, Exception):
            raise self.options
        return archives.unpack([self.options], base.unpacked_folder(dl_manager.download_dir, self.name))

    def sources(self):
        return {"train": [base.Source("one", self.raw / "one.png", self.raw / "one_label.png")]}


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (
            requests.ConnectionError("no route to host"),
            r"toy: the download failed \(no route to host\); try again later, or get the files by hand",
        ),
        (
            util.DownloadError("Failed to get url http://x. HTTP code: 404."),
            r"toy: the download failed \(Failed to get url http://x. HTTP code: 404\); try again later",
        ),
        (
            download_manager.NonMatchingChecksumError(
                "Artifact http://x, downloaded to /d/x, has wrong checksum:\n* Expected: 1\n* Got: 2"
            ),
            r"toy: the download failed \(Artifact http://x, downloaded to /d/x, has wrong checksum\); delete that file",
        ),
        (requests.Timeout(), r"toy: the download failed \(Timeout\)"),
        (OSError(errno.ENOSPC, "No space left on device"), r"cannot be written \(No space left on device\)"),
    ],
)
def test_what_failed_is_said_in_one_sentence(tmp_path, failure, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        caching.prepare(Builder, tmp_path, "0", raw=None, options=failure)
    assert "\n" not in str(error.value)
    assert not [p for p in tmp_path.iterdir() if p.is_dir() and "toy" in p.name]


def _zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("outside")
        link.type, link.linkname = tarfile.SYMTYPE, str(path.parent)
        archive.addfile(link)
    return path


@pytest.mark.parametrize(("suffix", "write"), [("zip", _zip), ("tar", _tar), ("tgz", _tar)])
def test_an_archive_cannot_write_outside_its_folder(tmp_path, suffix, write):
    cache = tmp_path / "cache"
    cache.mkdir()
    members = {
        "one.png": PICTURE,
        "one_label.png": LABEL,
        "../evil": b"evil",
        "../../evil": b"evil",
        "below/../../../evil": b"evil",
        str(tmp_path / "evil"): b"evil",
        "outside/evil": b"evil",
    }
    archive = write(tmp_path / f"toy.{suffix}", members)
    folder = archives.unpack([archive], tmp_path / "a" / "b" / "folder")
    # `outside/evil` is a file of the archive's own folder, wherever the link of that name points.
    assert list(tmp_path.rglob("evil")) == [folder / "outside" / "evil"]
    assert not [p for p in tmp_path.rglob("*") if p.is_symlink()]
    builder = caching.prepare(Builder, cache, "0", raw=None, options=archive)
    assert builder.info.splits["train"].num_examples == 1
    assert not list(cache.rglob("evil")) and not list(cache.rglob("one.png"))  # unpacked no longer than needed
