import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically, write_text
from deeplab_jax.imaging import files, palettes


@pytest.fixture
def photograph():
    return np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


def test_every_mode_becomes_rgb(tmp_path, photograph):
    rgb = Image.fromarray(photograph)
    gray = photograph[..., 0]
    cases = {
        "rgb.png": (rgb, photograph),
        "gray.png": (Image.fromarray(gray), np.repeat(gray[..., None], 3, 2)),
        "16.png": (Image.fromarray(gray.astype(np.uint16) * 257), np.repeat(gray[..., None], 3, 2)),
        "palette.png": (rgb.quantize(7), np.array(rgb.quantize(7).convert("RGB"))),
        "alpha.png": (Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 255))), photograph),
        "clear.png": (Image.merge("RGBA", (*rgb.split(), Image.new("L", rgb.size, 0))), np.full_like(photograph, 255)),
        "cmyk.tif": (rgb.convert("CMYK"), photograph),
    }
    for name, (image, expected) in cases.items():
        image.save(tmp_path / name)
        out = files.read_photograph(tmp_path / name)
        assert out.dtype == np.uint8 and out.shape == (12, 16, 3), name
        assert np.abs(out.astype(int) - expected).max() <= 1, name


def test_exif_turns(tmp_path, photograph):
    for orientation, expected in {
        3: photograph[::-1, ::-1],
        6: np.rot90(photograph, -1),
        8: np.rot90(photograph),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        for kind in ("TIFF", "JPEG", "WEBP"):  # of a TIFF Pillow gives the size as it is turned
            Image.fromarray(photograph).save(tmp_path / f"{orientation}.{kind}", kind, exif=exif)
            assert files.size_of(tmp_path / f"{orientation}.{kind}") == expected.shape[:2], (kind, orientation)
            assert files.read_photograph(tmp_path / f"{orientation}.{kind}").shape == expected.shape
        path = tmp_path / f"{orientation}.png"
        Image.fromarray(photograph).save(path, exif=exif)
        np.testing.assert_array_equal(files.read_photograph(path), expected)
        assert files.size_of(path) == expected.shape[:2]


def test_labels_keep_their_ids(tmp_path):
    label = np.array([[0, 1, 2], [20, 255, 7]], np.uint8)
    files.write_palette_png(tmp_path / "p.png", label, palettes.voc_palette())
    with Image.open(tmp_path / "p.png") as image:
        assert image.mode == "P" and image.getpalette()[3:6] == [128, 0, 0]
    files.write_png(tmp_path / "l.png", label)
    Image.fromarray(label.astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(np.repeat(label[..., None], 3, 2)).save(tmp_path / "gray_rgb.png")
    for name in ("p", "l", "16", "gray_rgb"):
        np.testing.assert_array_equal(files.read_label(tmp_path / f"{name}.png"), label)
    Image.fromarray(label > 1).save(tmp_path / "1.png")
    np.testing.assert_array_equal(files.read_label(tmp_path / "1.png"), label > 1)
    Image.fromarray(label.astype(np.uint16) * 2).save(tmp_path / "big.png")
    with pytest.raises(UserError, match=r"holds the id 510"):
        files.read_label(tmp_path / "big.png")


def test_colors_are_looked_up(tmp_path):
    colors = np.array([[0, 0, 0], [200, 10, 10], [10, 200, 10]], np.uint8)
    label = np.array([[0, 1], [2, 1]], np.uint8)
    Image.fromarray(colors[label]).save(tmp_path / "c.png")
    np.testing.assert_array_equal(files.read_label(tmp_path / "c.png", colors=colors), label)
    shuffled = Image.fromarray(np.array([[0, 2], [1, 2]], np.uint8))  # same colors, other indices
    shuffled.putpalette([0, 0, 0, 10, 200, 10, 200, 10, 10])
    shuffled.save(tmp_path / "p.png")
    np.testing.assert_array_equal(files.read_label(tmp_path / "p.png", colors=colors), label)
    Image.fromarray(np.full((2, 2, 3), 77, np.uint8)).convert("RGB").save(tmp_path / "u.png")
    with pytest.raises(UserError, match=r"u.png: holds the color \(77, 77, 77\), which no class has"):
        files.read_label(tmp_path / "u.png", colors=colors)
    with pytest.raises(UserError, match=r"c.png: is a color picture"):
        files.read_label(tmp_path / "c.png")


def test_damaged_and_missing_files(tmp_path, photograph):
    with pytest.raises(UserError, match=r"no.jpg: no such file"):
        files.read_photograph(tmp_path / "no.jpg")
    with pytest.raises(UserError, match=r"is a folder where an image is expected"):
        files.read_photograph(tmp_path)
    for name, content in {"empty.jpg": b"", "text.jpg": b"hello"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(files.CorruptImageError, match=name):
            files.read_photograph(tmp_path / name)
    for suffix in ("jpg", "png"):
        path = tmp_path / f"cut.{suffix}"
        Image.fromarray(photograph.repeat(20, 0).repeat(20, 1)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(files.CorruptImageError, match=rf"cut.{suffix}: cannot be decoded"):
            files.read_photograph(path)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "old")

    def fails(temporary: Path):
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"a.txt: cannot be written \(no space left on device\)"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["a.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written"):
        write_text(tmp_path / "file" / "b.txt", "x")


def test_damaged_exif_leaves_the_picture_as_it_is(tmp_path, photograph):
    Image.fromarray(photograph).save(tmp_path / "a.png", exif=b"Exif\0\0garbage!")
    np.testing.assert_array_equal(files.read_photograph(tmp_path / "a.png"), photograph)
    assert files.size_of(tmp_path / "a.png") == photograph.shape[:2]


def test_floats_up_to_1_are_shares_of_white(tmp_path, photograph):
    share = photograph[..., 0].astype(np.float32) / 255
    Image.fromarray(share).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(files.read_photograph(tmp_path / "a.tif")[..., 1], photograph[..., 0])


def test_what_pillow_itself_refuses_is_too_large_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    Image.new("1", (300, 300)).save(tmp_path / "a.png")
    for limit, words in ((50_000, "has 0.09 megapixels, more"), (30_000, "more than twice the limit")):
        Image.MAX_IMAGE_PIXELS = None
        with pytest.raises(UserError, match=words):
            files.read_photograph(tmp_path / "a.png", refuse_above=limit)
