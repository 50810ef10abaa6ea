"""What results replace: those of the same photograph, with all that belongs to them, and nothing of others."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import check_dataset
from deeplab_jax.data.annotations import conversion
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files, listing
from deeplab_jax.inference import photographs
from deeplab_jax.inference.export_artifact import write_artifact
from deeplab_jax.inference.photographs import PredictOptions, predict
from deeplab_jax.refinement.files import RefineOptions, refine_folder
from tests.command_line import call
from tests.inference.test_video import SIZE as FRAME
from tests.inference.test_video import model, write
from tests.test_refine import SETTINGS, SIZE, folder, probabilities
from tests.toy_workdir import photograph

__all__ = ["folder", "model"]  # fixtures
# ffmpeg is started by a fork that executes it at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")


@pytest.fixture
def street(tmp_path):
    (tmp_path / "in").mkdir()
    Image.fromarray(photograph(FRAME)).save(tmp_path / "in" / "a.jpg")
    return tmp_path / "in"


def with_marginals(model):
    """The model, whose marginals are the number of iterations."""

    def many(images, iterations=None, marginals=False):
        shape = images[0].shape[:2]
        q = np.full((*shape, 2), iterations or 0, np.float32) if marginals else None
        return [(np.zeros(shape, np.uint8), q) for _ in images]

    return type(model)(**vars(model) | {"many": many})


def test_probabilities_are_never_those_of_another_label_map(model, street, tmp_path):
    made = with_marginals(model)
    probs = tmp_path / "out" / "a_probs.npy"
    options = PredictOptions(tmp_path / "out", iterations=1, probabilities=True)
    for change, kept in (({}, 1), ({"iterations": 3, "probabilities": False}, None), ({"iterations": 3}, 3)):
        assert predict(made, [street], replace(options, **change), say=str) == 0
        assert (np.load(probs)[0, 0, 0] == kept) if kept else not probs.exists()
    said = []
    assert predict(made, [street], replace(options, iterations=3, probabilities=False), say=said.append) == 0
    assert said == ["1 of 1 are done and skipped (--overwrite recomputes them)"] and probs.exists()


def test_iterations_are_never_those_of_another_label_map(folder, tmp_path):
    strip = tmp_path / "out" / "a_iterations.png"
    for name in ("images", "probs"):
        (tmp_path / name).mkdir()
    Image.fromarray(photograph(SIZE)).save(tmp_path / "images" / "a.png")
    np.save(tmp_path / "probs" / "a.npy", probabilities().astype(np.float16))
    widths = []
    for count, wanted in ((1, True), (3, False), (3, True)):
        options = RefineOptions(replace(SETTINGS, iterations=count), "probs", iterations_strip=wanted)
        assert refine_folder(tmp_path / "images", tmp_path / "probs", tmp_path / "out", options) == 0
        assert strip.exists() == wanted
        widths += [Image.open(strip).width] if wanted else []
    assert widths[1] > widths[0]  # four columns instead of two


def test_files_of_others_are_not_replaced(model, street, folder, tmp_path):
    out, made = tmp_path / "out", [street / "a.jpg"]
    out.mkdir()
    Image.fromarray(photograph(FRAME)).save(out / "a.png")
    before = (out / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"a\.png: exists, and is no result of this program; choose another --out"):
        predict(model, made, PredictOptions(out), say=str)
    (tmp_path / "images").mkdir()
    (folder / "a.png").rename(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match=r"a\.png: exists, and is no result of this program"):
        refine_folder(tmp_path / "images", folder, out, RefineOptions(SETTINGS, "probs"))
    assert (out / "a.png").read_bytes() == before
    assert predict(model, made, PredictOptions(out, overwrite=True), say=str) == 0
    assert not files.is_foreign(out / "a.png")
    (out / "a.png").write_bytes(before[:40])  # half a file is no one's
    assert predict(model, made, PredictOptions(out), say=str) == 0
    (out / "b.png").write_bytes(b"a text")
    assert files.is_foreign(out / "b.png") and not files.is_foreign(out / "c.png")


def test_masks_of_others_are_not_replaced(tmp_path):
    (tmp_path / "labels").mkdir()
    shape = '{"label": "cat", "points": [[0, 0], [4, 0], [4, 4]], "shape_type": "polygon"}'
    labelme = f'{{"imageHeight": 8, "imageWidth": 9, "imagePath": "a.jpg", "shapes": [{shape}]}}'
    (tmp_path / "labels" / "a.json").write_text(labelme)
    (tmp_path / "own" / "masks").mkdir(parents=True)
    Image.fromarray(np.ones((8, 9), np.uint8)).save(tmp_path / "own" / "masks" / "a.png")
    (tmp_path / "own" / "classes.txt").write_text("mine\nother\n")
    for names in ("mine\nother\n", "background\ncat\n"):
        (tmp_path / "own" / "classes.txt").write_text(names)
        with pytest.raises(UserError, match=r"a\.png: exists, and convert_labels did not write it; remove it, or name"):
            conversion.convert(tmp_path / "labels", tmp_path / "own", None, None, 0)
        assert (tmp_path / "own" / "classes.txt").read_text() == names
    (tmp_path / "own" / "classes.txt").write_text("mine\nother\n")
    (tmp_path / "own" / "masks" / "a.png").rename(tmp_path / "own" / "masks" / "b.png")
    with pytest.raises(UserError, match="own: holds masks or a classes file of another origin; name another --out"):
        conversion.convert(tmp_path / "labels", tmp_path / "own", None, None, 0)
    conversion.convert(tmp_path / "labels", tmp_path / "new", None, None, 0)
    (tmp_path / "labels" / "a.json").write_text(labelme.replace("cat", "dog"))
    conversion.convert(tmp_path / "labels", tmp_path / "new", None, None, 0)
    assert "dog" in (tmp_path / "new" / "classes.txt").read_text()
    assert files.is_foreign(tmp_path / "new" / "masks" / "a.png")  # to `predict` and `refine`


def test_masks_are_shown_over_the_photograph_of_their_own_folder(tmp_path):
    found = conversion._photographs(tmp_path)
    assert found == {}
    for name in ("x/a.jpg", "y/a.jpg", "b.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    found = conversion._photographs(tmp_path)
    for stem, name in (("x/a", "x/a.jpg"), ("y/a", "y/a.jpg"), ("b", "b.jpg"), ("any/b", "b.jpg")):
        assert conversion._of(stem, found) == tmp_path / name
    assert conversion._of("a", found) is None and conversion._of("c", found) is None


def test_an_interrupt_does_not_wait_for_the_end_of_a_video(model, tmp_path):
    """The first frames arrive, then the interrupt; what is written so far is removed."""
    write(tmp_path / "in" / "a.mp4", count=60, codec="mpeg4", quality=9)
    begun, asked = threading.Event(), []

    def many(images, *_, **__):
        asked.append(len(images))
        begun.set()
        return [(np.zeros(image.shape[:2], np.uint8), None) for image in images]

    slow = type(model)(**vars(model) | {"many": many})
    tasks = photographs.plan([tmp_path / "in"], slow, PredictOptions(tmp_path / "out"))
    outcomes = photographs._outcomes(slow, tasks, PredictOptions(tmp_path / "out"), lambda line: interrupt(line))

    def interrupt(line):
        if "frame 25" in line or "frame 28" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    assert begun.is_set() and sum(asked) < 60
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


def test_links_are_photographs_of_their_own_and_an_empty_path_is_none(street):
    (street / "b.jpg").symlink_to("a.jpg")
    assert [item.path.name for item in listing.find_inputs([street, street / "a.jpg"])] == ["a.jpg", "b.jpg"]
    with pytest.raises(UserError, match="a PATH is empty; name a photograph, a video or a folder"):
        listing.find_inputs([""])


def test_names_that_cannot_be_written_are_refused_at_once(monkeypatch, tmp_path):
    done = call("check_dataset", "--config", "folder", "--out=sheet.jpg")
    assert done.stderr == "error: --out=sheet.jpg: the contact sheet is a PNG; name a file such as contact_sheet.png\n"
    assert done.returncode == 1 and check_dataset.__doc__
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"\.: is the current folder or above it"):
        write_artifact(None, ".", [(33, 33)])
