"""The package as people install it: a fresh virtual environment, outside the source folder."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1]


def run(python: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")} | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run([str(python), *arguments], capture_output=True, text=True, cwd=cwd, env=clean)


def install(python: Path, what: str, cwd: Path) -> None:
    done = run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", what, cwd=cwd)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """A new environment's interpreter, with the base install."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder / "v", with_pip=True)
    python = folder / "v/bin/python"
    install(python, str(SOURCE), folder)
    return python


_FIVE_LINES = """
import numpy as np
from deeplab_jax.crf import PRESETS, mean_field
image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
q = mean_field(np.zeros((20, 30, 2), np.float32), image, PRESETS["v2_resnet101"].params)
print(q.shape)
"""


@pytest.mark.long
def test_base_install_has_the_crf_and_says_what_commands_lack(python, tmp_path):
    listed = run(python, "-m", "pip", "list", "--format=freeze", cwd=tmp_path).stdout.lower()
    assert "jax==" in listed and "flax==" in listed
    for package in ("absl-py==", "ml_collections==", "ml-collections==", "pillow==", "tensorflow", "scipy-image"):
        assert package not in listed or package == "absl-py=="  # flax may bring absl
    done = run(python, "-c", _FIVE_LINES, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "(20, 30, 2)\n"), done.stderr
    done = run(
        python, "-c", "import deeplab_jax as d, os; print(os.listdir(os.path.dirname(d.__file__)))", cwd=tmp_path
    )
    assert "'py.typed'" in done.stdout, done.stderr
    for command in ("predict", "refine", "crf_search", "main", "export", "report", "serve"):
        done = run(python, "-m", f"deeplab_jax.{command}", "--help", cwd=tmp_path)
        if done.returncode:  # the extra is named, in one sentence
            assert "pip install 'deeplab-jax[" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.long
def test_extras_bring_the_commands_and_configs(python, tmp_path):
    install(python, f"{SOURCE}[predict]", tmp_path)
    done = run(python, "-m", "deeplab_jax.predict", "--help", cwd=tmp_path)
    assert done.returncode == 0 and "--crf_iterations" in done.stdout
    done = run(
        python, "-c", "from deeplab_jax.config import load_config; print(load_config('voc_aspp_l').name)", cwd=tmp_path
    )
    assert done.stdout == "voc_aspp_l\n", done.stderr
    done = run(
        python, "-m", "deeplab_jax.main", "--config", "voc_aspp_l", "--workdir", str(tmp_path / "w"), cwd=tmp_path
    )
    assert done.returncode == 1 and "deeplab-jax[train]" in done.stderr, done.stderr
    install(python, f"{SOURCE}[train]", tmp_path)
    done = run(python, "-m", "deeplab_jax.main", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


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
