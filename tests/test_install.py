"""The package as people install it: fresh virtual environments, outside the source folder."""

import base64
import http.client
import io
import json
import os
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from tests.toy_workdir import NAMES, photograph

SOURCE = Path(__file__).parents[1]
SIZE = (60, 90)
COMMANDS = ("main", "predict", "refine", "describe", "convert_weights", "crf_search", "check_dataset", "export",
            "report", "serve")  # fmt: skip


def outside() -> dict[str, str]:
    """An environment in which the source folder is not found."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"JAX_PLATFORMS": "cpu"}


def run(python: Path, *arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run([str(python), *map(str, arguments)], capture_output=True, text=True, cwd=cwd, env=outside())


def command(python: Path, name: str, *arguments: object, cwd: Path) -> str:
    """The output of a successful command."""
    done = run(python, "-m", f"deeplab_jax.{name}", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(python: Path, name: str, *arguments: object, cwd: Path) -> str:
    """The sentence of a command that fails."""
    done = run(python, "-m", f"deeplab_jax.{name}", *arguments, cwd=cwd)
    assert done.returncode == 1, done.stdout
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


@contextmanager
def environment(folder: Path, *requirements: str) -> Iterator[Path]:
    """The interpreter of a new environment that holds the requirements; removed at the end, for it is large."""
    venv.create(folder / "v", with_pip=True)
    python = folder / "v/bin/python"
    try:
        done = run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements, cwd=folder)
        assert done.returncode == 0, done.stderr
        yield python
    finally:
        shutil.rmtree(folder / "v")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources for pip, which leaves its own files there."""
    copy = tmp_path_factory.mktemp("source") / "deeplab_jax"
    shutil.copytree(SOURCE / "deeplab_jax", copy / "deeplab_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(SOURCE / name, copy)
    return copy


_FIVE_LINES = """
import numpy as np
from deeplab_jax.crf import PRESETS, mean_field
image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
q = mean_field(np.zeros((20, 30, 2), np.float32), image, PRESETS["v2_resnet101"].params)
print(q.shape)
"""
_DECLARED = """
import importlib.metadata as m, re
about = m.metadata("deeplab-jax")
base = [re.match(r"[\\w-]+", r)[0] for r in about.get_all("Requires-Dist") if "extra ==" not in r]
print(sorted(base), sorted(about.get_all("Provides-Extra")))
"""


@pytest.mark.long
def test_base_install_has_the_crf_and_says_what_commands_lack(source, tmp_path):
    with environment(tmp_path, str(source)) as python:
        declared = run(python, "-c", _DECLARED, cwd=tmp_path).stdout
        assert declared == "['flax', 'jax', 'numpy'] ['aot', 'export', 'predict', 'serve', 'test', 'train']\n"
        listed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout.lower().replace("_", "-")
        packages = {line.partition("==")[0] for line in listed.split()}
        assert {"deeplab-jax", "jax", "flax", "numpy"} <= packages
        assert not packages & {"ml-collections", "pillow", "tensorflow", "matplotlib", "flask", "h5py"}
        done = run(python, "-c", _FIVE_LINES, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "(20, 30, 2)\n"), done.stderr
        where = "import deeplab_jax, pathlib; print(*sorted(pathlib.Path(deeplab_jax.__file__).parent.glob('py*')))"
        done = run(python, "-c", where, cwd=tmp_path)
        assert done.stdout.startswith(f"{tmp_path}/v/") and done.stdout.endswith("/deeplab_jax/py.typed\n"), done.stderr
        for name in COMMANDS:
            done = run(python, "-m", f"deeplab_jax.{name}", "--help", cwd=tmp_path)
            if done.returncode:  # the extra is named, in one sentence
                assert "pip install 'deeplab-jax[" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        for name, flags in {
            "predict": ("--workdir=w", "--out=out", "a.png"),
            "export": ("--workdir=w", "--out=out"),
            "describe": ("--config=voc_aspp_l",),
        }.items():
            assert "pip install 'deeplab-jax[predict]'" in refusal(python, name, *flags, cwd=tmp_path)


@pytest.mark.long
def test_predict_brings_the_commands_and_configs(source, workdir, tmp_path):
    Image.fromarray(photograph(SIZE)).save(tmp_path / "a.png")
    with environment(tmp_path, f"{source}[predict]") as python:
        for name in COMMANDS:
            assert "flags:" in command(python, name, "--help", cwd=tmp_path)
        about = json.loads(command(python, "describe", "--config", "voc_aspp_l", "--json", cwd=tmp_path))
        assert (about["output_stride"], about["score_shape"][-1]) == (8, 21)
        command(python, "predict", f"--workdir={workdir}", "--out=out", "--probabilities", "a.png", cwd=tmp_path)
        command(python, "predict", f"--workdir={workdir}", "--out=net", "--crf_iterations=0", "a.png", cwd=tmp_path)
        labels, network = (np.array(Image.open(tmp_path / f"{folder}/a.png")) for folder in ("out", "net"))
        expected = deeplab_jax.load(workdir)
        assert (labels == expected(tmp_path / "a.png").labels).mean() > 0.999
        assert (network == expected(tmp_path / "a.png", 0).labels).mean() > 0.999
        flags = ("--image=a.png", "--probs=out/a_probs.npy", "--out=refined.png", "--preset=v1_largefov")
        command(python, "refine", *flags, cwd=tmp_path)
        assert Image.open(tmp_path / "refined.png").size == SIZE[::-1]
        train = "pip install 'deeplab-jax[train]'"
        assert train in refusal(python, "main", "--config", "voc_aspp_l", "--workdir=w", cwd=tmp_path)
        assert train in refusal(python, "report", f"--workdir={workdir}", cwd=tmp_path)
        assert "pip install 'deeplab-jax[serve]'" in refusal(python, "serve", f"--workdir={workdir}", cwd=tmp_path)


@pytest.mark.long
def test_train_trains_and_reports(source, tmp_path):
    small = ("model.widths=8,8,8,8", "model.blocks=1,1,1,1", "model.head_width=8", "crf.stride=8", "data.crop=33,33",
             "batch_size=4", "num_steps=4", "data.holdout=4", "search.images=1",
             "eval.limit=2", "eval.crf_iterations=0,2",
             f"data.cache_dir={tmp_path}/cache")  # fmt: skip
    with environment(tmp_path, f"{source}[train]") as python:
        flags = ("--config", "shapes", "--workdir=w", *(f"--config.{field}" for field in small))
        printed = command(python, "main", *flags, cwd=tmp_path)
        assert printed.startswith("workdir: w\n") and "mean IoU" in printed
        results = json.loads((tmp_path / "w/eval/val.json").read_text())
        assert [(r["crf_iterations"], r["images"]) for r in results] == [(0, 2), (2, 2)]
        assert command(python, "report", "--workdir=w", cwd=tmp_path) == "w/report.html\n"
        assert "mean IoU" in (tmp_path / "w/report.html").read_text()
        sentence = refusal(python, "main", "--config", "voc_aspp_l", "--workdir=voc", cwd=tmp_path)
        assert "config.data.dir" in sentence or "config.model.batch_norm" in sentence  # found; the data or weights lack


@pytest.mark.long
def test_serve_answers_a_request(source, workdir, tmp_path):
    pytest.importorskip("flask", reason="Flask is not installed")
    from deeplab_jax.pages import local

    image = photograph(SIZE)
    photo = io.BytesIO()
    Image.fromarray(image).save(photo, "PNG")
    with environment(tmp_path, f"{source}[serve]") as python:
        line = [str(python), "-m", "deeplab_jax.serve", f"--workdir={workdir}", "--port=0", "--nowarm_up"]
        server = subprocess.Popen(
            line, cwd=tmp_path, env=outside(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            said = server.stdout.readline()
            assert said.startswith("open http://127.0.0.1:"), said + server.stderr.read()
            connection = http.client.HTTPConnection("127.0.0.1", int(said.split(":")[2].split("/")[0]), timeout=120)

            def ask(method: str, path: str, body: bytes | None = None, kind: str = "application/octet-stream") -> bytes:
                connection.request(method, path, body, {"Content-Type": kind})
                answer = connection.getresponse()
                content = answer.read()
                assert answer.status == 200, content
                return content

            page = ask("GET", "/").decode()
            assert all(name in page for name in NAMES)
            found = json.loads(ask("POST", "/photograph", photo.getvalue()))
            segment = deeplab_jax.load(workdir)
            local.create_app(segment)  # pads photographs to the page's shapes, which a random network notices
            wanted = {"id": found["id"], "iterations": 4}
            wanted |= {name: float(getattr(segment.crf.params, name)) for name in
                       ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight",
                        "gaussian_xy_std")}  # fmt: skip
            answer = json.loads(ask("POST", "/segment", json.dumps(wanted).encode(), "application/json"))
            labels = np.array(Image.open(io.BytesIO(base64.b64decode(answer["labels"].split(",")[1]))))
            assert (labels == segment(image, 4).labels).mean() > 0.99
        finally:
            server.kill()
            server.communicate()


@pytest.mark.long
def test_export_writes_what_runs_with_jax_alone(source, workdir, tmp_path):
    image = photograph(SIZE)
    Image.fromarray(image).save(tmp_path / "a.png")
    np.save(tmp_path / "photograph.npy", image)
    (lines,) = re.findall(r"```python\n(import json, jax.*?)```", (SOURCE / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) == 10
    with environment(tmp_path, f"{source}[export]") as python:
        command(python, "export", f"--workdir={workdir}", "--out=voc", "--sizes=60x90", cwd=tmp_path)
        command(python, "predict", "--artifact=voc", "--out=out", "--crf_iterations=10", "a.png", cwd=tmp_path)
    versions = json.loads((tmp_path / "voc/manifest.json").read_text())["versions"]
    with environment(tmp_path, f"jax=={versions['jax']}", "flatbuffers") as python:
        listed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout
        assert "deeplab" not in listed and "flax" not in listed
        done = run(python, "-c", lines + "np.save('marginals.npy', np.asarray(marginals))\n", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    marginals = np.load(tmp_path / "marginals.npy")
    assert marginals.shape == (*SIZE, len(NAMES))
    np.testing.assert_array_equal(marginals.argmax(-1), np.array(Image.open(tmp_path / "out/a.png")))


def test_a_missing_package_names_its_extra():
    code = (
        "import sys\n"
        "sys.modules['PIL'] = None\n"
        "from absl import flags\n"
        "from deeplab_jax import cli\n"
        "def main(argv):\n    import PIL\n"
        "cli.run(main)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=SOURCE)
    assert done.returncode == 1 and "pip install 'deeplab-jax[predict]'" in done.stderr, done.stderr
