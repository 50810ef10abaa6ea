"""`predict`: files of photographs and videos in, labels at their own size out."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.errors import UserError
from deeplab_jax.imaging import files, listing
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.inference import photographs
from deeplab_jax.inference.photographs import PredictOptions, predict
from tests.command_line import call
from tests.toy_workdir import NAMES, photograph, write_weights

ROOT = Path(__file__).parents[1]
SIZE = (24, 30)


def save(path: Path, image: np.ndarray | Image.Image, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def outputs(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


# ---- photographs of every kind -------------------------------------------------------------------------------------


def test_every_kind_of_photograph_at_its_own_size(segment, tmp_path):
    image = photograph(SIZE)
    gray = image.mean(-1).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    save(tmp_path / "in/rgb.png", image)
    save(tmp_path / "in/gray.png", gray)
    save(tmp_path / "in/rgba.png", np.dstack([image, gray]))
    save(tmp_path / "in/cmyk.jpg", Image.fromarray(image).convert("CMYK"))
    save(tmp_path / "in/sixteen.png", Image.fromarray(gray.astype(np.uint16) * 257))
    save(tmp_path / "in/turned.jpg", Image.fromarray(image), exif=exif)
    save(tmp_path / "in/thin.png", image[:, :1])
    save(tmp_path / "in/dot.png", image[:1, :1])
    save(tmp_path / "in/palette.png", Image.fromarray(image).quantize(16))
    assert predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "out"), say=str) == 0
    for source in (tmp_path / "in").iterdir():
        expected = {"turned": SIZE[::-1], "thin": (SIZE[0], 1), "dot": (1, 1)}.get(source.stem, SIZE)
        picture = Image.open(tmp_path / "out" / f"{source.stem}.png")
        assert picture.mode == "P" and picture.size == expected[::-1]
        assert Image.open(tmp_path / "out" / f"{source.stem}_overlay.png").size == expected[::-1]
        np.testing.assert_array_equal(np.array(picture), segment(files.read_photograph(source)).labels)
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out/rgb.png")), segment(image).labels)
    sixteen, eight = (np.array(Image.open(tmp_path / f"out/{n}.png")) for n in ("sixteen", "gray"))
    np.testing.assert_array_equal(sixteen, eight)


def test_too_large_is_refused_with_the_flag(segment, tmp_path, capsys):
    save(tmp_path / "big.png", np.zeros((300, 300, 3), np.uint8))
    assert predict(segment, [tmp_path / "big.png"], PredictOptions(tmp_path / "out", refuse_above=80_000), say=str) == 1
    assert "--refuse_above" in capsys.readouterr().err


# ---- many files ----------------------------------------------------------------------------------------------------


def test_a_bad_file_is_reported_and_the_rest_go_on(segment, tmp_path, capsys):
    save(tmp_path / "in/a.png", photograph(SIZE))
    (tmp_path / "in/b.jpg").write_bytes(b"not a photograph")
    (tmp_path / "in/c.png").write_bytes((tmp_path / "in/a.png").read_bytes()[:500])
    (tmp_path / "in/d.jpg").touch()
    save(tmp_path / "in/e.png", photograph(SIZE, 1))
    lines = []
    assert predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "out"), say=lines.append) == 3
    assert outputs(tmp_path / "out") == ["a.png", "a_overlay.png", "e.png", "e_overlay.png"]
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and errors[-1] == "error: 3 of 5 files failed"
    assert all(f"{n}: " in "".join(errors) for n in ("b.jpg", "c.png", "d.jpg"))
    assert len(lines) == 5 and "left] " in lines[0] and lines[-1].startswith("[5/5] ")


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_photograph_that_the_model_refuses_is_named_and_the_rest_go_on(tmp_path, capsys, batch_size):
    def many(images, iterations, marginals):
        if any(image[0, 0, 0] == 0 for image in images):
            raise UserError("the CRF's marginals are not finite; give smaller weights")
        return [(np.zeros(SIZE, np.uint8), None)] * len(images)

    model = SimpleNamespace(
        many=many, batch_size=batch_size, workers=1, identity=["toy"], class_names=NAMES, palette=voc_palette(),
        remark=lambda size: "", plan=lambda sizes: None, programs={},
    )  # fmt: skip
    for name, value in {"a": 0, "b": 200, "c": 100}.items():
        save(tmp_path / f"in/{name}.png", np.full((*SIZE, 3), value, np.uint8))
    assert predict(model, [tmp_path / "in"], PredictOptions(tmp_path / "out"), say=lambda line: None) == 1
    assert outputs(tmp_path / "out") == ["b.png", "b_overlay.png", "c.png", "c_overlay.png"]
    assert f"error: {tmp_path}/in/a.png: the CRF's marginals are not finite" in capsys.readouterr().err


def test_names_that_cannot_be_printed_are_escaped(segment, tmp_path, capsys):
    """Bytes that are not UTF-8 would end the command at its first line about the file."""
    frames = [Image.fromarray(photograph(SIZE, n)) for n in range(2)]
    (tmp_path / "in").mkdir()
    name = os.fsdecode(b"g\xff\x1b[31m.gif")
    frames[0].save(tmp_path / "in" / name, save_all=True, append_images=frames[1:])
    lines: list[str] = []
    assert predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "out"), say=lines.append) == 0
    said = capsys.readouterr().out + "\n".join(lines)
    assert "has 2 frames; the first is read" in said and "g\\udcff\\x1b[31m.gif" in said
    said.encode("utf-8")


def test_a_result_of_more_pixels_than_pillow_opens_is_known_to_be_done(tmp_path, monkeypatch):
    files.write_palette_png(tmp_path / "a.png", np.zeros((30, 40), np.uint8), voc_palette(), note="done")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombError):
        Image.open(tmp_path / "a.png")
    assert files.read_note(tmp_path / "a.png") == "done"
    (tmp_path / "b.png").write_bytes(b"text")
    assert files.read_note(tmp_path / "b.png") is None and files.read_note(tmp_path / "c.png") is None


def test_a_rerun_skips_what_is_done_and_only_that(segment, tmp_path, monkeypatch):
    for name in "ab":
        save(tmp_path / f"in/{name}.png", photograph(SIZE, ord(name)))
    options = PredictOptions(tmp_path / "out")
    computed = []
    compute = photographs._compute
    monkeypatch.setattr(
        photographs, "_compute", lambda s, b, *o: computed.extend(t.source.path.stem for t, _ in b) or compute(s, b, *o)
    )

    def run(options=options) -> list[str]:
        computed.clear()
        assert predict(segment, [tmp_path / "in"], options, say=str) == 0
        return sorted(computed)

    assert run() == ["a", "b"]
    assert run() == []
    (tmp_path / "out/a_overlay.png").unlink()
    assert run() == ["a"]
    save(tmp_path / "in/b.png", photograph(SIZE, 9))  # another photograph of this name
    assert run() == ["b"]
    assert run(PredictOptions(tmp_path / "out", iterations=0)) == ["a", "b"]  # other settings
    assert run(PredictOptions(tmp_path / "out", iterations=0, probabilities=True)) == ["a", "b"]
    assert run(PredictOptions(tmp_path / "out", iterations=0, probabilities=True)) == []
    assert run(PredictOptions(tmp_path / "out", iterations=0, overwrite=True)) == ["a", "b"]
    (tmp_path / "out/a.png").write_bytes((tmp_path / "out/a.png").read_bytes()[:40])  # half a file
    assert run(PredictOptions(tmp_path / "out", iterations=0)) == ["a"]


def test_equal_stems_do_not_collide(segment, tmp_path):
    image = photograph(SIZE)
    for name in ("one/a.jpg", "one/a.png", "one/x/a.png", "two/x/a.png", "one/b.png", "one/c.png", "one/c_overlay.png"):
        save(tmp_path / name, image)
    inputs = listing.find_inputs([tmp_path / "one", tmp_path / "two"])
    stems = dict(zip((p.path.relative_to(tmp_path).as_posix() for p in inputs), listing.result_stems(inputs)))
    assert stems == {
        "one/a.jpg": "a.jpg", "one/a.png": "a.png", "one/x/a.png": "one/x/a.png", "two/x/a.png": "two/x/a.png",
        "one/b.png": "b", "one/c.png": "c.png", "one/c_overlay.png": "c_overlay.png",
    }  # fmt: skip
    assert predict(segment, [tmp_path / "one", tmp_path / "two"], PredictOptions(tmp_path / "out"), say=str) == 0
    assert len(outputs(tmp_path / "out")) == 14


def test_inputs(tmp_path):
    save(tmp_path / "in/a.jpg", photograph((8, 8)))
    save(tmp_path / "in/.hidden/b.jpg", photograph((8, 8)))
    save(tmp_path / "in/out/a.png", photograph((8, 8)))
    (tmp_path / "in/readme.txt").write_text("no photograph")
    found = listing.find_inputs([tmp_path / "in", tmp_path / "in/a.jpg"], exclude=tmp_path / "in/out")
    assert [i.path.name for i in found] == ["a.jpg"]
    for paths in ([tmp_path / "nothing"], []):
        with pytest.raises(UserError):
            listing.find_inputs(paths)


def test_results_do_not_go_among_the_photographs(segment, tmp_path):
    Image.fromarray(photograph(SIZE)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match="is the folder of the photographs"):
        predict(segment, [tmp_path], PredictOptions(tmp_path), say=str)


def test_results_never_overwrite_photographs(segment, tmp_path):
    save(tmp_path / "a.png", photograph(SIZE))
    with pytest.raises(UserError, match="overwrite"):
        predict(segment, [tmp_path / "a.png"], PredictOptions(tmp_path), say=str)


def test_reading_computing_and_writing_overlap(tmp_path, monkeypatch):
    """The second photograph is read before the first is computed, and computed before the first is written."""
    for n in range(3):
        save(tmp_path / f"in/{n}.png", photograph(SIZE, n))
    read, computing = threading.Event(), threading.Event()
    ahead = {}

    def read_photograph(path, **options):
        image = read_whole(path, **options)
        if path.stem == "1":
            read.set()
        return image

    def many(images, iterations, marginals):
        (image,) = images
        if np.array_equal(image, photograph(SIZE, 0)):
            ahead["read"] = read.wait(60)
        if np.array_equal(image, photograph(SIZE, 1)):
            computing.set()
        return [(np.zeros(SIZE, np.uint8), None)]

    def write(computed, i, task, *rest):
        if task.source.path.stem == "0":
            ahead["computed"] = computing.wait(60)
        return write_whole(computed, i, task, *rest)

    read_whole, write_whole = files.read_photograph, photographs._write
    monkeypatch.setattr(files, "read_photograph", read_photograph)
    monkeypatch.setattr(photographs, "_write", write)
    names = {
        "class_names": NAMES,
        "palette": voc_palette(),
        "identity": [],
        "remark": lambda size: "",
        "plan": len,
        "programs": {},
    }
    segment = SimpleNamespace(many=many, batch_size=1, workers=1, **names)
    assert predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "out"), say=str) == 0
    assert ahead == {"read": True, "computed": True}
    assert len(outputs(tmp_path / "out")) == 6


def test_batches_and_single_photographs_agree(workdir, segment, tmp_path):
    for n in range(5):
        save(tmp_path / f"in/{n}.png", photograph((SIZE[0] + n % 2, SIZE[1]), n))
    predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "one"), say=str)
    predict(deeplab_jax.load(workdir, batch_size=3), [tmp_path / "in"], PredictOptions(tmp_path / "three"), say=str)
    for n in range(5):
        one, three = (np.array(Image.open(tmp_path / f"{k}/{n}.png")) for k in ("one", "three"))
        assert (one != three).mean() < 0.001


# ---- probabilities, refine -----------------------------------------------------------------------------------------


def test_probabilities_then_refine_gives_predicts_labels(segment, tmp_path):
    from deeplab_jax.refinement.files import RefineOptions, refine_folder

    different = total = 0
    for n in range(3):
        save(tmp_path / f"in/{n}.png", photograph((97, 130), n))
    predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "crf"), say=str)
    predict(segment, [tmp_path / "in"], PredictOptions(tmp_path / "net", iterations=0, probabilities=True), say=str)
    p = np.load(tmp_path / "net/0_probs.npy")
    assert p.dtype == np.float16 and p.shape == (97, 130, 4)
    options = RefineOptions(segment.crf, "probs")
    assert refine_folder(tmp_path / "in", tmp_path / "net", tmp_path / "refined", options) == 0
    for n in range(3):
        ours, predicted = (np.array(Image.open(tmp_path / f"{k}/{n}.png")) for k in ("refined", "crf"))
        different, total = different + (ours != predicted).sum(), total + ours.size
    assert different / total <= 0.001


# ---- video ---------------------------------------------------------------------------------------------------------


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_command_without_tensorflow(workdir, tmp_path):
    save(tmp_path / "in/a.png", photograph(SIZE))
    code = (
        "import sys; from deeplab_jax import cli, predict; predict.define_flags();\n"
        "try: cli.run(predict.main)\n"
        "finally: assert 'tensorflow' not in sys.modules"
    )
    arguments = [f"--workdir={workdir}", f"--out={tmp_path}/out", "--preset=v2_vgg16", str(tmp_path / "in")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"[1/1] {tmp_path}/out/a.png")
    assert outputs(tmp_path / "out") == ["a.png", "a_overlay.png"]


def test_command_with_converted_weights_and_bad_files(segment, tmp_path):
    save(tmp_path / "in/a.png", photograph(SIZE))
    (tmp_path / "in/b.png").write_bytes(b"not a photograph")
    Image.new("1", (15_000, 14_000)).save(tmp_path / "in/c.png")
    flags = [*write_weights(tmp_path), f"--out={tmp_path}/out", "--probabilities", str(tmp_path / "in")]
    done = call("predict", *flags)
    assert done.returncode == 1
    bad, large, count = done.stderr.splitlines()
    assert bad == f"error: {tmp_path}/in/b.png: cannot be decoded as an image; replace or remove it"
    assert "in/c.png: has 210 megapixels, more than the limit of 200 megapixels" in large
    assert "--refuse_above" in large and count == "error: 2 of 3 files failed"
    assert outputs(tmp_path / "out") == ["a.png", "a_overlay.png", "a_probs.npy"]
    segment.plan([SIZE])  # as the command does; other tests have planned other sizes
    expected = segment(photograph(SIZE))
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out/a.png")), expected.labels)
    np.testing.assert_allclose(np.load(tmp_path / "out/a_probs.npy"), expected.marginals, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workdir=nowhere", "a.png"], "--out is missing"),
        (["--out=o", "a.png"], "give one of --model NAME"),
        (["--out=o", "--workdir=nowhere"], "no photograph given"),
        (["--out=o", "--workdir=nowhere", "a.png"], "nowhere: no such folder"),
        (["--out=o", "--workdir=tests", "a.png"], "tests: is neither a training workdir nor an exported artifact"),
        (["--out=o", "--model=camvid", "--config=folder", "a.png"], "--config=folder: --model has a config of its own"),
        (
            ["--out=o", "--model=camvid", "--config.eval.mirror=false", "a.png"],
            "--config.eval.mirror=false: --model has a config of its own; leave it out, or use this command's flags",
        ),
    ],
)
def test_command_refuses_in_a_sentence(arguments, words):
    done = call("predict", *arguments)
    assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1


# ---- long ----------------------------------------------------------------------------------------------------------

_PEAK = """
import resource
from deeplab_jax import cli, predict
predict.define_flags()
try:
    cli.run(predict.main)
