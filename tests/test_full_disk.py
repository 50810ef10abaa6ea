"""A disk without a byte left: one sentence with the path, nothing temporary left behind, existing files unchanged."""

import numpy as np
import pytest
from PIL import Image

from tests.command_line import call
from tests.small_disk import filled, mounted
from tests.toy_workdir import photograph

SIZE = (33, 41)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    with mounted(tmp_path_factory.mktemp("small") / "disk", size="4m") as folder:
        yield folder


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A photograph and labels for it, on another disk."""
    folder = tmp_path_factory.mktemp("inputs")
    Image.fromarray(photograph(SIZE)).save(folder / "a.png")
    Image.fromarray((np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) // 500).astype(np.uint8)).save(folder / "labels.png")
    return folder


def arguments_of(command, workdir, inputs, disk):
    photo = inputs / "a.png"
    model = ["--workdir", workdir]
    return {
        "predict": [*model, "--crf_iterations=1", "--probabilities", "--out", disk / "out", photo],
        "refine": ["--image", photo, "--labels", inputs / "labels.png", "--iterations=1", "--out", disk / "r.png"],
        "export": [*model, "--sizes=33", "--platforms=cpu", "--out", disk / "artifact"],
        "report": [*model, "--out", disk / "page.html"],
    }[command]


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", ["predict", "refine", "export", "report"])
def test_a_full_disk_is_one_sentence(workdir, inputs, disk, command, capfd):
    arguments = arguments_of(command, workdir, inputs, disk)
    (disk / "out").mkdir(exist_ok=True)
    before = contents(disk)
    with filled(disk):
        done = call(command, *arguments)
    printed = done.stderr + capfd.readouterr().err
    print(printed)
    assert done.returncode == 1
    (sentence,) = [line for line in printed.splitlines() if "no space left" in line.lower()]
    assert sentence.startswith("error: ") and str(disk) in sentence
    assert "Traceback" not in printed
    assert contents(disk) == before
    assert call(command, *arguments).returncode == 0
