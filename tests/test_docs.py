"""The documentation: its links, commands and fields exist, and its Python runs."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.config import fields, find_config
from deeplab_jax.configs.base import get_config
from deeplab_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(params=PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def page(request) -> Path:
    return request.param


def test_relative_links_resolve(page):
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    local = [link.partition("#")[0] for link in links if not re.match(r"\w+://|mailto:|#", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


def test_named_commands_exist(page):
    modules = re.findall(r"python -m ((?:deeplab_jax|experiments)\.\w+)", page.read_text())
    assert [m for m in modules if not (ROOT / f"{m.replace('.', '/')}.py").is_file()] == []


def test_named_fields_exist(page):
    config = get_config()
    known = {name for name, _ in fields(config)}
    groups = {name.rpartition(".")[0] for name in known}
    text = re.sub(r"--config\.(any\.field|field|a\.b)\b", "", page.read_text())  # placeholders
    named = re.findall(r"(?<![\w.])(?:--)?config\.([a-z_]+(?:\.[a-z_]+)*)(?![\w(])", text)
    files = {"py", "json"}
    assert sorted({n for n in named if n not in known | groups | files | {"any", "name"}}) == []


def test_named_configs_are_shipped(page):
    named = re.findall(r"--config[ =]([A-Za-z][\w./]*)", page.read_text())
    unknown = []
    for name in set(named) - {"FILE", "NAME", "PATH"}:
        try:
            find_config(name)
        except UserError:
            unknown.append(name)
    assert unknown == []


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    assert [p.name for p in PAGES[1:] if p.name != "README.md" and f"({p.name})" not in index] == []


def test_every_config_is_in_its_table():
    text = (ROOT / "docs" / "configs.md").read_text()
    shipped = {p.stem for p in (ROOT / "deeplab_jax" / "configs").glob("[a-z]*.py")} - {"base"}
    assert sorted(name for name in shipped if f"| `{name}`" not in text) == []


def test_pictures_are_small():
    assert [p.name for p in (ROOT / "docs" / "images").glob("*") if p.stat().st_size > 400_000] == []


@pytest.mark.parametrize("name", ["api.md", "crf.md"])
def test_python_blocks_run(name, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / name).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    namespace = {"image": image, "probabilities": rng.dirichlet(np.ones(4), (24, 32)).astype(np.float32)}
    namespace |= {"channel": image[..., 0] / 255, "annotation": image[..., 0] % 4, "num_classes": 4}
    if any("runs/shapes" in block for block in blocks):
        if importlib.util.find_spec("orbax") is None:
            pytest.skip("orbax is not installed")
        from tests.toy_workdir import write_toy_workdir

        write_toy_workdir(tmp_path / "runs" / "shapes")
        Image.fromarray(image).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    for block in blocks:
        exec(compile(block, name, "exec"), namespace)


def test_the_parameters_picture_has_a_row_for_each_parameter(monkeypatch):
    from deeplab_jax.crf import CRFParams, mean_field
    from experiments import crf_parameters

    label = np.zeros((17, 25), np.uint8)
    label[5:12, 8:17] = 1
    image = np.where(label[..., None] > 0, 220, 40).repeat(3, axis=-1).astype(np.uint8)
    probabilities = crf_parameters.rough_probabilities(label, 2)
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)
    used = []

    def one_iteration(unary, image, params, *args, **kwargs):
        used.append(params)
        return mean_field(unary, image, params, 0)

    monkeypatch.setattr("deeplab_jax.crf.mean_field", one_iteration)
    params = CRFParams(3.0, 20.0, 12.0, 3.0, 2.0)
    palette = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    settings = {"iterations": 1, "normalization": "after", "factor": 2.0}
    picture = crf_parameters.grid(image, label, probabilities, params, palette, **settings)
    assert picture.shape[1] == 3 * 50 + 4 * 6 and picture.shape[0] > 6 * 34
    assert used[0] == params and len(used) == 11
    for n, field in enumerate(crf_parameters.SYMBOLS):
        assert getattr(used[1 + 2 * n], field) == getattr(params, field) / 2
        assert getattr(used[2 + 2 * n], field) == getattr(params, field) * 2


def test_the_atrous_picture_shows_what_the_convolution_reads():
    from experiments.concept_pictures import reads

    cells = np.argwhere(reads((13, 17), 2)) - (6, 8)
    assert sorted(map(tuple, cells.tolist())) == [(y, x) for y in (-2, 0, 2) for x in (-2, 0, 2)]


def test_every_promise_names_a_test_that_is_there():
    """docs/promises.md: the last cell of each row of its first three tables is `file` or `file::test`, one or more."""
    rows = re.findall(r"^\|(.+)\|$", (ROOT / "docs" / "promises.md").read_text().partition("## Exit")[0], re.MULTILINE)
    rows = [row for row in rows if not re.search(r"\| test $|---", row)]
    assert len(rows) > 30
    for row in rows:
        named = re.findall(r"`([^`]+)`", row.rpartition("|")[2])
        assert named, row
        for name in named:
            file, _, test = name.partition("::")
            text = (ROOT / "tests" / file).read_text()
            assert f"def {test}(" in text if test else "def test_" in text, name
