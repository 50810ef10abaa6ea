"""The meaning of lines in `config.data.train_list` and `val_list`."""

import pytest

from deeplab_jax import data
from deeplab_jax.data import audit
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.pairing import Affixes, pair_folders
from tests.data.miniatures import blocks, write_image, write_label

IMAGES = ("a/0001", "b/0001", "b/0002", "my photo", "0003", "c/0003", "v1.2")


@pytest.fixture
def folder(config, tmp_path):
    for name in IMAGES:
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_label(tmp_path / "masks" / f"{name}.png", blocks(0, 1))
    config.data.update(
        name="folder", dir=str(tmp_path), images="images", masks="masks", val_list="val.txt", train_split="train"
    )
    return config


def names(config, split):
    return [example.name for example in data.open_dataset(config.data, split)]


def test_a_test_folder_is_no_training_data_where_lists_divide_the_others(config, tmp_path):
    """It needs no masks; only a list that names its images uses them."""
    for name in ("train/a", "train/b", "val/c", "test/d", "e"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        if not name.startswith("test"):
            write_label(tmp_path / "masks" / f"{name}.png", blocks(0, 1))
    config.data.update(
        name="folder", dir=str(tmp_path), images="images", masks="masks", val_list="val.txt", train_split="train"
    )
    (tmp_path / "val.txt").write_text("train/b\n")
    assert (names(config, "train"), names(config, "val")) == (["e", "train/a", "val/c"], ["train/b"])
    assert (names(config, "test"), names(config, "all")) == (["test/d"], ["e", "train/a", "train/b", "val/c"])
    (tmp_path / "train.txt").write_text("train/a\ntest/d\n")
    config.data.train_list = "train.txt"
    found = audit.audit(*audit.sources_of(config.data, ("train", "val"))).errors
    assert [(f.kind, f.count) for f in found] == [("label missing", 1)] and "test/d" in found[0].examples[0]


@pytest.mark.parametrize("void", [False, True])
def test_a_split_without_labels_chooses_no_checkpoint(config, tmp_path, void):
    """It is refused before the training, which would end at its first evaluation."""
    for name in ("train/a", "train/b", "val/c"):
        write_image(tmp_path / "images" / f"{name}.jpg")
        write_label(tmp_path / "masks" / f"{name}.png", blocks(255) if void and name == "val/c" else blocks(0, 1))
    if not void:
        write_image(tmp_path / "images" / "test" / "d.jpg")
    config.data.update(name="folder", dir=str(tmp_path), images="images", masks="masks", train_split="train")
    split = "val" if void else "test"
    with pytest.raises(UserError, match=f"folder split '{split}': its images have no labels, or only void ones"):
        data.require_labels(data.open_dataset(config.data, split))
    data.require_labels(data.open_dataset(config.data, "train"))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["images/b/0001.jpg"], ["b/0001"]),  # folders more
        (["/home/me/images/b/0001.jpg"], ["b/0001"]),
        (["./b/0001.jpg", r"b\0002.jpg"], ["b/0001", "b/0002"]),
        (["0002"], ["b/0002"]),  # a folder left out
        (["my photo.jpg"], ["my photo"]),
        (["images/my photo.jpg", "my photo"], ["my photo"]),  # each once
        (["b/0002", "a/0001.jpg", "b/0002.png"], ["b/0002", "a/0001"]),
        (["0003.jpg"], ["0003"]),  # the full name, although c/0003 has the same ending
        (["c/0003.jpg"], ["c/0003"]),
        (["v1.2", "v1.2.jpg"], ["v1.2"]),  # .2 is not an image's suffix
        (["b/0001.jpg masks/b/0001.png"], ["b/0001"]),  # VOC's pairs
        (["/images/b/0002.jpg  /masks/b/0002.png", "a/0001 1"], ["b/0002", "a/0001"]),
    ],
)
def test_a_line_names_one_image(folder, tmp_path, lines, expected):
    (tmp_path / "val.txt").write_text("\n".join(lines) + "\n")
    assert names(folder, "val") == expected
    assert sorted(names(folder, "train") + expected) == sorted(IMAGES)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("0001.jpg", r"'0001.jpg' may be 'a/0001' and 'b/0001' .*write its folder too"),
        ("c/0001.jpg", "names 'c/0001.jpg', but there is no such image"),  # not a/0001
        ("0003 old.jpg", "names '0003 old.jpg', but there is no such image"),  # not 0003
        ("your photo.jpg", "names 'your photo.jpg', but there is no such image"),
        ("b", "names 'b', but there is no such image"),
    ],
)
def test_a_line_that_names_none_or_several_is_refused(folder, tmp_path, line, sentence):
    (tmp_path / "val.txt").write_text(f"b/0002\n{line}\n")
    with pytest.raises(UserError, match=rf"val.txt: {sentence}"):
        data.open_dataset(folder.data, "val")


@pytest.mark.parametrize("where", ["images", "masks"])
def test_two_files_of_one_name_are_refused(folder, tmp_path, where):
    (tmp_path / "val.txt").write_text("b/0001\n")
    write_image(tmp_path / where / "b" / "0002.bmp")
    with pytest.raises(UserError, match=r"b/0002.bmp and 0002.(jpg|png): have the same name except for the suffix"):
        data.open_dataset(folder.data, "train")


def test_a_missing_mask_is_not_replaced_by_another_photographs(tmp_path):
    """a_img would take a's mask, and b that of seg_b, if these had no photograph of their own."""
    for name in ("a", "a_img", "b", "seg_b", "c_rgb"):
        write_image(tmp_path / "images" / f"{name}.jpg")
    for name in ("a", "seg_b", "c"):
        write_label(tmp_path / "masks" / f"{name}.png", blocks(0, 1))
    pairs, loose = pair_folders(tmp_path / "images", tmp_path / "masks", Affixes())
    found = {name: mask and mask.stem for name, _, mask in pairs}
    assert found == {"a": "a", "a_img": None, "b": None, "seg_b": "seg_b", "c_rgb": "c"} and not loose


def test_which_photograph_has_a_shared_mask_is_part_of_the_fingerprint(config, tmp_path):
    for name in ("a", "b", "c"):
        write_image(tmp_path / f"{name}.jpg")
    for name, ids in (("m1", (0, 1)), ("m2", (0, 2))):
        write_label(tmp_path / f"{name}.png", blocks(*ids))
    (tmp_path / "i.txt").write_text("a.jpg\nb.jpg\nc.jpg\n")
    config.data.update(name="folder", dir=str(tmp_path), images="i.txt", masks="m.txt", train_split="all")
    seen = set()
    for masks in ("m1 m2 m1", "m1 m2 m2", "m1 m1 m2"):
        (tmp_path / "m.txt").write_text("".join(f"{m}.png\n" for m in masks.split()))
        dataset = data.open_dataset(config.data, "all")
        seen.add(dataset.fingerprint)
        assert [int(dataset[i].label.max()) for i in range(3)] == [int(m[1]) for m in masks.split()]
    assert len(seen) == 3
