"""Imports run one way, and TensorFlow has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deeplab_jax"
FILES = [p for p in PACKAGE.rglob("*.py") if "configs" not in p.relative_to(PACKAGE).parts]

# Who may import whom, of ours; a part not named as a key may import anything but the commands.
ALLOWED = {
    "models": {"models", "crf"},
    "crf": {"crf"},
    "imaging": {"imaging", "errors"},
    "data": {"data", "imaging", "errors", "config"},
    "weights": {"weights", "models", "imaging", "errors", "training"},
    "evaluation": {
        "evaluation",
        "models",
        "crf",
        "data",
        "imaging",
        "errors",
        "config",
        "segment",
        "version",
        "weights",
    },
}
OUTSIDE = {"models": {"jax", "flax", "numpy"}, "crf": {"jax", "flax", "numpy"}}


def imports(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "deeplab_jax" and rest and part(path) in ALLOWED:
            assert rest[0] in ALLOWED[part(path)] | {"version"}, f"{path} imports {name}"
        elif part(path) in OUTSIDE and top != "deeplab_jax":
            assert top in OUTSIDE[part(path)] or top in sys.stdlib_module_names, f"{path} imports {name}"
        if top in ("tensorflow", "clu"):
            where = str(path.relative_to(PACKAGE))
            doors = ("training/reporting.py", "training/loop.py")  # loop: clu.parameter_overview, without TensorFlow
            assert where in doors or "SavedModel" in path.read_text(), f"{path} imports {name}"


def test_networks_and_crf_need_jax_flax_and_numpy_alone():
    code = """
import sys
class Door:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"absl", "ml_collections", "PIL", "scipy", "optax", "tensorflow", "clu", "grain"}:
            if sys._getframe(1).f_globals.get("__name__", "").startswith("deeplab_jax"):
                raise ImportError(name)
sys.meta_path.insert(0, Door())
import deeplab_jax.models, deeplab_jax.crf
assert not {"tensorflow", "PIL", "ml_collections", "grain", "clu"} & set(sys.modules), sys.modules.keys()
print("pure")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, timeout=120)
    assert done.stdout.strip() == "pure", done.stderr


def test_no_file_is_longer_than_400_lines():
    long = {str(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert not long
