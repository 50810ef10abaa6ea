import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.data import audit
from deeplab_jax.data.contact_sheet import contact_sheet
from deeplab_jax.errors import UserError
from tests.command_line import call
from tests.data.miniatures import blocks, make_camvid, write_image, write_label


@pytest.fixture
def messy(config, tmp_path):
    """A folder with one example of everything that goes wrong."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    (tmp_path / "classes.txt").write_text("background\ncat\ndog\nbird\n")
    names = iter(f"p{i:02d}" for i in range(100))
    made = {}

    def add(kind, label=None, mode="L", suffix="png", **save):
        made[kind] = name = next(names)
        write_image(images / f"{name}.{suffix}", **save)
        write_label(masks / f"{name}.png", blocks(0, 1, 3, 0) if label is None else label, mode)
        return images / f"{name}.{suffix}", masks / f"{name}.png"

    add("fine", mode="P")
    add("size", blocks(0, 1, height=12))
    add("ids", blocks(0, 9))
    add("0 and 255", blocks(0, 255))
    add("empty", blocks(0))
    add("all void", blocks(255))
    add("much void", blocks(1, 255, 255))
    image, _ = add("unreadable image")
    image.write_bytes(image.read_bytes()[:300])
    _, mask = add("unreadable label")
    mask.write_bytes(b"not an image")
    _, mask = add("rgb mask")
    Image.fromarray(np.stack([blocks(0, 128), blocks(0, 64), blocks(0, 0)], 2)).save(mask)
    _, mask = add("boundary color")
    Image.fromarray(np.array([[0, 0, 0], [224, 224, 192], [128, 0, 0]], np.uint8)[blocks(0, 1, 2)]).save(mask)
    for kind, change in {
        "gray image": lambda i: i.convert("L"),
        "16-bit gray image": lambda i: Image.fromarray(np.array(i.convert("L")).astype(np.uint16) * 257),
        "transparent image": lambda i: i.convert("RGBA"),
    }.items():
        image, _ = add(kind)
        change(Image.open(image)).save(image)
    image, _ = add("cmyk image", suffix="jpg")
    Image.open(image).convert("CMYK").save(image)
    exif = Image.Exif()
    exif[0x0112] = 3
    add("exif", suffix="jpg", exif=exif)
    copied, _ = add("same twice")
    copied.write_bytes((images / f"{made['fine']}.png").read_bytes())
    write_label(masks / "alone.png", blocks(0, 1))
    config.data.update(name="folder", images=str(images), masks=str(masks), classes=str(tmp_path / "classes.txt"))
    config.data.update(train_split="train", val_fraction=0.0)
    return config, made


def test_every_fault_is_named(messy):
    config, made = messy
    result = audit.audit(*audit.sources_of(config.data, ("train",)))
    found = {f.kind: f for f in result.findings}
    for kind, name in made.items():
        if kind != "fine":
            assert any(name in example for example in found[kind].examples), kind
            assert found[kind].count == 1, kind
    assert found["loose mask"].examples[0].endswith("alone.png")
    assert "dog" in found["never"].sentence and "gaps" in found["never"].sentence
    assert {f.kind for f in result.errors} == {
        "size", "ids", "unreadable image", "unreadable label", "rgb mask", "boundary color",
    }  # fmt: skip
    assert result.images == {"train": 17}


def test_counts_and_duplicates_across_splits(config, tmp_path):
    raw = make_camvid(tmp_path / "camvid")
    (raw / "val" / "A_val000.png").write_bytes((raw / "train" / "A_train002.png").read_bytes())
    config.data.update(name="camvid", dir=str(raw), train_split="train")
    calls = []
    builder, sources = audit.sources_of(config.data, ("train", "val"))
    result = audit.audit(builder, sources, lambda: calls.append(1))
    assert len(calls) == 8 and not result.errors
    both = next(f for f in result.findings if f.kind == "both splits")
    assert both.count == 1 and "A_val000" in both.examples[0] and "A_train002" in both.examples[0]
    label = np.concatenate([blocks(i % 11, 3, 255) for i in range(6)])
    np.testing.assert_array_equal(result.pixels["train"], np.bincount(label[label < 255], minlength=11))
    assert result.images_with["train"][3] == 6
    assert abs(result.void["train"] - (label == 255).mean()) < 1e-6
    with pytest.raises(UserError, match="no split 'test'"):
        audit.sources_of(config.data, ("test",))


def test_contact_sheet_of_stages_with_crops_of_their_own(config, tmp_path):
    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid")), train_split="train")
    config.data.update(stages=((0.5, (9, 17), (0.25, 0.75)),), crop=(17, 33), scales=(0.5, 1.0), continuous_scale=True)
    config.update(num_steps=400, batch_size=2)
    sheet = contact_sheet(config, 8, columns=4)  # four examples of each crop
    rows = sheet.shape[0] // 2
    assert sheet.shape == (2 * (17 + 16 + 4), 4 * (2 * 33 + 6), 3) and rows == 37
    small, large = sheet[16 : 16 + 17, :66], sheet[rows + 16 : rows + 16 + 17, :66]
    assert all((rest == 40).all() for rest in (small[9:], small[:, 17:33], small[:, 50:]))  # beside a small crop
    assert not (large == 40).all(-1).any(0).all()
    config.data.stages = ((1.0, (9, 17), (0.25, 0.75)),)  # the larger crops never occur
    assert contact_sheet(config, 4, columns=4).shape == (9 + 16 + 4, 4 * (2 * 17 + 6), 3)


def test_prepared_records_are_read_as_training_reads_them():
    """Where there are no raw files: labels have the ids of classes already, and some have none."""
    from deeplab_jax.data.builders.base import Source
    from deeplab_jax.data.builders.coco_voc.coco_voc_dataset_builder import Builder
    from deeplab_jax.imaging import files
    from tests.imaging.writers import pillow

    label = np.repeat(np.array([[0, 15, 255]], np.uint8), 20, 0)

    class Records:
        split = "train"

        def record(self, i):
            return {
                "image": pillow(np.zeros((20, 3, 3), np.uint8), "PNG"), "name": b"a",
                "label": b"" if i else files.encode_png(label),
            }  # fmt: skip

    sources = [
        Source(str(i), audit._RecordFile(Records(), i, "image"), audit._RecordFile(Records(), i, "label"))
        for i in range(2)
    ]
    builder = Builder.__new__(Builder)  # without its folder of prepared files
    builder.on_corrupt = "stop"
    result = audit.audit(builder, {"train": sources[:1], "test": sources[1:]})
    assert not result.errors and result.pixels["train"][[0, 15]].tolist() == [20, 20]
    assert [f.kind for f in audit.audit(builder, {"train": sources}).errors] == ["label missing"]


def test_report_and_contact_sheet(config, tmp_path):
    from deeplab_jax.check_dataset import report

    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid")), train_split="train", crop=(33, 41))
    text = report(audit.audit(*audit.sources_of(config.data, ("train", "val"))))
    assert "Images: 6 in train, 2 in val. Sizes: 32x24. Classes: 11." in text
    assert "classes never occur in train: sign, fence, car, pedestrian, bicyclist" in text
    assert "Class weights go into config.loss.class_weights" in text
    sheet = contact_sheet(config, 3)
    assert sheet.shape == (33 + 20, 3 * (2 * 41 + 6), 3) and sheet.dtype == np.uint8
    # Exactly the input of training: the first example of the first batch, image beside label.
    dataset = data.open_dataset(config.data, "train")
    batch = next(data.train_batches(dataset, config))
    valid = batch["valid"][0]
    np.testing.assert_array_equal(sheet[16:49, :41][valid], batch["image"][0][valid])
    known = valid & (batch["label"][0] != 255)
    np.testing.assert_array_equal(sheet[16:49, 41:82][known], dataset.palette[batch["label"][0]][known])


def test_command_says_what_is_wrong(tmp_path):
    raw = make_camvid(tmp_path / "camvid")
    write_label(raw / "trainannot" / "A_train000.png", blocks(44))
    arguments = [
        "--config", "camvid", f"--config.data.dir={raw}",
        f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.holdout=0",
    ]  # fmt: skip
    done = call("check_dataset", *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "A_train000.png (44)" in done.stdout and "ids outside the classes" in done.stdout
    assert "8/8" in done.stderr  # progress
    label = sorted((raw / "trainannot").iterdir())[1]
    before = label.read_bytes()
    done = call("check_dataset", *arguments, f"--out={label}")
    assert done.returncode == 1 and f"{label.name}: writing it would overwrite the input" in done.stderr
    assert label.read_bytes() == before


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("seed=-1", "config.seed=-1: must lie between 0 and "),
        ("data.blur=-1", "config.data.blur=-1.0: must lie between 0 and 100"),
        ("data.brightness=5", "config.data.brightness=5.0: must lie between 0 and 1"),
        ("data.workers=0", "config.data.workers=0: must lie between 1 and 1024"),
        ("data.scales=1,", "config.data.scales: with continuous_scale, give two numbers"),
        ("loss.class_weights=foo", "config.loss.class_weights=foo: must be sqrt, fourth_root, median, or one number"),
        ("loss.class_weights=1,2", "config.loss.class_weights: has 2 numbers for 11 classes"),
        ("data.mirror_swaps=((0,11),)", "config.data.mirror_swaps=((0, 11),): must name classes between 0 and 10"),
        ("search.thin=pol,", "thin class 'pol': no such class; there are sky, building, pole"),
        ("crf.preset=v2_resnet", "config.crf: preset='v2_resnet' is neither a .json file nor one of deeplab_v1, "),
        ("eval.submission=cityscapes", "config.eval.submission=cityscapes: its server reads 19 classes"),
        ("eval.select_split=vall", "camvid has no split 'vall'; available: train, val"),
    ],
)
def test_command_refuses_fields_with_which_training_would_not_begin(tmp_path, field, sentence):
    raw = make_camvid(tmp_path / "camvid")
    data_fields = [f"--config.data.dir={raw}", f"--config.data.cache_dir={tmp_path}", "--config.data.holdout=0"]
    data_fields += ["--config.eval.select_split=val"]
    done = call("check_dataset", "--config=camvid", *data_fields, "--examples=0", f"--config.{field}")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and errors[0].startswith(f"error: {sentence}")


def _folder(config, tmp_path, labels, classes="", mode="L"):
    """A folder of images p00, p01, ... with these labels."""
    for i, label in enumerate(labels):
        write_image(tmp_path / "images" / f"p{i:02d}.png", seed=i)
        write_label(tmp_path / "masks" / f"p{i:02d}.png", label, mode)
    if classes:
        (tmp_path / "classes.txt").write_text(classes)
    config.data.update(
        name="folder", images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), train_split="train",
        classes=str(tmp_path / "classes.txt") if classes else "", val_fraction=0.0,
    )  # fmt: skip
    return tmp_path / "images", tmp_path / "masks"


def _findings(config):
    result = audit.audit(*audit.sources_of(config.data, ("train",)))
    return {f.kind: f for f in result.findings}


def test_the_boundary_color_is_void_where_colors_are_looked_up(config, tmp_path):
    colors = np.array([[0, 0, 0], [128, 0, 0], [224, 224, 192]], np.uint8)
    _, masks = _folder(config, tmp_path, [blocks(0, 1)] * 2, "background 0 0 0\nplane 128 0 0\n")
    for i, ids in enumerate(((0, 1, 2), (0, 1, 1))):
        Image.fromarray(colors[blocks(*ids)]).save(masks / f"p{i:02d}.png")
    found = _findings(config)
    assert {k for k, f in found.items() if f.error} == set()
    assert found["boundary void"].count == 1 and found["boundary void"].examples[0].endswith("p00.png")
    np.testing.assert_array_equal(data.open_dataset(config.data, "train")[0].label, blocks(0, 1, 255))
    # A class of that color is a class.
    (tmp_path / "classes.txt").write_text("background 0 0 0\nplane 128 0 0\nsand 224 224 192\n")
    found = _findings(config)
    assert "boundary void" not in found and "boundary color" not in found


def test_objects_marked_255_are_found_however_small(config, tmp_path):
    small = np.zeros((24, 32), np.uint8)
    small[3, 4] = 255
    _folder(config, tmp_path, [small, blocks(0), small.T.copy().reshape(24, 32)], "background\nobject\n")
    found = _findings(config)
    assert found["0 and 255"].count == 2 and not found["0 and 255"].error
    assert "p00.png" in found["0 and 255"].examples[0] and "p02.png" in found["0 and 255"].examples[1]
    # Where another class occurs, an image of background with a thin void line is nothing odd.
    write_label(tmp_path / "masks" / "p01.png", blocks(0, 1))
    assert "0 and 255" not in _findings(config)


def _png_of_16_bits(height: int, width: int) -> bytes:
    """An RGB PNG of 16 bits per channel, which Pillow reads but does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = (b"\0" + bytes(range(6)) * width) * height
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_16_bit_color_is_noticed(config, tmp_path):
    images, _ = _folder(config, tmp_path, [blocks(0, 1)] * 2)
    (images / "p01.png").write_bytes(_png_of_16_bits(24, 32))
    found = _findings(config)
    assert found["16-bit color image"].count == 1 and found["16-bit color image"].examples[0].endswith("p01.png")
    assert "gray image" not in found


