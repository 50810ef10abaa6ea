"""Each builder on a miniature of the real layout."""

import json
import tempfile
import zipfile

import numpy as np
import pytest
import scipy.io
from PIL import Image

from deeplab_jax import data
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.files import CorruptImageError
from tests.data.miniatures import blocks, make_voc, write_image, write_label, write_sbd


def _names(dataset):
    return [example.name for example in dataset]


@pytest.mark.parametrize("at", ["", "VOCdevkit", "VOCdevkit/VOC2012"])
def test_voc(config, tmp_path, at):
    make_voc(tmp_path / "raw", lists={"train": ["a", "b"], "val": ["c"], "test": ["d"]})
    config.data.update(name="voc_segmentation", dir=str(tmp_path / "raw" / at), train_split="train")
    train, val, both, test = (data.open_dataset(config.data, s) for s in ("train", "val", "trainval", "test"))
    assert [_names(d) for d in (train, val, both, test)] == [["a", "b"], ["c"], ["a", "b", "c"], ["d"]]
    assert train.num_classes == 21 and train.class_names[15] == "person"
    np.testing.assert_array_equal(train[0].label, blocks(0, 255, 15))  # indices, not the palette's gray
    assert test[0].label is None
    with pytest.raises(UserError, match=r"no split 'train_aug'.*available: train, val, test, trainval"):
        data.open_dataset(config.data, "train_aug")


