"""Prepared records that are stale, damaged or cannot be written, and folders and lists that are unusual."""

import os

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.data import audit, caching
from deeplab_jax.errors import UserError
from tests.data.miniatures import blocks, write_image, write_label

NAMES = ("a", "b", "c")


@pytest.fixture
def folder(config, tmp_path):
    """Four photographs and masks of classes 0 and 1; the mask of p0 is class 2 alone."""
    for n in range(4):
        write_image(tmp_path / "images" / f"p{n}.jpg", seed=n)
        write_label(tmp_path / "masks" / f"p{n}.bmp", blocks(*((0, 1) if n else (2,))))
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    config.data.update(name="folder", images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), val_fraction=0.0)
    config.data.update(train_split="train", classes=str(tmp_path / "classes.txt"), cache_dir=str(tmp_path / "cache"))
    return config


def prepared(config):
    return data.open_dataset(config.data, "train")


def test_masks_exchanged_by_renaming_are_noticed(folder, tmp_path):
    for path in (tmp_path / "masks").iterdir():  # as archives write them: one size, one time
        os.utime(path, (1e9, 1e9))
    before = prepared(folder)
    for source, target in (("p0", "t"), ("p1", "p0"), ("t", "p1")):
        (tmp_path / "masks" / f"{source}.bmp").rename(tmp_path / "masks" / f"{target}.bmp")
    after = prepared(folder)
    assert after.fingerprint != before.fingerprint
    np.testing.assert_array_equal(after[1].label, before[0].label)


@pytest.mark.parametrize("damage", ["cut", "empty", "gone", "no description", "empty description", "empty folder"])
def test_damaged_records_are_named_with_what_to_do(folder, tmp_path, damage):
    prepared(folder)
    (where,) = [path for path in (tmp_path / "cache").glob("folder-*") if path.is_dir()]
    records = next(where.rglob("*array_record*"))
    description = next(where.rglob("dataset_info.json"))
    if damage == "cut":
        records.write_bytes(records.read_bytes()[: records.stat().st_size // 2])
    elif damage in ("empty", "empty description"):
        (records if damage == "empty" else description).write_bytes(b"")
    elif damage == "empty folder":
        for path in [*where.rglob("*")]:
            path.is_file() and path.unlink()
    else:
        (records if damage == "gone" else description).unlink()
    with pytest.raises(UserError, match=rf"{where.name}.*: its prepared records are damaged; delete this folder, and"):
        [prepared(folder)[n] for n in range(4)]


def test_a_full_disk_is_a_sentence(folder, monkeypatch):
    def full(*_):
        raise RuntimeError('Failed to finalize writing of split "images": write() failed: No space left on device')

    monkeypatch.setattr(caching, "_build", full)
    with pytest.raises(UserError, match=r"cannot be written \(is the disk full\?\); set config\.data\.cache_dir"):
        prepared(folder)


def test_what_a_kill_left_of_other_data_is_removed(folder, tmp_path):
    left = tmp_path / "cache" / ".folder-0123456789abcdef.building"
    (left / "records").mkdir(parents=True)
    prepared(folder)
    assert not left.exists()


def test_the_check_counts_what_training_reads(folder, tmp_path):
    (tmp_path / "images" / "p0.jpg").write_bytes(b"junk")
    folder.data.on_corrupt = "skip"
    result = audit.audit(*audit.sources_of(folder.data, ("train",)))
    assert result.pixels["train"][2] == 0 and not result.errors
    for n in range(4):
        (tmp_path / "images" / f"p{n}.jpg").write_bytes(b"junk")
    result = audit.audit(*audit.sources_of(folder.data, ("train",)))
    assert [f.sentence for f in result.errors] == ["every image of a split is damaged"]


def test_names_that_are_not_utf8_are_a_sentence(folder, tmp_path):
    for path in ((tmp_path / "images" / "p0.jpg"), (tmp_path / "masks" / "p0.bmp")):
        path.rename(os.fsdecode(os.fsencode(path.parent) + b"/caf\xe9" + path.suffix.encode()))
    for read in (lambda: prepared(folder), lambda: audit.audit(*audit.sources_of(folder.data, ("train",)))):
        with pytest.raises(UserError, match=r"caf\\udce9\.jpg: its name is not UTF-8; rename it and its mask"):
            read()


def test_lists_of_one_name_twice_are_refused(folder, tmp_path):
    Image.new("RGB", (32, 24)).save(tmp_path / "images" / "p0.png")
    (tmp_path / "masks.txt").write_text("masks/p0.bmp\nmasks/p1.bmp\n")
    folder.data.update(images=str(tmp_path / "images.txt"), masks=str(tmp_path / "masks.txt"))
    for second in ("p0.png", "p0.jpg"):
        (tmp_path / "images.txt").write_text(f"images/p0.jpg\nimages/{second}\n")
        with pytest.raises(UserError, match=rf"p0\.jpg and {second}: have the same name except for the suffix"):
            prepared(folder)


def test_a_list_that_is_a_folder_of_links(folder, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "images" / "site").mkdir()
    (tmp_path / "masks" / "site").mkdir()
    write_image(tmp_path / "store" / "x.jpg")
    (tmp_path / "images" / "site" / "x.jpg").symlink_to(tmp_path / "store" / "x.jpg")
    write_label(tmp_path / "masks" / "site" / "x.bmp", blocks(0, 1))
    folder.data.val_list = str(tmp_path / "images" / "site")
    assert data.open_dataset(folder.data, "val").names() == ["site/x"]


@pytest.mark.parametrize("field", ["images", "dir", "cache_dir"])
def test_unknown_users_are_no_traceback(folder, field, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder.data[field] = "~nobody-of-this-name/images"
    if field == "cache_dir":
        assert len(prepared(folder)) == 4  # a folder of this name
    else:
        with pytest.raises(UserError, match=f"config.data.{field}=~nobody-of-this-name/images: no such folder"):
            prepared(folder)


def test_holding_out_of_nothing_and_of_nested_groups(folder, tmp_path):
    folder.data.holdout_by = "p,p0"
    with pytest.raises(UserError, match="sets aside all 4 training images"):
        prepared(folder)
    folder.data.holdout_by = "p1,q"
    with pytest.raises(UserError, match="no training image has a name that begins with 'q'"):
        prepared(folder)
    (tmp_path / "val.txt").write_text("p0\np1\np2\np3\n")
    for change in ({"holdout_by": "p0"}, {"holdout_by": "", "holdout": 1}):
        folder.data.update(val_list=str(tmp_path / "val.txt"), **change)
        with pytest.raises(UserError, match="the training split holds no image to set aside"):
            prepared(folder)


def test_hidden_files_of_other_systems_are_no_images(config, tmp_path):
    for split in ("train", "val"):
        name = f"aachen_00000{len(split)}_000019"
        write_image(tmp_path / "leftImg8bit" / split / "aachen" / f"{name}_leftImg8bit.png")
        write_label(tmp_path / "gtFine" / split / "aachen" / f"{name}_gtFine_labelIds.png", blocks(7))
        (tmp_path / "leftImg8bit" / split / "aachen" / f"._{name}_leftImg8bit.png").write_bytes(b"fork")
    config.data.update(name="cityscapes", dir=str(tmp_path), train_split="train")
    assert data.open_dataset(config.data, "train").names() == ["aachen_000005_000019"]