def test_labels_that_cannot_be_used_say_why(config, tmp_path):
    colors = np.array([[9, 9, 9], [200, 0, 0], [1, 2, 3]], np.uint8)
    _, masks = _folder(config, tmp_path, [blocks(0, 1)] * 3, "a 9 9 9\nb 200 0 0\n")
    Image.fromarray(colors[blocks(0, 2)]).save(masks / "p00.png")
    Image.fromarray(np.full((24, 32), 300, np.uint16)).save(masks / "p01.png")
    shuffled = Image.fromarray(blocks(1, 0))
    shuffled.putpalette([200, 0, 0, 9, 9, 9] + [0, 0, 0] * 254)
    shuffled.save(masks / "p02.png")
    found = _findings(config)
    assert found["unknown color"].examples == (f"{masks / 'p00.png'} (holds the color (1, 2, 3), which no class has)",)
    assert found["ids"].examples == (f"{masks / 'p01.png'} (holds the id 300, and ids above 255 are not supported)",)
    assert found["other color"].examples == (str(masks / "p02.png"),)
    assert {k for k, f in found.items() if f.error} == {"unknown color", "ids"}


def test_one_colored_mask_among_gray_ones_is_named_alone(config, tmp_path):
    _, masks = _folder(config, tmp_path, [blocks(0, 1)] * 4)
    Image.fromarray(np.stack([blocks(0, 128), blocks(0, 64), blocks(0, 0)], 2)).save(masks / "p02.png")
    found = _findings(config)
    assert found["rgb mask"].examples == (str(masks / "p02.png"),)


