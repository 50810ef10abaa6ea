"""The meaning of a folder's masks: in every case read correctly, or reported before anything is trained."""

import io

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.data import audit
from deeplab_jax.data.meaning import decide, facts_of
from deeplab_jax.errors import UserError
from tests.data.miniatures import blocks, write_image
from tests.imaging.writers import gray_png, pillow

RGB = "background 0 0 0\ndisc 255 0 0\nfloor 0 255 0\nsky 0 0 255\n"


@pytest.fixture
def folder(config, tmp_path):
    """Makes a data set of these encoded masks and returns its config."""

    def make(masks: list[bytes], classes: str = "", suffix: str = "png"):
        for i, mask in enumerate(masks):
            write_image(tmp_path / "images" / f"p{i}.png", seed=i)
            (tmp_path / "masks").mkdir(exist_ok=True)
            (tmp_path / "masks" / f"p{i}.{suffix}").write_bytes(mask)
        if classes:
            (tmp_path / "classes.txt").write_text(classes)
        config.data.update(
            name="folder", dir=str(tmp_path), images="images", masks="masks", train_split="train", val_fraction=0.0,
            classes="classes.txt" if classes else "",
        )  # fmt: skip
        return config

    return make


def check(config):
    """The check's findings by kind; training reads the same labels."""
    result = audit.audit(*audit.sources_of(config.data, ("train",)))
    if not result.errors:
        opened = data.open_dataset(config.data, "train")
        counts = sum(np.bincount(opened[i].label.ravel(), minlength=256) for i in range(len(opened)))
        np.testing.assert_array_equal(counts[: len(result.class_names)], result.pixels["train"])
    return {f.kind: f for f in result.findings}


def labels(config):
    opened = data.open_dataset(config.data, "train")
    return [opened[i].label for i in range(len(opened))]


BINARY = blocks(0, 255, 0)


