"""`refine --labels`: maps of ids, scribbles, and maps in the colors of classes."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.crf import CRFParams, Setting
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.refinement.files import RefineOptions, refine_file, refine_folder
from deeplab_jax.refinement.rough import RoughLabels
from tests.command_line import call
from tests.toy_workdir import photograph

SETTINGS = Setting(CRFParams(4.0, 8.0, 12.0, 2.0, 1.5), 3, "after")
SIZE = (40, 56)
RED, GREEN = (200, 0, 0), (0, 200, 0)
SCRIBBLES = np.full(SIZE, 255, np.uint8)
SCRIBBLES[10:14, 4:8], SCRIBBLES[20:24, 44:48] = 0, 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(photograph(SIZE)).save(tmp_path / "a.png")
    return tmp_path


def colored(path: Path, classes: list, void: tuple) -> Path:
    """The scribbles in the colors of two classes, on `void`."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(classes)], table[255] = classes, void
    Image.fromarray(table[SCRIBBLES]).save(path)
    return path


def test_sparse_labels_keep_their_ids_and_palette(tmp_path):
    image = np.full((*SIZE, 3), 60, np.uint8)
    image[:, 28:] = 200
    labels = np.full(SIZE, 9, np.uint8)
    labels[10:14, 4:8], labels[20:24, 44:48] = 3, 7
    palette = voc_palette()
    palette[3], palette[7] = (250, 0, 0), (0, 0, 250)
    Image.fromarray(image).save(tmp_path / "a.png")
    files.write_palette_png(tmp_path / "l.png", labels, palette)
    options = RefineOptions(Setting(CRFParams(10.0, 40.0, 13.0, 3.0, 3.0), 8, "after"), "labels", unknown=9)
    refine_file(tmp_path / "a.png", tmp_path / "l.png", tmp_path / "out", options)
    found = np.array(Image.open(tmp_path / "out.png"))
    assert (found[:, :28] == 3).all() and (found[:, 28:] == 7).all()
    assert Image.open(tmp_path / "out.png").getpalette("RGB")[9:12] == [250, 0, 0]


