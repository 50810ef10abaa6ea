import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from deeplab_jax import data
from deeplab_jax.errors import UserError
from tests.data.miniatures import blocks, make_camvid, write_label


@pytest.fixture
def camvid(config, tmp_path):
    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid")), train_split="train")
    return config


def test_camvid(camvid):
    train, val = (data.open_dataset(camvid.data, split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (6, 2, 11)
    assert train.class_names[8] == "car" and train.palette[0].tolist() == [128, 128, 128]
    example = train[3]
    assert example.name == "B_train001" and example.image.shape == (24, 32, 3)
    np.testing.assert_array_equal(example.label, blocks(3, 3, 255))  # 11 is void
    with pytest.raises(IndexError):
        train[6]
    with pytest.raises(UserError, match=r"no split 'test'.*available: train, val"):
        data.open_dataset(camvid.data, "test")


def test_prepared_once_and_again_after_a_change(camvid, tmp_path):
    first = data.open_dataset(camvid.data, "train")
    stamp = first.folder.stat().st_mtime_ns
    moved = tmp_path / "elsewhere"
    shutil.copytree(camvid.data.dir, moved)
    with camvid.unlocked():
        camvid.data.dir = str(moved)
    again = data.open_dataset(camvid.data, "train")
    assert again.fingerprint == first.fingerprint and again.folder.stat().st_mtime_ns == stamp
    write_label(moved / "trainannot" / "A_train000.png", blocks(5, 5, 5))
    changed = data.open_dataset(camvid.data, "train")
    assert changed.fingerprint != first.fingerprint
    assert (changed[0].label == 5).all() and (first[0].label != 5).any()


def test_raw_folder_is_never_written_to(camvid):
    for folder, _, _ in os.walk(camvid.data.dir):
        os.chmod(folder, 0o555)
    before = sorted(os.listdir(camvid.data.dir))
    data.open_dataset(camvid.data, "train")
    assert sorted(os.listdir(camvid.data.dir)) == before
    for folder, _, _ in os.walk(camvid.data.dir):
        os.chmod(folder, 0o755)


def test_holdout_leaves_the_training_split(camvid, tmp_path):
    camvid.data.dir = str(make_camvid(tmp_path / "more", train=20))
    camvid.data.holdout = 4
    train, held = (data.open_dataset(camvid.data, split) for split in ("train", "holdout"))
    assert len(train) == 16 and len(held) == 4 and held.split == "holdout"
    assert not set(train.names()) & set(held.names())
    # One block of consecutive frames from the middle of each drive.
    assert held.names() == ["A_train008", "A_train010", "B_train009", "B_train011"]
    camvid.data.holdout = 20
    with pytest.raises(UserError, match=r"config.data.holdout=20: must be between 1 and 19"):
        data.open_dataset(camvid.data, "train")


def test_holdout_by_name_sets_whole_groups_aside(camvid):
    camvid.data.update(holdout=2, holdout_by="B_")
    train, held = (data.open_dataset(camvid.data, split) for split in ("train", "holdout"))
    assert {n[0] for n in train.names()} == {"A"} and {n[0] for n in held.names()} == {"B"}
    assert len(train) + len(held) == 6
    assert (held.group_of("B_train001"), held.group_of("A_train000")) == ("B_", "A")
    for given, sentence in (("A,C", "no training image has a name that begins with 'C'"), ("A,B", "sets aside all 6")):
        camvid.data.holdout_by = given
        with pytest.raises(UserError, match=f"config.data.holdout_by={given}: {sentence}"):
            data.open_dataset(camvid.data, "train")


def test_holdout_of_photographs_is_spread():
    held = data.holdout_indices([str(i) for i in range(100)], 10)
    assert held.tolist() == list(range(4, 100, 10))
    assert len(data.holdout_indices([f"{'ab'[i > 30]}{i}" for i in range(97)], 23, lambda n: n[0])) == 23


def test_holdout_has_as_many_as_asked_for_even_of_nearly_all_frames():
    for total in range(2, 60):
        names = [f"{i:03d}" for i in range(total)]
        for count in range(1, total):
            held = data.holdout_indices(names, count, lambda n: "drive")
            assert len(held) == len(set(held.tolist())) == count and (np.diff(held) > 0).all()


def test_cache_of_decoded_images_has_a_limit(camvid):
    camvid.data.cache_decoded_mb = 1
    dataset = data.open_dataset(camvid.data, "train")
    dataset.cache_bytes = 3 * 24 * 32 * 4
    for i in range(6):
        dataset[i]
    assert dataset.cached_bytes == 3 * 24 * 32 * 4
    assert dataset[0] is dataset[0] and dataset[5] is not dataset[5]
    np.testing.assert_array_equal(dataset[5].image, dataset[5].image)


@pytest.mark.parametrize(
    ("breakage", "sentence"),
    [
        (lambda d: shutil.rmtree(d), "no such folder"),
        (lambda d: [shutil.rmtree(d), d.mkdir()], "is empty"),
        (lambda d: (d / "train.txt").unlink(), r"train.txt: no such file"),
        (lambda d: (d / "train" / "A_train000.png").unlink(), r"A_train000.*: no such file, but train.txt names it"),
        (lambda d: (d / "train" / "A_train000.png").write_bytes(b""), "A_train000.png: is empty; replace"),
        (
            lambda d: write_label(d / "trainannot" / "A_train000.png", blocks(1, height=9)),
            "32x9 but its image .* 32x24",
        ),
        (lambda d: write_label(d / "valannot" / "A_val000.png", blocks(1, 12)), "A_val000.png: holds the label id 12"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(camvid, tmp_path, breakage, sentence):
    breakage(tmp_path / "camvid")
    with pytest.raises(UserError, match=sentence) as error:
        data.open_dataset(camvid.data, "train")
    assert "\n" not in str(error.value)
    cache = tmp_path / "cache"
    assert not [p for p in cache.glob("*camvid*") if p.is_dir()]  # nothing without a cache


def test_unset_folder_and_unknown_name(config):
    config.data.name = "cityscapes"  # the only one that needs an account
    sentence = (
        r"dir is not set; get leftImg8bit\S+ and gtFine\S+ from https://www.cityscapes\S+ .* --config.data.dir=PATH$"
    )
    with pytest.raises(UserError, match=sentence):
        data.open_dataset(config.data, "train")
    config.data.name = "camvit"
    with pytest.raises(UserError, match=r"config.data.name=camvit: no such data set; choose one of camvid"):
        data.open_dataset(config.data, "train")


def test_processes_build_once_and_a_kill_leaves_nothing(camvid, tmp_path):
    camvid.data.dir = str(make_camvid(tmp_path / "many", train=300))
    code = f"""
from deeplab_jax import config as configs, data
config = configs.load_config("base", ["data.name=camvid", "data.dir={camvid.data.dir}",
    "data.cache_dir={camvid.data.cache_dir}", "data.train_split=train"])
print("ready", flush=True)
print(len(data.open_dataset(config.data, "train")))
"""
    killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    killed.stdout.readline()
    deadline = time.time() + 60
    while (
        not list((tmp_path / "cache").glob(".camvid-*.building")) and time.time() < deadline and killed.poll() is None
    ):
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    both = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=120)[0].split() for p in both] == [["ready", "300"]] * 2
    folders = [p.name for p in (tmp_path / "cache").iterdir() if p.is_dir() and "camvid" in p.name]
    assert len(folders) == 1 and not folders[0].startswith(".")


def test_shapes(config):
    from deeplab_jax.data.builders.shapes import scenes

    image, label = scenes.draw(2018, 0, 3)
    again, _ = scenes.draw(2018, 0, 3)
    other, _ = scenes.draw(2018, 1, 3)
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8 and label.dtype == np.uint8
    np.testing.assert_array_equal(image, again)
    assert (image != other).mean() > 0.5
    labels = np.stack([scenes.draw(2018, 0, i)[1] for i in range(12)])
    assert set(np.unique(labels)) == {*range(7), 255}
    void = (labels == 255).mean()
    assert 0.03 < void < 0.12
    # The rim separates all objects: no two classes touch.
    for a, b in ((labels[:, 1:], labels[:, :-1]), (labels[:, :, 1:], labels[:, :, :-1])):
        assert not ((a != b) & (a != 255) & (b != 255)).any()


@pytest.mark.long
def test_real_camvid(config, test_data, tmp_path):
    config.data.update(name="camvid", dir=str(test_data / "camvid"), train_split="train", holdout=40)
    train, held, val = (data.open_dataset(config.data, split) for split in ("train", "holdout", "val"))
    assert (len(train), len(held), len(val)) == (327, 40, 101)
    assert train[0].image.shape == (360, 480, 3) and train[0].name == "0001TP_006690"
    assert {name.split("_")[0] for name in held.names()} == {"0001TP", "0006R0", "0016E5"}
    ids = np.unique(val[0].label)
    assert set(ids) <= {*range(11), 255}
