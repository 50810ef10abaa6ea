"""`refine`: the CRF for anyone, on files."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.crf import CRFParams, Setting, mean_field, write_preset
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import listing
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.refinement import pieces
from deeplab_jax.refinement.files import Partners, RefineOptions, refine_file, refine_folder
from deeplab_jax.refinement.rough import PROBABILITY_FLOOR, Probabilities, RoughLabels
from tests.command_line import call
from tests.toy_workdir import photograph

PARAMS = CRFParams(4.0, 8.0, 12.0, 2.0, 1.5)
SETTINGS = Setting(PARAMS, 3, "after")
SIZE = (40, 56)


def probabilities(size=SIZE, classes=3, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = np.kron(rng.normal(size=(size[0] // 8 + 1, size[1] // 8 + 1, classes)), np.ones((8, 8, 1))) * 2
    p = np.exp(scores[: size[0], : size[1]])
    return (p / p.sum(-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.fromarray(photograph(SIZE)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", probabilities())
    return tmp_path


def refined(folder: Path, **options) -> np.ndarray:
    refine_file(folder / "a.png", folder / "a.npy", folder / "out", RefineOptions(SETTINGS, "probs", **options))
    return np.array(Image.open(folder / "out.png"))


def test_labels_are_mean_fields(folder):
    found = refined(folder)
    q = mean_field(-np.log(probabilities()), photograph(SIZE), PARAMS, 3, normalization="after")
    np.testing.assert_array_equal(found, np.asarray(q).argmax(-1))
    assert (found != probabilities().argmax(-1)).mean() > 0.005  # it did something
    picture = Image.open(folder / "out.png")
    assert picture.mode == "P" and picture.getpalette("RGB")[:6] == [0, 0, 0, 128, 0, 0]
    assert np.array(Image.open(folder / "out_overlay.png")).shape == (*SIZE, 3)


def test_zeros_count_as_the_floor(folder):
    p = probabilities()
    p[5:9, 5:9] = (1, 0, 0)
    np.save(folder / "a.npy", p.astype(np.float16))
    unary = np.asarray(Probabilities.from_file(folder / "a.npy", SIZE).unary((slice(5, 9), slice(5, 9))))
    np.testing.assert_allclose(unary[..., 1:], -np.log(PROBABILITY_FLOOR), rtol=1e-6)
    assert np.isfinite(refined(folder)).all()


def test_no_iterations_gives_the_input_back(folder):
    options = RefineOptions(replace(SETTINGS, iterations=0), "probs")
    refine_file(folder / "a.png", folder / "a.npy", folder / "out", options)
    np.testing.assert_array_equal(np.array(Image.open(folder / "out.png")), probabilities().argmax(-1))


def test_strip_shows_every_iteration(folder):
    refined(folder, iterations_strip=True)
    strip = np.array(Image.open(folder / "out_iterations.png"))
    assert strip.shape[1] > 4 * SIZE[1] and strip.shape[0] > 4 * SIZE[0]  # 0..3 iterations; labels and three classes


def test_frames_are_samples_of_all_iterations(folder):
    rough = Probabilities.from_file(folder / "a.npy", SIZE)
    image = photograph(SIZE)
    whole = np.asarray(
        mean_field(rough.unary((slice(None), slice(None))), image, PARAMS, 3, normalization="after", return_all=True)
    )
    labels, frames = pieces.refine_frames(rough, image, Setting(PARAMS, 3), frame_width=20)
    np.testing.assert_allclose(frames, whole[:, ::3, ::3], atol=1e-3)
    np.testing.assert_array_equal(labels, whole[-1].argmax(-1))
    in_pieces = pieces.refine_frames(rough, image, Setting(PARAMS, 3), cut_above=900, frame_width=20)
    assert np.abs(in_pieces[1].astype(float) - frames).mean() < 0.01


@pytest.mark.parametrize("size", [(300, 400), (1, 90000), (90000, 1), (301, 397)])
def test_pieces_cover_the_photograph_once(size):
    cut = pieces.pieces(size, 10_000, 25)
    covered = np.zeros(size, np.uint8)
    for piece in cut:
        covered[piece.core] += 1
        assert (piece.core[0].stop - piece.core[0].start) * (piece.core[1].stop - piece.core[1].start) <= 10_000
        for core, window, length in zip(piece.core, piece.window, size):
            assert window.start <= max(core.start - 25, 0) and window.stop >= min(core.stop + 25, length)
    assert (covered == 1).all() and len(cut) > 1
    assert len({(y.stop - y.start, x.stop - x.start) for (y, x), _ in cut}) == 1  # one shape: one program


def test_pieces_give_the_labels_of_the_whole():
    size = (56, 64)
    image, p = photograph(size, 3), probabilities(size, 4, 5)
    rough = Probabilities(np.arange(4, dtype=np.uint8), voc_palette(), p, Path("p.npy"))
    params = PARAMS.replace(bilateral_xy_std=4.0)  # reaches as far in this small photograph as 8 in a larger one
    setting = Setting(params, 5, bilateral="exact")
    assert len(pieces.pieces(size, 1800, pieces.margin_of(params))) > 1
    whole = pieces.refine(rough, image, setting)
    cut = pieces.refine(rough, image, setting, cut_above=1800)
    assert (whole != p.argmax(-1)).mean() > 0.01
    assert (whole != cut).mean() <= 0.005


@pytest.mark.long
def test_pieces_of_a_photograph_give_the_labels_of_the_whole_on_lattices(test_data):
    """Each piece has a lattice of its own; 500 x 375 pixels in pieces of 60,000."""
    case = np.load(test_data / "crf_cases" / "v2_full.npz")
    p = np.exp(-case["unary"].astype(np.float32))
    rough = Probabilities(np.arange(21, dtype=np.uint8), voc_palette(), p / p.sum(-1, keepdims=True), Path("p.npy"))
    params = CRFParams(4.0, 20.0, 3.0, 3.0, 3.0)  # reaches as far in this small photograph as 67 pixels in a large one
    setting = Setting(params, 10, bilateral="permutohedral")
    whole = pieces.refine(rough, case["image"], setting)
    cut = pieces.refine(rough, case["image"], setting, cut_above=60_000)
    assert len(pieces.pieces(whole.shape, 60_000, pieces.margin_of(params))) > 3
    assert (whole != p.argmax(-1)).mean() > 0.01
    assert (whole != cut).mean() <= 0.005


def test_the_strip_does_not_change_the_labels(tmp_path):
    """At a size where the lattice is the filter."""
    size = (150, 180)
    Image.fromarray(photograph(size)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", probabilities(size))
    settings = Setting(PARAMS, 4, "after", bilateral="permutohedral")
    found = []
    for strip in (False, True):
        refine_file(
            tmp_path / "a.png", tmp_path / "a.npy", tmp_path / "out", RefineOptions(settings, "probs", 255, 0.7, strip)
        )
        found.append(np.array(Image.open(tmp_path / "out.png")))
    assert (found[0] != probabilities(size).argmax(-1)).mean() > 0.01
    assert (found[0] != found[1]).mean() < 1e-3  # each adds its messages up in another order


def test_folders_pair_by_name_and_go_on_after_a_bad_file(tmp_path, capsys):
    for name in ("in/x/a", "in/b", "in/c", "in/d"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(SIZE)).save(tmp_path / f"{name}.jpg")
    (tmp_path / "p/x").mkdir(parents=True)
    np.save(tmp_path / "p/x/a_probs.npy", probabilities())
    np.save(tmp_path / "p/b.npy", probabilities())
    np.save(tmp_path / "p/d.npy", probabilities((40, 50)))
    failed = refine_folder(tmp_path / "in", tmp_path / "p", tmp_path / "out", RefineOptions(SETTINGS, "probs"))
    assert failed == 2
    assert sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "out").rglob("*.png")) == [
        "out/b.png", "out/b_overlay.png", "out/x/a.png", "out/x/a_overlay.png",
    ]  # fmt: skip
    errors = capsys.readouterr().err
    assert "c.jpg: " in errors and "has no c.npy for it" in errors and "but the photograph is 40 high" in errors


def test_names_that_cannot_be_printed_do_not_stop_a_folder(tmp_path, capfd):
    for name in (os.fsdecode(b"g\xff"), "ok"):
        for part in ("in", "p"):
            (tmp_path / part).mkdir(exist_ok=True)
        Image.fromarray(photograph(SIZE)).save(tmp_path / "in" / f"{name}.jpg")
        np.save(tmp_path / "p" / f"{name}.npy", probabilities())
    options = RefineOptions(SETTINGS, "probs", cut_above=900)  # with a line about pieces
    assert refine_folder(tmp_path / "in", tmp_path / "p", tmp_path / "out", options) == 0
    said = capfd.readouterr().out
    assert "g\\udcff.png" in said and "ok.png" in said and "g\\udcff.jpg: 0.0 megapixels" in said


def partners(images: Path, folder: Path, given: str) -> dict[str, str]:
    """The file of each photograph, or the sentence that explains why there is none."""
    found, of = {}, Partners(images, folder, given)
    for item in filter(of.is_photograph, listing.find_inputs([images])):
        try:
            found[item.path.name] = of.of(item).name
        except UserError as e:
            found[item.path.name] = str(e)
    return found


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_probabilities_pair_by_the_rules_of_data_sets(tmp_path):
    accent = "e\u0301"  # a letter and its accent, as macOS spells names
    images = touch(tmp_path / "i", "a.JPG", "b.jpg", "c.png", "d_img.png", f"{accent}.jpg", "x/f.tif", "g.jpg", "h.png")
    names = ("a.npy", "b.jpg.npy", "c_probs.NPY", "d_probs.npy", "\u00e9_prob.npy", "x/f.npy", "g_probs.npy")
    folder = touch(tmp_path / "p", *names, "g_prob.npy", "h.png", ".h.npy")
    found = partners(images, folder, "probs")
    assert list(found) == ["a.JPG", "b.jpg", "c.png", "d_img.png", f"{accent}.jpg", "g.jpg", "h.png", "f.tif"]
    assert [found[k] for k in list(found)[:5]] == [
        "a.npy",
        "b.jpg.npy",
        "c_probs.NPY",
        "d_probs.npy",
        "\u00e9_prob.npy",
    ]
    assert found["f.tif"] == "f.npy" and found["g.jpg"] == "g_probs.npy"
    assert found["h.png"].endswith("has no h.npy for it")
    (folder / "g_probs.npy").rename(folder / "g.jpg_prob.npy")
    assert "g.jpg_prob.npy" in partners(images, folder, "probs")["g.jpg"]
    touch(folder, "h_prob.npy", "h_probabilities.npy")
    assert "may both be the mask of" in partners(images, folder, "probs")["h.png"]
    assert partners(images, folder, "probs")["a.JPG"] == "a.npy"  # the others continue


def test_a_photograph_among_its_probabilities_or_labels(tmp_path):
    touch(tmp_path, "a.png", "a.npy", "b.jpg", "b_mask.png", "a_mask.png")
    assert partners(tmp_path, tmp_path, "labels") == {"a.png": "a_mask.png", "b.jpg": "b_mask.png"}
    (tmp_path / "b_mask.png").unlink()
    (tmp_path / "a_mask.png").unlink()
    assert list(partners(tmp_path, tmp_path, "probs")) == ["a.png", "b.jpg"]
    assert partners(tmp_path, tmp_path, "probs")["a.png"] == "a.npy"


@pytest.mark.parametrize(("given", "ending"), [("probs", "_probs.npy"), ("labels", ".png")])
def test_photographs_of_one_name_need_partners_of_their_full_names(tmp_path, given, ending):
    images = touch(tmp_path / "i", "a.jpg", "a.png")
    folder = touch(tmp_path / "p", f"a{ending}", f"a.jpg{ending}")
    found = partners(images, folder, given)
    assert found["a.jpg"] == f"a.jpg{ending}" and f"its file must be called a.png{ending}" in found["a.png"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (probabilities()[..., 0], "must be [H, W, C]"),
        (np.moveaxis(probabilities(), -1, 0), "[C, H, W]"),
        (probabilities().swapaxes(0, 1), "rows and columns look swapped"),
        (probabilities((40, 55)), "the photograph is 40 high and 56 wide"),
        (probabilities()[None], "a batch of one image; probabilities must be [H, W, C]: save array[0]"),
        (probabilities()[..., 0], "save numpy.stack([1 - p, p], -1)"),
        (np.clip(probabilities() + 0.4, 0, 1), "scores of independent classes (sigmoid) must be made one distribution"),
        ((probabilities() * 100).astype(np.int32), "holds int32; probabilities must be float16, float32 or float64"),
        (probabilities()[..., :1], "2 to 256"),
        (np.log(probabilities()), "give probabilities in 0..1"),
        (np.where(np.arange(3) == 1, np.nan, probabilities()).astype(np.float32), "holds NaN"),
        (probabilities() * 0, "probability 0"),
        (np.array({"a": 1}, dtype=object), "not a .npy file of numbers"),
    ],
)
def test_bad_probabilities_in_a_sentence(folder, array, words):
    np.save(folder / "a.npy", array, allow_pickle=True)
    with pytest.raises(UserError) as error:
        refined(folder)
    assert words in str(error.value) and "a.npy" in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "out.png").exists()


def test_bad_files_in_a_sentence(folder, tmp_path):
    (tmp_path / "zip.npy").write_bytes(b"PK\x03\x04 no")
    (tmp_path / "text.npy").write_text("hello")
    np.savez(tmp_path / "z.npz", a=1)
    Image.fromarray(np.full((4, 4), 1, np.uint8)).save(tmp_path / "small.png")
    options, labels = RefineOptions(SETTINGS, "probs"), RefineOptions(SETTINGS, "labels")
    cases = [
        ("a.png", "none.npy", options, "no such file"),
        ("a.png", "zip.npy", options, "numpy.save"),
        ("a.png", "text.npy", options, "numpy.save"),
        ("a.png", "z.npz", options, "archive"),
        ("text.npy", "a.npy", options, "cannot be decoded"),
        ("a.png", "small.png", labels, "they must be equal"),
        ("a.png", "a.npy", labels, "cannot be decoded"),
    ]
    for image, given, how, words in cases:
        with pytest.raises(UserError, match=words.replace("(", "\\(")):
            refine_file(tmp_path / image, tmp_path / given, tmp_path / "out", how)
    with pytest.raises(UserError, match="overwrite"):
        refine_file(folder / "a.png", folder / "a.npy", folder / "a", options)


@pytest.mark.parametrize("dtype", [np.float64, ">f4"])
def test_double_precision_and_the_other_byte_order_are_read(folder, dtype):
    first = refined(folder)
    np.save(folder / "a.npy", np.load(folder / "a.npy").astype(dtype))
    np.testing.assert_array_equal(refined(folder), first)


def test_command(folder):
    done = call(
        "refine", f"--image={folder}/a.png", f"--probs={folder}/a.npy", f"--out={folder}/o.png", "--iterations=2"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{folder}/o.png") and done.stderr == ""
    assert (folder / "o_overlay.png").is_file()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bilateral_rgb_std=0"], "--bilateral_rgb_std=0.0 must be greater than 0"),
        (["--max_megapixels=nan"], "--max_megapixels=nan: give a number from 0"),
        (["--max_megapixels=1e400"], "--max_megapixels=inf: give a number from 0"),
        (["--preset=nonsense"], "--preset='nonsense' is neither"),
    ],
)
def test_command_refuses_in_a_sentence(folder, flags, words):
    done = call("refine", f"--image={folder}/a.png", f"--probs={folder}/a.npy", f"--out={folder}/o.png", *flags)
    assert done.returncode == 1 and done.stdout == "" and words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_preset_file_and_the_message_about_pieces(folder):
    write_preset(folder / "mine.json", Setting(PARAMS, 2, "symmetric", "by hand"))
    flags = (f"--image={folder}/a.png", f"--probs={folder}/a.npy", f"--out={folder}/o.png")
    done = call("refine", *flags, f"--preset={folder}/mine.json", "--crf_max_pixels=900")
    assert done.returncode == 0, done.stderr
    count = len(pieces.pieces(SIZE, 900, pieces.margin_of(PARAMS)))
    assert count > 2
    assert f"above --cut_above: in {count} overlapping pieces" in done.stdout
    settings = Setting(PARAMS, 2, "symmetric")
    refine_file(folder / "a.png", folder / "a.npy", folder / "p", RefineOptions(settings, "probs", cut_above=900))
    np.testing.assert_array_equal(Image.open(folder / "o.png"), Image.open(folder / "p.png"))


def test_weights_for_other_classes_are_a_sentence(folder):
    params = PARAMS.replace(bilateral_weight=np.ones(5))
    options = RefineOptions(Setting(params, 2, "after"), "probs")
    with pytest.raises(UserError, match=r"a\.npy: bilateral_weight has a number for each of 5 classes, but"):
        refine_file(folder / "a.png", folder / "a.npy", folder / "out", options)


def test_weights_per_class_belong_to_the_ids_of_the_map(folder):
    """A map holds only some of the classes: their weights are found by id, not by place."""
    weights = np.float32([2.0, 0.0, 5.0, 1.0, 0.5])
    labels = np.where(probabilities()[..., 0] > 0.4, 2, 4).astype(np.uint8)
    Image.fromarray(labels).save(folder / "l.png")
    params = PARAMS.replace(bilateral_weight=weights)
    options = RefineOptions(Setting(params, 3, "symmetric"), "labels")
    refine_file(folder / "a.png", folder / "l.png", folder / "out", options)
    unary = RoughLabels.from_file(folder / "l.png", SIZE, 255, 0.7).unary((slice(None), slice(None)))
    image = np.array(Image.open(folder / "a.png"))
    own = PARAMS.replace(bilateral_weight=np.float32([5.0, 0.5]))
    expected = np.array([2, 4])[np.asarray(mean_field(unary, image, own, 3)).argmax(-1)]
    found = np.array(Image.open(folder / "out.png"))
    assert (found != labels).mean() > 0.01 and (found != expected).mean() < 0.002
    labels[0, 0] = 7
    Image.fromarray(labels).save(folder / "l.png")
    message = (
        r"l\.png: bilateral_weight has a number for each of the classes 0 to 4, and none for 7; choose .* --preset"
    )
    with pytest.raises(UserError, match=message):
        refine_file(folder / "a.png", folder / "l.png", folder / "out", options)


def test_scribbles_of_the_classic_demo(test_data, tmp_path):
    source = test_data / "densecrf_examples"
    settings = Setting(CRFParams(10.0, 80.0, 13.0, 3.0, 3.0), 5, "symmetric", bilateral="permutohedral")
    refine_file(
        source / "im1.png", source / "anno1.png", tmp_path / "out", RefineOptions(settings, "labels", unknown=0)
    )
    found = np.array(Image.open(tmp_path / "out.png"))
    scribbles = np.array(Image.open(source / "anno1.png"))
    # pydensecrf2, same unary and parameters: 16.3 % of the pixels get label 1, 88.1 % of the scribbles are kept.
    assert set(np.unique(found)) == {1, 2}
    assert (found == 1).mean() == pytest.approx(0.163, abs=0.02)
    assert (found == scribbles)[scribbles > 0].mean() == pytest.approx(0.881, abs=0.02)