def test_opening_data_leaves_nothing_in_the_temporary_folder(config, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    make_voc(tmp_path / "raw", lists={"train": ["a"], "val": ["b"]})
    config.data.update(name="voc_segmentation", dir=str(tmp_path / "raw"), train_split="train")
    for _ in range(2):  # prepared, then found prepared
        assert _names(data.open_dataset(config.data, "train")) == ["a"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_voc_palette():
    from deeplab_jax.imaging.palettes import voc_palette

    palette = voc_palette()
    assert palette[[0, 1, 2, 15, 20, 255]].tolist() == [
        [0, 0, 0], [128, 0, 0], [0, 128, 0], [192, 128, 128], [0, 64, 128], [224, 224, 192],
    ]  # fmt: skip


def test_sbd_mat_files_give_train_aug_without_val(config, tmp_path):
    root = make_voc(tmp_path)
    sbd = tmp_path / "benchmark_RELEASE" / "dataset"
    (sbd / "cls").mkdir(parents=True)
    (sbd / "train.txt").write_text("2008_7\n2007_3\n")  # 2007_3 is in VOC's val
    (sbd / "val.txt").write_text("2008_8\n2007_1\n")
    for name in ("2008_7", "2008_8", "2007_3", "2007_1"):
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_sbd(sbd / "cls" / f"{name}.mat", blocks(0, 9))
    config.data.update(name="voc_segmentation", dir=str(tmp_path))
    augmented = data.open_dataset(config.data, "train_aug")
    assert _names(augmented) == ["2007_1", "2007_2", "2008_7", "2008_8"]
    np.testing.assert_array_equal(augmented[2].label, blocks(0, 9))  # SBD's
    np.testing.assert_array_equal(augmented[0].label, blocks(0, 255, 15))  # VOC's own
    assert _names(data.open_dataset(config.data, "trainval_aug"))[-1] == "2007_3"
    (sbd / "cls" / "2008_8.mat").write_bytes(b"MATLAB no more")
    with pytest.raises(UserError, match=r"2008_8.mat: cannot be read as an SBD annotation"):
        data.open_dataset(config.data, "train_aug")


def test_sbd_without_the_list_of_val_is_refused(config, tmp_path):
    root = make_voc(tmp_path)
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    sbd = tmp_path / "sbd"
    (sbd / "cls").mkdir(parents=True)
    (sbd / "train.txt").write_text("2008_7\n2007_3\n")
    (sbd / "val.txt").write_text("2007_1\n")
    config.data.update(name="voc_segmentation", dir=str(tmp_path))
    with pytest.raises(UserError, match=r"Segmentation/val.txt: no such file, so the images of val cannot be kept out"):
        data.open_dataset(config.data, "train_aug")


@pytest.mark.parametrize("listed", ["train_aug.txt", "trainaug.txt", ""])
def test_published_labels_give_train_aug_without_val(config, tmp_path, listed):
    root = make_voc(tmp_path)
    for name in ("2008_9", "2008_7", "2007_3", "2007_1"):  # 2007_3 is in VOC's val
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_label(root / "SegmentationClassAug" / f"{name}.png", blocks(0, 9))
    if listed:
        lines = "/JPEGImages/2007_1.jpg /SegmentationClassAug/2007_1.png\n2008_7\n2007_3\n"
        (root / "ImageSets" / "Segmentation" / listed).write_text(lines)
    config.data.update(name="voc_segmentation", dir=str(tmp_path))
    augmented = data.open_dataset(config.data, "train_aug")
    assert _names(augmented) == (["2007_1", "2008_7"] if listed else ["2007_1", "2007_2", "2008_7", "2008_9"])
    np.testing.assert_array_equal(augmented[0].label, blocks(0, 9))  # the published one, not VOC's
    assert _names(data.open_dataset(config.data, "trainval_aug"))[-1] == "2007_3"
    (root / "ImageSets" / "Segmentation" / "val.txt").unlink()
    if not listed:  # nothing identifies the published labels of val
        with pytest.raises(UserError, match=r"val.txt: no such file"):
            data.open_dataset(config.data, "train_aug")


def test_published_augmented_labels(config, test_data):
    config.data.update(name="voc_segmentation", dir=str(test_data / "voc_sample"))
    augmented, val = (data.open_dataset(config.data, split) for split in ("train_aug", "val"))
    assert _names(augmented) == ["2011_000003", "2011_000025"] and _names(val) == ["2011_000006"]
    path = test_data / "voc_sample/VOCdevkit/VOC2012/SegmentationClassAug/2011_000003.png"
    np.testing.assert_array_equal(augmented[0].label, np.array(Image.open(path)))
    assert set(np.unique(val[0].label)) <= {*range(21), 255} and 15 in val[0].label


def test_context_from_mat_and_from_png(config, tmp_path):
    for kind in ("mat", "png"):
        root = tmp_path / kind / "VOC2010"
        lists = root / "ImageSets" / ("Main" if kind == "mat" else "SegmentationContext")
        lists.mkdir(parents=True)
        for split, name in (("train", "2008_1"), ("val", "2008_2")):
            (lists / f"{split}.txt").write_text(f"{name}\n")
            write_image(root / "JPEGImages" / f"{name}.jpg")
            if kind == "mat":  # aeroplane, wood, a label outside the 59, sky
                (root / "trainval").mkdir(exist_ok=True)
                label = np.array([2, 458, 3, 360])[np.arange(32) // 8][None].repeat(24, 0)
                scipy.io.savemat(root / "trainval" / f"{name}.mat", {"LabelMap": label.astype(np.uint16)})
            else:
                write_label(root / "SegmentationClassContext" / f"{name}.png", blocks(1, 59, 0, 47))
        config.data.update(name="pascal_context", dir=str(root), train_split="train")
        train = data.open_dataset(config.data, "train")
        assert train.num_classes == 60 and train.class_names[47] == "sky"
        np.testing.assert_array_equal(train[0].label, blocks(1, 59, 0, 47))


def test_person_part(config, tmp_path):
    root = tmp_path / "VOCdevkit" / "VOC2010"
    lists = tmp_path / "pascal_person_part_trainval_list"
    lists.mkdir()
    for split, name in (("train", "2008_1"), ("val", "2008_2")):
        (lists / f"{split}.txt").write_text(f"/JPEGImages/{name}.jpg /pascal_person_part_gt/{name}.png\n")
        write_image(root / "JPEGImages" / f"{name}.jpg")
        write_label(tmp_path / "pascal_person_part_gt" / f"{name}.png", blocks(0, 1, 6, 255))
    config.data.update(name="pascal_person_part", dir=str(tmp_path), train_split="train")
    val = data.open_dataset(config.data, "val")
    assert val.num_classes == 7 and val.class_names[6] == "lower legs"
    np.testing.assert_array_equal(val[0].label, blocks(0, 1, 6, 255))


def test_cityscapes_folders_and_zips(config, tmp_path):
    raw = tmp_path / "extracted"
    for split, city in (("train", "aachen"), ("val", "munster"), ("test", "bonn")):
        name = f"{city}_000001_000019"
        write_image(raw / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png")
        write_label(raw / "gtFine" / split / city / f"{name}_gtFine_labelIds.png", blocks(7, 33, 0, 26))
        write_label(raw / "gtFine" / split / city / f"{name}_gtFine_instanceIds.png", blocks(1))
    zipped = tmp_path / "zipped"
    zipped.mkdir()
    for name in ("leftImg8bit", "gtFine"):
        with zipfile.ZipFile(zipped / f"{name}_trainvaltest.zip", "w") as archive:
            for path in (raw / name).rglob("*.png"):
                archive.write(path, path.relative_to(raw))
    for folder in (raw, zipped):
        config.data.update(name="cityscapes", dir=str(folder), train_split="train")
        train = data.open_dataset(config.data, "train")
        np.testing.assert_array_equal(train[0].label, blocks(0, 18, 255, 13))
        assert _names(data.open_dataset(config.data, "val")) == ["munster_000001_000019"]
        assert data.open_dataset(config.data, "test")[0].label is None


def test_coco(config, tmp_path, monkeypatch):
    from deeplab_jax.data.builders.coco_voc import coco_voc_dataset_builder as coco

    assert coco.MIN_PIXELS == 40_000  # Zheng et al. 2015, section 7.1
    monkeypatch.setattr(coco, "MIN_PIXELS", 20)
    square = {"segmentation": [[2, 2, 9, 2, 9, 9, 2, 9]], "area": 64, "category_id": 18, "image_id": 1}
    small = {"segmentation": [[4, 4, 6, 4, 6, 6, 4, 6]], "area": 9, "category_id": 1, "image_id": 1}
    crowd = {
        "segmentation": {"size": [24, 32], "counts": [24 * 30, 24 * 2]},
        "area": 48, "category_id": 1, "image_id": 1, "iscrowd": 1,
    }  # fmt: skip
    toaster = {"segmentation": [[0, 0, 30, 0, 30, 20]], "area": 300, "category_id": 80, "image_id": 2}
    below = square | {"area": 19.5, "image_id": 3}  # of objects, just too little; the crowd does not count
    enough = [square | {"area": 12.5, "image_id": 4}, small | {"area": 7.5, "image_id": 4}]
    (tmp_path / "annotations").mkdir()
    content = {
        "images": [{"id": i, "file_name": f"{n}.jpg"} for i, n in enumerate(("one", "two", "three", "four"), 1)],
        "annotations": [small, crowd, square, toaster, below, crowd | {"image_id": 3}, *enough],
    }
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    for name in ("one", "two", "three", "four"):
        write_image(tmp_path / "train2017" / f"{name}.jpg")
    config.data.update(name="coco_voc", dir=str(tmp_path), train_split="train")
    train = data.open_dataset(config.data, "train")
    # Of two, VOC knows nothing; in three, its classes cover half a pixel less than MIN_PIXELS; in four, just that.
    assert _names(train) == ["one", "four"]
    expected = np.zeros((24, 32), np.uint8)
    expected[:, 30:] = 255
    expected[2:9, 2:9] = 12
    expected[4:6, 4:6] = 15
    np.testing.assert_array_equal(train[0].label, expected)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"area": None}, r"instances_train2017.json: cannot be read as COCO's instances \(TypeError\)"),
        ({"segmentation": "absent"}, r"instances_train2017.json: cannot be read as COCO's instances \(KeyError\)"),
        (
            {"segmentation": {"size": [24, 32], "counts": [3]}},
            "one cannot be read .run lengths of 3 pixels",
        ),
        ({"segmentation": {"size": [5, 5], "counts": [0, 25]}}, "cannot be read .run lengths of 5x5 pixels"),
        ({"segmentation": {"size": [24, 32], "counts": "~"}}, "an instance of one cannot be read"),
        ({"segmentation": [[1, 1, 5, "x", 5, 5]]}, "an instance of one cannot be read"),
    ],
)
def test_damaged_coco_instances_are_named(config, tmp_path, monkeypatch, change, words):
    from deeplab_jax.data.builders.coco_voc import coco_voc_dataset_builder as coco

    monkeypatch.setattr(coco, "MIN_PIXELS", 20)
    instance = {"segmentation": [[2, 2, 9, 2, 9, 9, 2, 9]], "area": 64, "category_id": 18, "image_id": 1} | change
    content = {"images": [{"id": 1, "file_name": "one.jpg"}], "annotations": [instance]}
    if instance["segmentation"] == "absent":
        del instance["segmentation"]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    write_image(tmp_path / "train2017" / "one.jpg")
    config.data.update(name="coco_voc", dir=str(tmp_path), train_split="train")
    with pytest.raises(UserError, match=words):
        data.open_dataset(config.data, "train")