def test_missing_classes_are_explained(config, tmp_path):
    _folder(config, tmp_path, [blocks(0, 2)], "a\nb\nc\nd\n")
    sentence = _findings(config)["never"].sentence
    assert sentence == (
        "classes never occur in train: b, d; the network cannot learn them "
        "(the ids have gaps: check that the classes file has the labels' order)"
    )
    (tmp_path / "classes.txt").write_text("a\nb\nc\n")
    write_label(tmp_path / "masks" / "p00.png", blocks(0, 1))
    assert _findings(config)["never"].sentence.endswith("c; the network cannot learn them")
    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid")))
    result = audit.audit(*audit.sources_of(config.data, ("train", "val")))
    sentences = [f.sentence for f in result.findings if f.kind == "never"]
    assert len(sentences) == 2 and not any("skip" in s for s in sentences)  # no classes file of the user's
    assert sentences[1].endswith("their IoU there is 0, or undefined if never predicted")


def test_holdout_is_checked_as_a_split(config, tmp_path):
    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid", train=20)), holdout=4)
    config.data.train_split = "train"
    _, sources = audit.sources_of(config.data, ("train", "holdout", "val"))
    for split in ("train", "holdout", "val"):
        assert [s.name for s in sources[split]] == data.open_dataset(config.data, split).names(), split
    config.data.holdout = 0
    with pytest.raises(UserError, match=r"config.data.holdout=0: must be between 1 and 19, .* or choose another split"):
        audit.sources_of(config.data, ("holdout",))


