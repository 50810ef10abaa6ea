"""The examples of docs/extending.md, which tests add in just the page's way."""

import re
import sys
import types
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


def code_of(section: str) -> str:
    """The Python of a section, by its heading."""
    return re.search(r"```python\n(.*?)```", PAGE.read_text().partition(f"## {section}\n")[2], re.DOTALL)[1]


def module_of(section: str, name: str, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """That Python as a module."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code_of(section), module.__dict__)
    return module