def test_a_damaged_member_of_a_cityscapes_archive_is_one_damaged_image(config, tmp_path):
    image, label = write_image(tmp_path / "a.png"), tmp_path / "b.png"
    write_label(label, blocks(7))
    for folder, kind, file in (("leftImg8bit", "leftImg8bit", image), ("gtFine", "gtFine_labelIds", label)):
        with zipfile.ZipFile(tmp_path / f"{folder}_trainvaltest.zip", "w") as archive:
            for n in range(3):
                archive.write(file, f"{folder}/train/aachen/aachen_00000{n}_000019_{kind}.png")
    path = tmp_path / "leftImg8bit_trainvaltest.zip"
    with zipfile.ZipFile(path) as archive:
        at = archive.infolist()[1].header_offset + 200
    content = bytearray(path.read_bytes())
    content[at : at + 50] = bytes(50)
    path.write_bytes(content)
    config.data.update(name="cityscapes", dir=str(tmp_path), train_split="train")
    with pytest.raises(CorruptImageError, match=r"aachen_000001_000019_leftImg8bit.png' in it is damaged; download it"):
        data.open_dataset(config.data, "train")
    config.data.on_corrupt = "skip"
    train = data.open_dataset(config.data, "train")
    assert len(train) == 3 and train[0].image.shape == train[2].image.shape
    with pytest.raises(CorruptImageError, match="aachen_000001_000019"):
        train[1]


