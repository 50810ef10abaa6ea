"""Commands as a user runs them, from a training workdir to its artifact, its report and its page."""

import http.client
import importlib
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

import deeplab_jax
from deeplab_jax.errors import UserError
from tests.command_line import call
from tests.toy_workdir import NAMES, photograph

ROOT = Path(__file__).parents[1]


def run(command: str, *flags: object) -> subprocess.CompletedProcess:
    line = [sys.executable, "-m", f"deeplab_jax.{command}", *map(str, flags)]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_a_name_that_is_too_long_is_a_sentence(tmp_path):
    done = call("predict", "--model=camvid", f"--out={tmp_path}/{'q' * 300}", "a.png")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.endswith(": the name is too long; choose a shorter one\n")


@pytest.mark.parametrize("command", ["export", "report", "serve", "refine", "convert_labels"])
def test_a_field_of_a_config_is_refused_where_none_is_read(command, tmp_path):
    done = call(command, f"--out={tmp_path / 'o'}" if command not in ("serve", "report") else "--workdir=w",
                "--config.eval.mirror=false")  # fmt: skip
    assert done.returncode == 1
    assert done.stderr == "error: --config.eval.mirror=false: this command reads no config; leave it out\n"


def test_a_parameter_beside_a_preset_is_refused():
    """The preset's value would be used in its place."""
    done = call("describe", "--config=folder", "--config.crf.bilateral_xy_std=20")
    assert done.returncode == 1 and done.stderr == (
        "error: --config.crf.bilateral_xy_std=20: has no effect, as config.crf.preset=v2_resnet101 sets all five "
        "parameters; add --config.crf.preset= and give the others too\n"
    )
    done = call("describe", "--config=voc_aspp_l", "--config.crf.preset=", "--config.crf.bilateral_xy_std=20")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "command",
    ["main", "predict", "refine", "describe", "convert_weights", "convert_labels", "crf_search", "check_dataset",
     "export", "report", "serve"],
)  # fmt: skip
def test_help_has_every_flag(command):
    module, before = importlib.import_module(f"deeplab_jax.{command}"), set(flags.FLAGS)
    module.define_flags()
    own = set(flags.FLAGS) - before
    for name in own:
        delattr(flags.FLAGS, name)
    done = call(command, "--help")
    assert done.returncode == 0 and own
    assert own <= {line.split(":")[0].strip().removeprefix("--") for line in done.stdout.splitlines()}


@pytest.mark.parametrize(("sizes", "sentence"), [("", "--sizes is empty; give"), ("³³", "--sizes: '³³' is not a size")])
def test_export_refuses_sizes_that_are_none(sizes, sentence, tmp_path):
    done = call("export", "--model=camvid", f"--out={tmp_path}/e", f"--sizes={sizes}")
    assert done.returncode == 1 and done.stderr.startswith(f"error: {sentence}") and done.stderr.count("\n") == 1
    assert not (tmp_path / "e").exists()


def test_describe_refuses_a_negative_number_of_classes():
    done = call("describe", "--config=shapes", "--num_classes=-3")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "num_classes" in done.stderr


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("backbone", "x", "config.model: config.model.backbone='x' is not one of"),
        ("preprocessing", "../etc", "config.model: config.model.preprocessing='../etc' is not one of"),
        ("head", "aspp", "config.model: is not the network of these weights"),
    ],
)
def test_a_doctored_network_is_a_sentence(workdir, tmp_path, field, value, sentence):
    doctored = shutil.copytree(workdir, tmp_path / "w")
    config = json.loads((doctored / "config.json").read_text())
    config["model"][field] = value
    (doctored / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=re.escape(sentence)):
        deeplab_jax.load(doctored)(photograph((17, 17)))


def test_export_and_predict_from_the_artifact(workdir, tmp_path):
    artifact = tmp_path / "artifact"
    done = call("export", f"--workdir={workdir}", f"--out={artifact}", "--sizes=30x40", "--platforms=cpu")
    assert done.returncode == 0, done.stderr
    assert "33x65" in done.stdout  # as the workdir pads it
    Image.fromarray(photograph((30, 40), seed=3)).save(tmp_path / "fits.png")
    Image.fromarray(photograph((60, 80), seed=3)).save(tmp_path / "large.png")
    flags = (f"--artifact={artifact}", f"--out={tmp_path}/out", tmp_path / "fits.png", tmp_path / "large.png")
    done = call("predict", *flags)
    assert done.returncode == 0, done.stderr
    assert "as the artifact's sizes allow" in done.stdout.splitlines()[1]
    assert "sizes allow" not in done.stdout.splitlines()[0]
    labels = np.array(Image.open(tmp_path / "out" / "fits.png"))
    np.testing.assert_array_equal(labels, deeplab_jax.load(artifact)(tmp_path / "fits.png").labels)
    assert Image.open(tmp_path / "out" / "large.png").size == (80, 60)
    done = call("predict", *flags, "--preset=v1_largefov")
    assert done.returncode == 1
    assert done.stderr == "error: --preset: is fixed in an exported artifact; give its --workdir instead\n"


def test_convert_labels(tmp_path):
    shape = {"label": "cat", "points": [[2, 2], [9, 2], [9, 9], [2, 9]], "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": "a.jpg", "imageHeight": 12, "imageWidth": 20}
    (tmp_path / "a.json").write_text(json.dumps(content))
    done = call("convert_labels", tmp_path, f"--out={tmp_path}/out")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"labelme: 1 masks in {tmp_path}/out/masks, 2 classes in {tmp_path}/out/classes.txt")
    assert np.array(Image.open(tmp_path / "out" / "masks" / "a.png")).sum() == 49


def test_report(workdir):
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": 1, "train/loss": 1.0}) + "\n")
    done = call("report", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    page = (workdir / "report.html").read_text()
    assert done.stdout.strip() == str(workdir / "report.html")
    assert "resnet_small" in page


def test_serve_answers_on_this_computer_only(workdir):
    line = [sys.executable, "-m", "deeplab_jax.serve", f"--workdir={workdir}", "--port=0", "--nowarm_up"]
    server = subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        assert said.startswith("open http://127.0.0.1:"), said + server.stderr.read()
        port = int(said.split(":")[2].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/")
        answer = connection.getresponse()
        page = answer.read().decode()
        assert answer.status == 200
        assert all(name in page for name in NAMES)
        connection.request("GET", "/", headers={"Host": "example.org"})
        assert connection.getresponse().status == 403
        with pytest.raises(ConnectionRefusedError):  # another address of the same computer
            socket.create_connection(("127.0.0.2", port), timeout=10)
    finally:
        server.kill()
        server.communicate()