finally:
    print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9)
"""


@pytest.mark.long
def test_50_megapixels_below_8_gigabytes(tmp_path):
    """As the command is run, with the classes of PASCAL VOC and all their probabilities."""
    image = np.asarray(Image.fromarray(photograph((612, 817))).resize((8170, 6120), Image.Resampling.BICUBIC))
    save(tmp_path / "big.jpg", image)
    flags = [*write_weights(tmp_path, 21), f"--out={tmp_path}/out", "--probabilities", str(tmp_path / "big.jpg")]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}  # as users have it
    done = subprocess.run([sys.executable, "-c", _PEAK, *flags], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    peak = float(done.stdout.split("PEAK")[1])
    assert peak < 8 and re.search(r"\(50 megapixels, in \d+ overlapping pieces\)", done.stdout)
    labels = files.read_label(tmp_path / "out/big.png")
    probs = np.load(tmp_path / "out/big_probs.npy", mmap_mode="r")
    assert labels.shape == (6120, 8170) and probs.shape == (6120, 8170, 21) and probs.dtype == np.float16
    for y in range(0, 6120, 100):
        chosen = np.take_along_axis(probs[y], labels[y][:, None], -1)[:, 0]
        np.testing.assert_array_equal(chosen, probs[y].max(-1))
        np.testing.assert_allclose(probs[y].astype(np.float32).sum(-1), 1, atol=0.01)
    assert files.size_of(tmp_path / "out/big_overlay.png") == (6120, 8170)