def test_coco_run_lengths():
    from deeplab_jax.data.annotations.coco import run_lengths

    expected = np.array([[0, 1, 1], [0, 1, 0], [1, 1, 0]], bool)
    # Columns: 0 0 1 | 1 1 1 | 1 0 0 -> runs 2, 5, 2; the text form writes each in base 32 from character "0".
    np.testing.assert_array_equal(run_lengths({"size": [3, 3], "counts": [2, 5, 2]}), expected)
    np.testing.assert_array_equal(run_lengths({"size": [3, 3], "counts": "252"}), expected)
    # 40 = 8 + 32 * 1 takes two characters; the fourth is a difference to the second: 12 = 40 - 28.
    long = run_lengths({"size": [10, 10], "counts": [0, 40, 48, 12]})
    text = "0" + chr(48 + 8 + 32) + chr(48 + 1) + chr(48 + 16 + 32) + chr(48 + 1) + chr(48 + 4 + 32) + chr(48 + 31)
    np.testing.assert_array_equal(run_lengths({"size": [10, 10], "counts": text}), long)


def _folder(config, tmp_path, count=10, **options):
    for i in range(count):
        write_image(tmp_path / "images" / "sub" / f"p{i}.jpg")
        write_label(tmp_path / "masks" / "sub" / f"p{i}_mask.png", blocks(0, i % 3, 255), mode="P")
    config.data.update(
        name="folder", images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), train_split="train", **options
    )


