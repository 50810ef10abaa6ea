"""Users' folders, through the commands: read correctly, or reported before anything is trained or written."""

import io
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.config import load_config
from tests.command_line import Done, call
from tests.data.miniatures import blocks, write_image
from tests.imaging.writers import gray_png, pillow

LABEL = blocks(0, 1, 1, 2)  # a quarter, a half, a quarter
COLORS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [255, 255, 255]], np.uint8)
RGB = "background 0 0 0\ndisc 255 0 0\nfloor 0 255 0\n"


@pytest.fixture
def root(tmp_path) -> Path:
    return tmp_path


def fill(root: Path, mask: bytes, names=("p0", "p1", "p2", "p3"), suffix=".png", classes="") -> None:
    """Photographs of these names, each with the same encoded mask."""
    for seed, name in enumerate(names):
        write_image(root / "images" / f"{name}.jpg", seed=seed)
        path = root / "masks" / f"{name}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(mask)
    if classes:
        (root / "classes.txt").write_text(classes)


def fields(root: Path, **more: object) -> list[str]:
    """The config fields of such a folder."""
    named = {"images": root / "images", "masks": root / "masks", "cache_dir": root / "cache", "val_fraction": 0.5}
    if (root / "classes.txt").exists():
        named["classes"] = root / "classes.txt"
    return [f"data.{k}={v}" for k, v in (named | more).items()]


def check(root: Path, **more: object) -> Done:
    flags = [f"--config.{field}" for field in fields(root, **more)]
    return call("check_dataset", "--config=folder", "--examples=0", *flags)


def trained_on(root: Path, split: str = "train", **more: object) -> list[np.ndarray]:
    """The labels that training is given."""
    config = load_config("folder", fields(root, **more))
    opened = data.open_dataset(config.data, split, seed=config.seed)
    return [opened[i].label for i in range(len(opened))]


def passes(root: Path, expected: np.ndarray = LABEL, **more: object) -> str:
    """The check's report on a folder that passes; training receives `expected`."""
    done = check(root, **more)
    assert done.returncode == 0, done.stdout + done.stderr
    labels = trained_on(root, **more)
    assert labels
    for label in labels:
        np.testing.assert_array_equal(label, expected)
    return done.stdout


@pytest.mark.parametrize("as_rgb", [False, True])
@pytest.mark.parametrize("classes", ["", "background 0 0 0\ncoin 255 255 255\n"])
def test_masks_of_0_and_255(root, classes, as_rgb):
    mask = blocks(0, 255, 0)
    fill(root, pillow(np.stack([mask] * 3, -1) if as_rgb else mask, "PNG"), classes=classes)
    said = passes(root, blocks(0, 1, 0))
    assert "Classes: 2." in said and ("255" in said or as_rgb)


def test_photographs_and_masks_of_one_folder(root):
    for i in range(4):
        write_image(root / "train" / f"x{i}.jpg", seed=i)
        Image.fromarray(LABEL).save(root / "train" / f"x{i}_mask.png")
    said = passes(root, images=root / "train", masks=root / "train")
    assert "Images: 2 in train, 2 in val." in said


def test_a_palette_of_the_classes_colors_in_another_order_with_void(root):
    shown = np.array([3, 0, 2, 1], np.uint8)  # index of the palette -> color
    indices = blocks(1, 3, 2, 0)
    fill(root, pillow(indices, "PNG", COLORS[shown]), classes=RGB + "sky 0 0 255\n")
    assert "classes never occur in train: sky" in passes(root, blocks(0, 1, 2, 255))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_gray_samples_below_and_above_8_bits_are_ids(root, bits):
    fill(root, gray_png(LABEL, bits))
    assert "Classes: 3." in passes(root)


@pytest.mark.parametrize("names", [("p0",), ("p0", "p1", "p2", "p3")])
def test_without_a_validation_image_nothing_is_trained(root, names):
    fill(root, pillow(LABEL, "PNG"), names)
    fraction = {} if len(names) == 1 else {"val_fraction": 0}
    done = check(root, **fraction)
    assert done.returncode == 1 and "--mode train" in done.stdout
    flags = [f"--config.{field}" for field in fields(root, **fraction)]
    done = call("main", "--config=folder", *flags, f"--workdir={root}/run")
    assert done.returncode == 1 and "error: " in done.stderr and "val" in done.stderr
    assert not (root / "run").exists()
    assert trained_on(root, **fraction)  # `--mode train` has something to train on


@pytest.mark.parametrize(
    "name",
    ["写" * 75, "x" * 251, "é" * 125 + "y", "50% #1: a", "-x", "~a", "a=b", " b", "c.d"],
    ids=lambda name: f"{len(name)}{name[-1].isascii()}",
)
def test_any_legal_name_in_every_command(root, workdir, monkeypatch, name):
    names = (name, "z") if len(os.fsencode(name)) < 248 else (name[: len(name) - 3], "z")
    fill(root, pillow(LABEL, "PNG"), names)
    passes(root)
    monkeypatch.chdir(root / "images")
    named = f"{names[0]}.jpg"
    done = call("predict", f"--workdir={workdir}", "--crf_iterations=0", f"--out={root}/out", named, "z.jpg")
    assert done.returncode == 0, done.stderr
    assert len(list((root / "out").glob("*_overlay.png"))) == 2 and (root / "out" / "z.png").is_file()
    refine = ["--iterations=0", f"--image={root}/images", f"--labels={root}/masks", f"--out={root}/refined"]
    done = call("refine", *refine)
    assert done.returncode == 0, done.stderr
    assert len(list((root / "refined").glob("*_overlay.png"))) == 2


