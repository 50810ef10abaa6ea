import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.submission import CITYSCAPES_LABEL_IDS, Submission, check_submission
from tests.evaluation.submission_reader import read_submission

LABELS = np.random.default_rng(0).integers(0, 19, (12, 20)).astype(np.uint8)


def test_voc_round_trip(tmp_path):
    out = Submission(tmp_path / "test_submission", "voc")
    names = ["2008_000001", "2008_000002.jpg"]
    for name in names:
        out.add(name, LABELS)
    archive = out.close(names)
    assert archive == tmp_path / "test_submission.tgz"
    with tarfile.open(archive) as tar:
        assert sorted(tar.getnames()) == [
            f"results/VOC2012/Segmentation/comp6_test_cls/2008_00000{i}.png" for i in (1, 2)
        ]
    found = read_submission(archive, "voc")
    np.testing.assert_array_equal(found["2008_000002"], LABELS)


def test_cityscapes_round_trip(tmp_path):
    out = Submission(tmp_path / "test_submission", "cityscapes")
    name = "berlin/berlin_000000_000019_leftImg8bit"
    out.add(name, LABELS)
    archive = out.close([name])
    with zipfile.ZipFile(archive) as zipped:
        assert zipped.namelist() == ["berlin_000000_000019.png"]
        written = np.asarray(Image.open(zipped.open("berlin_000000_000019.png")))
    np.testing.assert_array_equal(written, CITYSCAPES_LABEL_IDS[LABELS])
    assert (written[LABELS == 18] == 33).all() and (written[LABELS == 0] == 7).all()  # bicycle, road
    np.testing.assert_array_equal(read_submission(archive, "cityscapes")["berlin_000000_000019"], LABELS)


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match=r"config\.eval\.submission is 'kitti'"):
        Submission(tmp_path / "x", "kitti")
    with pytest.raises(UserError, match="needs names of the form city_000000_000000"):
        Submission(tmp_path / "x", "cityscapes").add("street", LABELS)
    twice = Submission(tmp_path / "x", "voc")
    twice.add("a", LABELS)
    with pytest.raises(UserError, match="second image"):
        twice.add("b/a", LABELS)
    Submission(tmp_path / "x", "voc").add("b/a", LABELS)  # in another process
    with pytest.raises(UserError, match=r"b/a: a second image would get the name a\.png"):
        twice.close(["a", "b/a"])
    assert not twice.archive.exists()


def test_reader_refuses_what_the_server_would(tmp_path):
    out = Submission(tmp_path / "s", "voc")
    out.add("a", LABELS + 10)
    with pytest.raises(UserError, match="class id 28; VOC has 0 to 20"):
        read_submission(out.close(["a"]), "voc")
    Image.fromarray(LABELS).save(tmp_path / "gray.png")
    with tarfile.open(tmp_path / "gray.tgz", "w:gz") as tar:
        tar.add(tmp_path / "gray.png", "results/VOC2012/Segmentation/comp6_test_cls/gray.png")
    with pytest.raises(UserError, match="not a PNG with VOC's palette"):
        read_submission(tmp_path / "gray.tgz", "voc")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as zipped:
        zipped.write(tmp_path / "gray.png", "berlin_000000_000019.png")
    with pytest.raises(UserError, match="does not evaluate"):
        read_submission(tmp_path / "x.zip", "cityscapes")


def test_cityscapes_server_reads_19_classes():
    check_submission("cityscapes", 19)
    for kind in ("", "voc"):
        check_submission(kind, 7)
    with pytest.raises(UserError, match=r"config\.eval\.submission=cityscapes: its server reads 19 .* have 20"):
        check_submission("cityscapes", 20)