def test_unary_of_labels(tmp_path):
    labels = np.array([[4, 4, 255], [6, 8, 8]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "l.png")
    rough = RoughLabels.from_file(tmp_path / "l.png", (2, 3), 255, 0.7)
    p = np.exp(-np.asarray(rough.unary((slice(0, 2), slice(0, 3)))))
    np.testing.assert_array_equal(rough.ids, [4, 6, 8])
    np.testing.assert_allclose(p[0, 0], [0.7, 0.15, 0.15], rtol=1e-5)
    np.testing.assert_allclose(p[0, 2], [1 / 3] * 3, rtol=1e-5)
    np.testing.assert_allclose(p[1, 1], [0.15, 0.15, 0.7], rtol=1e-5)


@pytest.mark.parametrize("labels", [np.zeros(SIZE, np.uint8), np.full(SIZE, 255, np.uint8), np.full(SIZE, 7, np.uint8)])
def test_a_map_of_one_label_comes_out_as_it_is(folder, labels, capsys):
    Image.fromarray(labels).save(folder / "l.png")
    refine_file(folder / "a.png", folder / "l.png", folder / "out", RefineOptions(SETTINGS, "labels"))
    np.testing.assert_array_equal(np.array(Image.open(folder / "out.png")), labels)
    assert (folder / "out_overlay.png").is_file() and "unchanged" in capsys.readouterr().out


def test_a_settled_map_of_a_folder_is_done_with_its_strip_too(tmp_path, capsys):
    for part in ("in", "l"):
        (tmp_path / part).mkdir()
    Image.fromarray(photograph(SIZE)).save(tmp_path / "in" / "a.jpg")
    Image.fromarray(np.full(SIZE, 3, np.uint8)).save(tmp_path / "l" / "a.png")
    options = RefineOptions(SETTINGS, "labels", iterations_strip=True)
    for said in ("only the id 3: unchanged", "1 of 1 are done and skipped"):
        assert refine_folder(tmp_path / "in", tmp_path / "l", tmp_path / "out", options) == 0
        assert said in capsys.readouterr().out
    assert (tmp_path / "out" / "a_iterations.png").is_file()


def test_labels_of_data_sets_names_and_colors(tmp_path):
    colors = np.array([[9, 9, 9], [200, 0, 0]], np.uint8)
    labels = (np.arange(SIZE[1]) > SIZE[1] // 2).astype(np.uint8)[None].repeat(SIZE[0], 0)
    (tmp_path / "in").mkdir()
    (tmp_path / "l").mkdir()
    for name, label in (("a", "a_mask.PNG"), ("b", "b.jpg.png")):
        Image.fromarray(photograph(SIZE)).save(tmp_path / "in" / f"{name}.jpg")
        Image.fromarray(colors[labels]).save(tmp_path / "l" / label)
    options = RefineOptions(SETTINGS, "labels", colors=colors)
    assert refine_folder(tmp_path / "in", tmp_path / "l", tmp_path / "out", options) == 0
    with Image.open(tmp_path / "out" / "b.png") as image:
        assert set(np.unique(np.array(image))) == {0, 1} and image.getpalette()[3:6] == [200, 0, 0]
    assert refine_folder(tmp_path / "in", tmp_path / "l", tmp_path / "out", RefineOptions(SETTINGS, "labels")) == 2


@pytest.mark.parametrize("void", [(0, 0, 0), (255, 255, 255), (224, 224, 192)])
def test_void_of_a_colored_map_is_unknown(tmp_path, void):
    colors = np.array([RED, GREEN], np.uint8)
    path = colored(tmp_path / "l.png", [RED, GREEN], void)
    for unknown in (255, 7):  # an id that does not occur changes nothing
        rough = RoughLabels.from_file(path, SIZE, unknown, 0.7, colors)
        np.testing.assert_array_equal(rough.ids, [0, 1])
        np.testing.assert_array_equal(rough.channels, np.where(SCRIBBLES == 255, -1, SCRIBBLES.astype(int)))
    with pytest.raises(UserError) as error:
        RoughLabels.from_file(path, SIZE, 0, 0.7, colors)
    assert str(error.value) == (
        f"{path}: has the colors of --classes, of which --unknown=0 would leave out class 0, (200, 0, 0); leave out "
        "--unknown: black, white and (224, 224, 192) are unknown already where no class has them"
    )


def test_a_class_in_a_void_color_and_ids_may_be_unknown(tmp_path):
    black = np.array([(0, 0, 0), RED, GREEN], np.uint8)
    path = colored(tmp_path / "l.png", [RED, GREEN], (0, 0, 0))
    rough = RoughLabels.from_file(path, SIZE, 0, 0.7, black)
    np.testing.assert_array_equal(rough.ids, [1, 2])
    np.testing.assert_array_equal(rough.channels, np.where(SCRIBBLES == 255, -1, SCRIBBLES.astype(int)))
    Image.fromarray(SCRIBBLES).save(path)
    rough = RoughLabels.from_file(path, SIZE, 0, 0.7, np.array([RED, GREEN], np.uint8))
    np.testing.assert_array_equal(rough.ids, [1])  # a map of ids with a classes file: 0 is left out, void is too
    np.testing.assert_array_equal(RoughLabels.from_file(path, SIZE, 0, 0.7).ids, [1, 255])


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_ids_of_a_jpeg_are_refused(folder, mode):
    Image.fromarray(np.where(SCRIBBLES == 255, 0, 9 * SCRIBBLES + 9)).convert(mode).save(folder / "l.jpg", quality=60)
    with pytest.raises(UserError) as error:
        refine_file(folder / "a.png", folder / "l.jpg", folder / "out", RefineOptions(SETTINGS, "labels", 0))
    count = len(np.unique(Image.open(folder / "l.jpg")))
    assert count > 3 and str(error.value) == (
        f"{folder}/l.jpg: has lossy compression, which invents ids ({count} values); save masks as PNG, or give each "
        "class its gray as R G B in the file of --classes"
    )
    assert not list(folder.glob("out*"))


def test_a_jpeg_in_the_classes_colors_is_read(tmp_path):
    colored(tmp_path / "l.png", [RED, GREEN], (0, 0, 0))
    Image.open(tmp_path / "l.png").save(tmp_path / "l.jpg", quality=95, subsampling=0)
    rough = RoughLabels.from_file(tmp_path / "l.jpg", SIZE, 255, 0.7, np.array([RED, GREEN], np.uint8))
    np.testing.assert_array_equal(rough.ids, [0, 1])
    assert (rough.channels != np.where(SCRIBBLES == 255, -1, SCRIBBLES.astype(int))).mean() < 0.02


def test_errors_of_label_maps_name_the_flags(folder):
    Image.fromarray(SCRIBBLES.astype(np.uint16) + 50).save(folder / "deep.png")
    Image.fromarray(np.dstack([photograph(SIZE), SCRIBBLES])).save(folder / "rgba.png")
    cases = [
        ("deep.png", "", "holds the id 305, and ids above 255 are not supported; renumber them, or store what is "
         "unlabelled as the id of --unknown"),
        ("rgba.png", "", "is a color picture where class ids are expected; give R G B for each class in the file of "
         "--classes, or save an index or palette PNG"),
        ("deep.png", "none.txt", "no such file; check the name of the classes file"),
    ]  # fmt: skip
    for name, classes, words in cases:
        flags = [f"--classes={folder}/{classes}"] * bool(classes)
        out = folder / "o.png"
        done = call("refine", f"--image={folder}/a.png", f"--labels={folder}/{name}", f"--out={out}", *flags)
        assert (done.returncode, done.stdout) == (1, "") and not out.exists()
        assert done.stderr == f"error: {folder}/{classes or name}: {words}\n"
