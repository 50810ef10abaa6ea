import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.data import audit
from deeplab_jax.errors import UserError
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
        "16 bit image": lambda i: Image.fromarray(np.array(i.convert("L")).astype(np.uint16) * 257),
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
    assert "dog" in found["never"].sentence and "skip" in found["never"].sentence
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


def test_report_and_contact_sheet(config, tmp_path):
    from deeplab_jax.check_dataset import report
    from deeplab_jax.data.contact_sheet import contact_sheet

    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid")), train_split="train", crop=(33, 41))
    text = report(audit.audit(*audit.sources_of(config.data, ("train", "val"))))
    assert "Images: 6 in train, 2 in val. Sizes: 32x24. Classes: 11." in text
    assert "classes never occur in train: sign, fence, car, pedestrian, bicyclist" in text
    assert "Class weights go into config.loss.class_weights" in text
    sheet = contact_sheet(config, 3)
    assert sheet.shape == (33 + 20, 3 * (2 * 41 + 6), 3) and sheet.dtype == np.uint8
    # Exactly what training is fed: the first example of the first batch, image beside label.
    dataset = data.open_dataset(config.data, "train")
    batch = next(data.train_batches(dataset, config))
    valid = batch["valid"][0]
    np.testing.assert_array_equal(sheet[16:49, :41][valid], batch["image"][0][valid])
    known = valid & (batch["label"][0] != 255)
    np.testing.assert_array_equal(sheet[16:49, 41:82][known], dataset.palette[batch["label"][0]][known])


def test_command_says_what_is_wrong(tmp_path):
    raw = make_camvid(tmp_path / "camvid")
    write_label(raw / "trainannot" / "A_train000.png", blocks(44))
    command = [
        sys.executable, "-m", "deeplab_jax.check_dataset", "--config", "camvid", f"--config.data.dir={raw}",
        f"--config.data.cache_dir={tmp_path / 'cache'}", "--config.data.holdout=0",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "A_train000.png (44)" in done.stdout and "ids outside the classes" in done.stdout
    assert "8/8" in done.stderr  # progress
