"""Imports run one way, and TensorFlow has one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "deeplab_jax"
FILES = [p for p in PACKAGE.rglob("*.py") if "configs" not in p.relative_to(PACKAGE).parts]

# The rooms, from the ground up: each uses only those before it, also inside functions. Modules of the package's top
# that commands share are in one list with the rooms; the commands come last and nothing uses them.
ROOMS = (
    "interrupts", "version", "errors", "limits", "target", "console", "files", "startup", "old_fields", "config",
    "imaging", "metrics", "crf", "models", "data", "runs", "weights", "refinement", "inference", "search", "evaluation",
    "training", "pages", "cli", "crf_flags", "model_flags", "size_flags",
    "process_flags",
)  # fmt: skip
COMMANDS = (
    "main", "predict", "refine", "describe", "convert_weights", "convert_labels", "crf_search", "check_dataset",
    "export", "report", "serve",
)  # fmt: skip
# clu's writer and progress, a SavedModel, and clu.parameter_overview, which does without TensorFlow.
TENSORFLOW = ("runs/reporting.py", "inference/saved_model.py", "training/setup.py")
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
def test_rooms_use_only_rooms_below_them(path):
    room = part(path)
    assert room in ROOMS or room in COMMANDS or room == "__init__", f"{path} stands in no room"
    for name in imports(path):
        top, *rest = name.split(".")
        if top == "deeplab_jax" and rest and room != "__init__" and rest[0] not in ("version", room):
            allowed = ROOMS[: ROOMS.index(room)] if room in ROOMS else ROOMS
            assert rest[0] in allowed, f"{path} imports {name}"
        elif room in OUTSIDE and top != "deeplab_jax":
            assert top in OUTSIDE[room] or top in sys.stdlib_module_names, f"{path} imports {name}"
        if top in ("tensorflow", "clu"):
            assert str(path.relative_to(PACKAGE)) in TENSORFLOW, f"{path} imports {name}"


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
