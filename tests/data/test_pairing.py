"""Matching masks to images, selecting data files, and folders of splits."""

import os
import unicodedata

import numpy as np
import pytest

from deeplab_jax import data
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import pairing
from tests.data.miniatures import blocks, write_image, write_label


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def pairs(images, masks, *affixes):
    found, loose = pairing.pair_folders(images, masks, pairing.Affixes(*affixes))
    return {image.name: mask and mask.name for _, image, mask in found}, [p.name for p in loose]


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("a.jpg", "a_mask.gif"), ("a.jpg", "a.jpg.png"), ("a.JPG", "a.PNG"), ("a.jfif", "mask_a.png"),
        ("a.webp", "a_MASK.Png"), ("a.tga", "a.jp2"), ("a_sat.jpg", "a_mask.png"), ("a.jpg", "a.jpg_mask.png"),
        ("b_leftImg8bit.png", "b_gtFine_labelIds.png"), (unicodedata.normalize("NFD", "é.jpg"), "é.png"),
        ("a:1%#.jpg", "a:1%#.png"),
    ],
)  # fmt: skip
def test_names_of_tools_pair(tmp_path, image, mask):
    touch(tmp_path / "i", image)
    touch(tmp_path / "m", mask)
    assert pairs(tmp_path / "i", tmp_path / "m") == ({image: mask}, [])


def test_photographs_and_masks_in_one_folder(tmp_path):
    touch(tmp_path, "a.jpg", "a_mask.png", "b.png", "mask_b.png", "c.jpg", "c.png", "d.jpg")
    found, loose = pairs(tmp_path, tmp_path)
    assert found == {"a.jpg": "a_mask.png", "b.png": "mask_b.png", "c.jpg": "c.png", "d.jpg": None} and not loose


def test_folders_of_images_and_of_masks_in_each_split(tmp_path):
    touch(tmp_path, "train/images/a.jpg", "train/masks/a_mask.png", "val/images/x/a.jpg", "val/masks/x/a.png")
    found, loose = pairing.pair_folders(tmp_path, tmp_path, pairing.Affixes())
    assert [(name, mask.relative_to(tmp_path).as_posix()) for name, _, mask in found] == [
        ("train/a", "train/masks/a_mask.png"), ("val/x/a", "val/masks/x/a.png"),
    ]  # fmt: skip
    assert not loose
    touch(tmp_path, "other/b.jpg")  # and if a file is elsewhere, names decide
    assert pairs(tmp_path, tmp_path)[0]["b.jpg"] is None


def test_masks_in_a_folder_within(tmp_path):
    touch(tmp_path, "a.jpg", "masks/a.png")
    assert pairs(tmp_path, tmp_path / "masks") == ({"a.jpg": "a.png"}, [])


def test_own_affixes(tmp_path):
    touch(tmp_path, "a.jpg", "x_a-t.png", "a_mask.png")
    found, _ = pairs(tmp_path, tmp_path, "x_", "-t")
    assert found["a.jpg"] == "x_a-t.png"
    assert pairs(tmp_path, tmp_path, "x_", "-t.png")[0]["a.jpg"] == "x_a-t.png"


def test_two_masks_of_one_image_are_told(tmp_path):
    touch(tmp_path / "i", "a.jpg")
    touch(tmp_path / "m", "a_mask.png", "a_label.png")
    with pytest.raises(UserError, match=r"a_label.png and a_mask.png: may both be the mask of .*a.jpg"):
        pairs(tmp_path / "i", tmp_path / "m")


def test_links_are_followed_and_what_is_hidden_is_left_out(tmp_path):
    touch(tmp_path / "store", "a.jpg", "deep/b.jpg")
    root = tmp_path / "in"
    touch(root, ".ipynb_checkpoints/a.jpg", "__MACOSX/a.jpg", "@eaDir/a.jpg", "._c.jpg", ".d.jpg", "e.jpg")
    (root / "folder.jpg").mkdir()
    (root / "day").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "back").symlink_to(root)  # a circle
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    found = [p.relative_to(root).as_posix() for p in pairing.walk(root)]
    assert found == ["day/a.jpg", "day/deep/b.jpg", "e.jpg"]


@pytest.fixture
def folder(config, tmp_path):
    config.data.update(name="folder", dir=str(tmp_path), images="images", masks="masks", train_split="train")

    def add(*names):
        for name in names:
            write_image(tmp_path / "images" / f"{name}.jpg")
            write_label(tmp_path / "masks" / f"{name}.png", blocks(0, 1))
        return config

    return add


def names(config, split):
    return data.open_dataset(config.data, split).names()


def test_folders_are_splits(folder, tmp_path):
    config = folder("train/a", "train/b", "val/a")
    assert names(config, "train") == ["train/a", "train/b"] and names(config, "val") == ["val/a"]
    write_image(tmp_path / "images" / "test" / "x.jpg")  # without masks
    assert names(config, "test") == ["test/x"] and data.open_dataset(config.data, "test")[0].label is None
    assert names(config, "all") == ["train/a", "train/b", "val/a"]
    folder("stray")
    with pytest.raises(UserError, match=r"stray.jpg: is beside the folders test and train and val, so it is in no"):
        names(config, "train")


def test_list_arguments_may_be_folders(folder, tmp_path):
    config = folder("one/a", "one/b", "two/c")
    config.data.val_list = "images/two"
    assert names(config, "train") == ["one/a", "one/b"] and names(config, "val") == ["two/c"]
    (tmp_path / "empty").mkdir()
    config.data.val_list = "empty"
    with pytest.raises(UserError, match="empty: is a folder with no image of images"):
        names(config, "val")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_of_windows(folder, tmp_path, encoding):
    config = folder("a", "b")
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (tmp_path / f"{kind}.txt").write_bytes(f"{kind}\\a.{suffix}\r\n{kind}\\b.{suffix}\r\n".encode(encoding))
    config.data.update(images="images.txt", masks="masks.txt")
    np.testing.assert_array_equal(data.open_dataset(config.data, "all")[1].label, blocks(0, 1))
    config.data.masks = "images.txt"
    with pytest.raises(UserError, match="as the mask of itself"):
        names(config, "all")


def test_an_annotation_tools_files_in_the_place_of_masks(folder, tmp_path):
    config = folder("a")
    os.remove(tmp_path / "masks" / "a.png")
    (tmp_path / "masks" / "a.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds no mask; a.json looks like .*convert_labels \S+ --out DIR"):
        names(config, "train")