def test_splits_that_are_not_there_are_named(config, tmp_path):
    _folder(config, tmp_path, [blocks(0, 1)] * 3)
    for split in ("train_aug", "test"):
        with pytest.raises(UserError, match=rf"folder has no split '{split}'; available: train, val, all; set config"):
            audit.sources_of(config.data, (split,))


def test_command_names_the_splits_of_a_folder(config, tmp_path):
    _folder(config, tmp_path, [blocks(0, 1)] * 3)
    arguments = [
        "--config", "voc_aspp_l", "--config.data.name=folder",
        f"--config.data.images={tmp_path / 'images'}", f"--config.data.masks={tmp_path / 'masks'}",
        f"--config.data.cache_dir={tmp_path / 'cache'}",
    ]  # fmt: skip
    done = call("check_dataset", *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "no split 'train_aug'; available: train, val, all" in done.stderr


def test_annotations_of_all_images_are_not_read_for_each(config, tmp_path, monkeypatch):
    from deeplab_jax.data.builders.coco_voc import coco_voc_dataset_builder as coco

    monkeypatch.setattr(coco, "MIN_PIXELS", 20)
    square = {"segmentation": [[2, 2, 9, 2, 9, 9, 2, 9]], "area": 64, "category_id": 18}
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(3)],
        "annotations": [square | {"image_id": i} for i in range(3)],
    }
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text(json.dumps(content))
    for i in range(3):
        write_image(tmp_path / "train2017" / f"{i}.jpg", seed=i)
    config.data.update(name="coco_voc", dir=str(tmp_path), train_split="train")
    read = []
    whole = audit.base.read_bytes
    monkeypatch.setattr(audit.base, "read_bytes", lambda path: read.append(path.suffix) or whole(path))
    result = audit.audit(*audit.sources_of(config.data, ("train",)))
    assert result.images == {"train": 3} and not result.errors
    assert read == [".jpg"] * 3
    assert result.pixels["train"][12] == 3 * 49  # dogs


def test_all_rules_of_class_weights_are_printed(config, tmp_path):
    from deeplab_jax.check_dataset import report

    label = np.zeros((24, 32), np.uint8)
    label[:, :2] = 1  # 15 to 1
    _folder(config, tmp_path, [label], "road\nlight\n")
    text = report(audit.audit(*audit.sources_of(config.data, ("train",)))).splitlines()
    head = next(line for line in text if "fourth_root" in line)
    assert head.split()[:8] == ["id", "class", "pixels", "images", "weight:", "sqrt", "fourth_root", "median"]
    row = next(line for line in text if " light " in line).split()
    # w1 = f^-p / (sum of f^(1 - p)), with f = 1/16 and 15/16
    expected = [16**p / ((15 / 16) ** (1 - p) + (1 / 16) ** (1 - p)) for p in (0.5, 0.25)]
    assert row[2:6] == ["6.250%", "1", *(f"{w:.2f}" for w in expected)]
    assert text[-1].endswith("('sqrt',), ('fourth_root',), ('median',), or numbers.")
