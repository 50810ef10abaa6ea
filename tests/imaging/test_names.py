"""Names that file systems accept, of any length and in any script."""

import os

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import cli
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically, write_text
from deeplab_jax.imaging import files, listing

LONG = ("写" * 83 + "ab.jpg", "x" * 251 + ".jpg", "é" * 125 + "y.jpg", "50% #1: a.jpg", "-x.jpg", "~a.jpg")


def test_results_of_the_longest_names_are_written_and_differ(tmp_path):
    (tmp_path / "in").mkdir()
    names = [*LONG, "写" * 83 + "ac.jpg"]
    for name in names:
        assert len(os.fsencode(name)) <= 255
        Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(tmp_path / "in" / name)
    inputs = listing.find_inputs([tmp_path / "in"])
    stems = listing.result_stems(inputs)
    assert len(inputs) == len(names) == len(set(stems))
    for stem in stems:
        for ending in (".png", "_overlay.png", "_probs.npy", "_iterations.png"):
            files.write_png(tmp_path / "out" / f"{stem}{ending}", np.zeros((2, 2), np.uint8))
    assert len(os.listdir(tmp_path / "out")) == 4 * len(names)


def test_a_name_that_is_too_long_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / ("写" * 90), "x")
    seen = []
    write_atomically(tmp_path / ("写" * 80 + ".txt"), lambda path: seen.append(path.name) or path.write_text("x"))
    assert len(os.fsencode(seen[0])) <= 255 and len(os.listdir(tmp_path)) == 1


def test_the_home_folder_in_every_argument(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["~/a.jpg", "--out=~/b", "--config.data.images=~/c", "--x=a~b", "~a", "-"]
    assert [cli._with_home(a) for a in given] == [
        "/home/me/a.jpg", "--out=/home/me/b", "--config.data.images=/home/me/c", "--x=a~b", "~a", "-",
    ]  # fmt: skip


def test_files_whose_names_begin_with_a_dash(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-x.jpg", "--y=1.jpg", "-out", "-写.jpg"):
        (tmp_path / name).touch()
    given = ["-x.jpg", "--y=1.jpg", "-写.jpg", "-out", "--out=o", "-gone.jpg", "-", "--", "--noverbose", "a.jpg"]
    assert cli._with_files(given, ["out", "verbose"]) == ["./-x.jpg", "./--y=1.jpg", "./-写.jpg", *given[3:]]


def test_predict_takes_a_file_whose_name_begins_with_a_dash(tmp_path, monkeypatch):
    from deeplab_jax import predict
    from tests.command_line import call

    monkeypatch.chdir(tmp_path)
    (tmp_path / "-x.jpg").touch()
    seen = []
    monkeypatch.setattr(predict, "main", lambda argv: seen.append(list(argv)) or 0)
    assert call("predict", "--out=o", "-x.jpg", "b.jpg").returncode == 0
    assert seen == [["./-x.jpg", "b.jpg"]]
    assert "Unknown command line flag" in call("predict", "--out=o", "-z.jpg").stderr


def test_no_result_has_the_name_of_a_folder_of_results(tmp_path):
    names = ("dir.bmp", "dir.png/in.png", "b.jpg", "b_overlay.png/b.png", "v.mov", "v.mp4/a.png")
    folder = tmp_path / "in"
    for name in (*names, "x/abc", "y/abc"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    inputs = listing.find_inputs([folder])
    stems = {i.path.relative_to(folder).as_posix(): s for i, s in zip(inputs, listing.result_stems(inputs))}
    assert stems == {
        "dir.bmp": "dir.bmp", "dir.png/in.png": "dir.png/in", "b.jpg": "b.jpg",
        "b_overlay.png/b.png": "b_overlay.png/b", "v.mov": "v.mov", "v.mp4/a.png": "v.mp4/a",
    }  # fmt: skip
    given = listing.find_inputs([folder / "x/abc", folder / "y/abc"])
    assert listing.result_stems(given) == ["x/abc", "y/abc"]


def test_names_that_no_folder_tells_apart_are_a_sentence(tmp_path):
    for name in ("a.jpg", "a.jpg_overlay"):
        (tmp_path / name).touch()
    inputs = listing.find_inputs([tmp_path / "a.jpg", tmp_path / "a.jpg_overlay"])
    with pytest.raises(UserError, match=r"a\.jpg: its results would have the names of another file's; rename it"):
        listing.result_stems(inputs)