@pytest.mark.parametrize("classes", ["", "background 0 0 0\ncoin 255 255 255\n"])
def test_255_is_the_object_where_nothing_else_is(folder, classes, capsys):
    config = folder([pillow(BINARY, "PNG"), pillow(blocks(0), "PNG")], classes)
    assert "255 is" in check(config)["reading"].sentence
    np.testing.assert_array_equal(labels(config)[0], BINARY // 255)
    assert capsys.readouterr().err.count("255 is") == 1
    labels(config)
    assert capsys.readouterr().err.count("255 is") == 0  # reported once


def test_where_one_class_alone_occurs_nothing_is_trained(folder):
    config = folder([pillow(BINARY, "PNG")], "background\ncoin\n")
    found = check(config)
    assert found["one class"].error and found["one class"].examples == ("background",)
    assert "0 and 255" in found
    with pytest.raises(UserError, match="class 'background' is the only one in its labels, so there is nothing"):
        data.require_two_classes(data.open_dataset(config.data, "train"))


@pytest.mark.parametrize("kind", ["L", "RGB", "JPEG", "P"])
def test_gray_colors_are_looked_up_in_every_kind(folder, kind):
    ids = blocks(0, 1, 2)
    gray = np.array([0, 128, 255], np.uint8)[ids]
    made = {
        "L": lambda: pillow(gray, "PNG"),
        "RGB": lambda: pillow(np.stack([gray] * 3, -1), "PNG"),
        "JPEG": lambda: pillow(gray, "JPEG", quality=95),
        "P": lambda: pillow(blocks(2, 0, 1), "PNG", np.array([[128] * 3, [255] * 3, [0] * 3])),
    }[kind]()
    config = folder([made], "a 0 0 0\nb 128 128 128\nc 255 255 255\n", "jpg" if kind == "JPEG" else "png")
    check(config)
    wrong = (labels(config)[0] != ids).mean()
    assert wrong == 0 if kind != "JPEG" else wrong < 0.05


def test_void_in_a_palette_of_another_order(folder):
    colors = np.array([[255, 255, 255], [0, 255, 0], [0, 0, 0], [255, 0, 0]], np.uint8)
    config = folder([pillow(blocks(0, 1, 2, 3), "PNG", colors)], RGB)
    assert "other color" in check(config)
    np.testing.assert_array_equal(labels(config)[0], blocks(255, 2, 0, 1))


def test_a_palette_of_ids_stays_ids(folder):
    palette = np.array([[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]], np.uint8)
    config = folder([pillow(blocks(0, 1, 2), "PNG", palette), pillow(blocks(0, 3), "PNG", palette)], RGB)
    assert not any(f.error for f in check(config).values())
    np.testing.assert_array_equal(labels(config)[1], blocks(0, 3))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_ids_are_stored_samples(folder, bits):
    ids = blocks(0, 1) if bits == 1 else blocks(0, 1, 2)
    config = folder([gray_png(ids, bits)])
    check(config)
    np.testing.assert_array_equal(labels(config)[0], ids)


def test_two_readings_are_shown():
    ids, colors = blocks(0, 1, 2), np.array([[0] * 3, [2] * 3, [1] * 3], np.uint8)
    with pytest.raises(UserError) as error:
        decide([facts_of(pillow(ids, "PNG"), "m.png", colors)], 3, colors)
    assert (
        "m.png: can be read in two ways: the stored 1 is class 1 as an id, but class 2 by its color (1, 1, 1)"
        in str(error.value)
    )


def test_one_wrong_file_is_named_and_does_not_change_the_others(folder):
    good = [pillow(blocks(0, 1, 2), "PNG")] * 3
    config = folder([*good, pillow(blocks(0, 9), "PNG")], "a 10 0 0\nb 20 0 0\nc 30 0 0\n")
    found = check(config)
    assert [k for k, f in found.items() if f.error] == ["ids"] and "p3.png (9)" in found["ids"].examples[0]


def test_lossy_masks_without_colors_are_refused(folder):
    config = folder([pillow(np.kron(blocks(0, 3), np.ones((1, 1), np.uint8)) * 40, "JPEG", quality=50)], suffix="jpg")
    with pytest.raises(UserError, match=r"p0.jpg: has lossy compression, .* in the classes file \(config\.data\."):
        check(config)


def test_lossy_gray_masks_saved_as_rgb_are_refused_too(folder):
    gray = (blocks(0, 3) * 40)[..., None].repeat(3, -1)
    config = folder([pillow(gray, "JPEG", quality=50)], suffix="jpg")
    with pytest.raises(UserError, match=r"p0.jpg: has lossy compression, which invents ids"):
        check(config)


def test_a_webp_mask_is_lossy_if_its_compression_is(folder):
    gray = (blocks(0, 3) * 40)[..., None].repeat(3, -1)
    colors = "a 0 0 0\nb 40 40 40\nc 80 80 80\nd 120 120 120\n"
    with pytest.raises(UserError, match=r"p0.webp: has lossy compression, which invents ids"):
        check(folder([pillow(gray, "WEBP", quality=50)], suffix="webp"))
    config = folder([pillow(blocks(0, 3)[..., None].repeat(3, -1), "WEBP", lossless=True)], suffix="webp")
    check(config)
    np.testing.assert_array_equal(labels(config)[0], blocks(0, 3))
    assert "lossy mask" in check(folder([pillow(gray, "WEBP", quality=50)], colors, suffix="webp"))


def test_ignore_and_reduce_zero(folder):
    config = folder([pillow(blocks(0, 1, 2, 7), "PNG")], "a\nb\nc\n")
    config.data.ignore = (7,)
    check(config)
    np.testing.assert_array_equal(labels(config)[0], blocks(0, 1, 2, 255))
    config.data.update(ignore=(255,), reduce_zero=True)
    assert check(config)["ids"].error
    config.data.ignore = (7,)
    check(config)
    np.testing.assert_array_equal(labels(config)[0], blocks(255, 0, 1, 255))
    config.data.update(ignore=(-1,))
    with pytest.raises(UserError, match=r"config.data.ignore=\(-1,\): must be ids"):
        check(config)
    config.data.update(ignore=(7,), name="camvid")
    with pytest.raises(UserError, match=r"config.data.ignore: is for config.data.name=folder"):
        check(config)


def test_a_split_without_images_is_told(folder):
    config = folder([pillow(blocks(0, 1), "PNG")])
    result = audit.audit(*audit.sources_of(config.data, ("train", "val")))
    assert [f.kind for f in result.errors] == ["no image"] and "--mode train" in result.errors[0].sentence
    with pytest.raises(UserError, match="split 'val' holds no image"):
        data.open_dataset(config.data, "val")


def test_a_deep_image_and_pages_are_noted(folder, tmp_path):
    config = folder([pillow(blocks(0, 1), "PNG")] * 2)
    Image.fromarray(blocks(0, 1).astype(np.uint16) * 900).save(tmp_path / "images" / "p0.png")
    pages = [Image.fromarray(np.zeros((24, 32, 3), np.uint8))] * 2
    (tmp_path / "images" / "p1.png").unlink()
    pages[0].save(tmp_path / "images" / "p1.tif", save_all=True, append_images=pages[1:])
    found = check(config)
    assert found["16-bit gray image"].count == found["frames image"].count == 1


def test_pages_of_masks_are_told(folder, capsys):
    pages = io.BytesIO()
    Image.fromarray(blocks(0, 1)).save(pages, "TIFF", save_all=True, append_images=[Image.fromarray(blocks(1, 0))])
    config = folder([pages.getvalue(), pillow(blocks(0, 1), "TIFF")], suffix="tif")
    assert check(config)["reading"].sentence.endswith("p0.tif: has 2 pages or frames; the first is read")
    np.testing.assert_array_equal(labels(config)[0], blocks(0, 1))
    assert capsys.readouterr().err.count("has 2 pages or frames") == 1  # to who trains, too