def test_links_are_entered(root, workdir):
    fill(root, pillow(LABEL, "PNG"))
    for kind in ("images", "masks"):
        (root / "store").mkdir(exist_ok=True)
        (root / kind).rename(root / "store" / kind)
        (root / kind).mkdir()
        (root / kind / "day1").symlink_to(root / "store" / kind)
        (root / kind / "again").symlink_to(root / kind)  # a circle
    assert "Images: 2 in train, 2 in val." in passes(root)
    flags = [f"--workdir={workdir}", "--crf_iterations=0", f"--out={root}/out", root / "images"]
    assert call("predict", *flags).returncode == 0
    assert len(list((root / "out" / "day1").glob("*_overlay.png"))) == 4


def test_hidden_folders_are_no_data(root):
    fill(root, pillow(LABEL, "PNG"))
    for folder in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (root / "images" / folder).mkdir()
        shutil.copy(root / "images" / "p0.jpg", root / "images" / folder / "p0-checkpoint.jpg")
    (root / "images" / "._p0.jpg").write_bytes(b"resource fork")
    (root / "images" / "folder.jpg").mkdir()
    assert "Images: 2 in train, 2 in val." in passes(root)


@pytest.mark.parametrize("suffix", ["_mask.gif", ".jpg.png", "_mask.png", ".PNG", "_label.TIF"])
def test_names_that_tools_give_masks(root, suffix):
    kind = {"gif": "GIF", "tif": "TIFF"}.get(suffix[-3:].lower(), "PNG")
    palette = None if kind == "TIFF" else np.arange(256)[:, None].repeat(3, 1)[::-1].copy()
    options = {"optimize": False} if kind == "GIF" else {}
    fill(root, pillow(LABEL, kind, palette, **options), suffix=suffix)
    passes(root)


def test_lists_of_windows(root):
    fill(root, pillow(LABEL, "PNG"))
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        text = "".join(f"{kind}\\p{i}.{suffix}\r\n" for i in range(4))
        (root / f"{kind}.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "Images: 2 in train, 2 in val." in passes(root, images=root / "images.txt", masks=root / "masks.txt")


def test_a_folder_is_refined_past_an_empty_map(root):
    fill(root, pillow(LABEL, "PNG"), suffix="_mask.PNG")
    (root / "masks" / "p1_mask.PNG").write_bytes(pillow(np.zeros_like(LABEL), "PNG"))
    done = call(
        "refine", "--iterations=0", f"--image={root}/images", f"--labels={root}/masks", f"--out={root}/out"
    )  # fmt: skip
    assert done.returncode == 0 and "unchanged" in done.stdout
    np.testing.assert_array_equal(np.array(Image.open(root / "out" / "p0.png")), LABEL)
    assert not np.array(Image.open(root / "out" / "p1.png")).any()


def test_cvats_own_list_of_classes(root):
    text = "# label:color_rgb:parts:actions\nbackground:0,0,0::\ndisc:255,0,0::\nfloor:0,255,0::\n"
    fill(root, pillow(LABEL, "PNG", COLORS[:3]), classes=text)
    said = passes(root)
    assert "Classes: 3." in said and " disc " in said and "label:color" not in said


def test_folders_train_and_val_are_the_splits(root):
    fill(root, pillow(LABEL, "PNG"), ("train/0", "train/1", "train/2", "val/0"))
    assert "Images: 3 in train, 1 in val." in passes(root)
    shutil.rmtree(root / "cache")
    assert "Images: 3 in train, 1 in val." in passes(root, val_list=root / "images" / "val")


def test_one_folder_with_images_and_masks_in_each_split(root):
    fill(root, pillow(LABEL, "PNG"))
    for split, names in (("train", ("p0", "p1", "p2")), ("val", ("p3",))):
        for kind, suffix in (("images", "jpg"), ("masks", "png")):
            (root / "data" / split / kind).mkdir(parents=True)
            for name in names:
                shutil.copy(root / kind / f"{name}.{suffix}", root / "data" / split / kind)
    assert "Images: 3 in train, 1 in val." in passes(root, images=root / "data", masks=root / "data")


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_of_another_spelling(root, form):
    fill(root, pillow(LABEL, "PNG"), [unicodedata.normalize(form, n) for n in ("é0", "ü1", "が2", "p3")])
    for path in list((root / "masks").iterdir()):
        other = "NFD" if form == "NFC" else "NFC"
        path.rename(path.with_name(unicodedata.normalize(other, path.name)))
    passes(root)


def test_a_jpeg_mask_in_colors(root):
    wide = np.kron(LABEL, np.ones((4, 4), np.uint8))
    out = io.BytesIO()
    Image.fromarray(COLORS[wide]).save(out, "JPEG", quality=95, subsampling=0)
    fill(root, out.getvalue(), suffix=".jpg", classes=RGB)
    for path in (root / "images").iterdir():
        Image.open(path).resize(wide.shape[::-1]).save(path)
    assert check(root).returncode == 0
    assert all((label != wide).mean() < 0.02 for label in trained_on(root))