def test_folder_counts_its_classes_and_draws_by_seed(config, tmp_path):
    _folder(config, tmp_path, val_fraction=0.3)
    train, val = (data.open_dataset(config.data, split) for split in ("train", "val"))
    assert (len(train), len(val), train.class_names) == (7, 3, ("0", "1", "2"))
    assert sorted(_names(train) + _names(val)) == [f"sub/p{i}" for i in range(10)]
    assert _names(data.open_dataset(config.data, "val", seed=1)) != _names(val)
    np.testing.assert_array_equal(train[0].label, blocks(0, int(train[0].name[-1]) % 3, 255))


def test_folder_with_lists_and_classes(config, tmp_path):
    _folder(config, tmp_path, count=4)
    (tmp_path / "classes.txt").write_text("sky 10 20 30\nroad side 40,50,60\ncar 70 80 90\n")
    (tmp_path / "val.txt").write_text("p1.jpg\nsub/p3\n")
    config.data.update(dir=str(tmp_path), images="images", masks="masks", classes="classes.txt", val_list="val.txt")
    train, val = (data.open_dataset(config.data, split) for split in ("train", "val"))
    assert _names(train) == ["sub/p0", "sub/p2"] and _names(val) == ["sub/p1", "sub/p3"]
    assert val.class_names == ("sky", "road side", "car") and val.palette[1].tolist() == [40, 50, 60]


def test_folder_with_colored_masks_and_list_files(config, tmp_path):
    colors = np.array([[255, 0, 0], [0, 255, 0], [9, 9, 9]], np.uint8)
    for i in range(2):
        write_image(tmp_path / f"photo{i}.png")
        mask = np.concatenate([colors, [[224, 224, 192]]]).astype(np.uint8)[blocks(0, 1, 2, 3)]
        Image.fromarray(mask).save(tmp_path / f"paint{i}.png")
    (tmp_path / "images.txt").write_text("photo0.png\nphoto1.png\n")
    (tmp_path / "masks.txt").write_text("paint0.png\npaint1.png\n")
    (tmp_path / "classes.txt").write_text("a 255 0 0\nb 0 255 0\nc 9 9 9\n")
    files = {name: str(tmp_path / f"{name}.txt") for name in ("images", "masks", "classes")}
    config.data.update(name="folder", train_split="train", val_fraction=0.0, **files)
    np.testing.assert_array_equal(data.open_dataset(config.data, "train")[0].label, blocks(0, 1, 2, 255))
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    with pytest.raises(UserError, match=r"paint0.png: is a color picture where class ids are expected"):
        data.open_dataset(config.data, "train")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"images": ""}, "config.data.images is not set"),
        ({"masks": "nowhere"}, "config.data.masks=nowhere: no such folder or list file"),
        ({"images": "nowhere", "masks": ""}, "config.data.images=nowhere: no such folder or list file"),
        ({"val_fraction": 1.5}, "config.data.val_fraction=1.5: must be"),
        ({"train_list": "missing.txt"}, "missing.txt: no such file"),
        ({"classes": "classes.txt"}, "classes.txt: 1 of 2 lines have a color"),
    ],
)
def test_folder_mistakes(config, tmp_path, change, sentence):
    _folder(config, tmp_path, count=3)
    (tmp_path / "classes.txt").write_text("a 1 2 3\nb\n")
    config.data.update(dir=str(tmp_path), **change)
    with pytest.raises(UserError, match=sentence):
        data.open_dataset(config.data, "train")


def test_folder_names_images_without_masks(config, tmp_path):
    _folder(config, tmp_path, count=3)
    (tmp_path / "masks" / "sub" / "p1_mask.png").unlink()
    with pytest.raises(UserError, match=r"1 image has no mask of the same name in .*, the first 'p1.jpg'"):
        data.open_dataset(config.data, "train")
