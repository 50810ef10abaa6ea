"""Finding, loading and overriding configs: `--config NAME_OR_FILE --config.any.field=value`."""

import ast
import contextlib
import difflib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from deeplab_jax import old_fields
from deeplab_jax.errors import UserError

# Fields that hold one number, or one for each class of the data.
PER_CLASS = ("crf.bilateral_weight", "crf.gaussian_weight")
SHIPPED = Path(__file__).parent / "configs"


def find_config(name: str) -> Path:
    """Returns the file that `--config NAME` means: a path, or the name of a shipped config with or without `.py`.

    Raises:
      UserError: there is neither such a file nor such a shipped config.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = SHIPPED / f"{path.stem}.py"
    if shipped.is_file() and path.parent in (Path("."), Path("configs")) and path.suffix in ("", ".py"):
        return shipped
    names = sorted(p.stem for p in SHIPPED.glob("*.py") if p.stem not in ("__init__", "base"))
    raise UserError(
        f"--config={name}: no such file or shipped config; shipped: {', '.join(names)}{nearest(path.stem, names)}"
    )


def load_config(name: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Runs a config file's `get_config()` and applies overrides.

    Args:
      name: a path, or the name of a shipped config.
      overrides: strings `field.subfield=value`; the value takes the field's type.

    Returns:
      The locked config, with `config.name` set to the file's stem.

    Raises:
      UserError: no such file, no `get_config`, an unknown field (the closest name is suggested) or a value of another
        type.
    """
    path = find_config(name)
    spec = importlib.util.spec_from_file_location(f"deeplab_jax_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path}: is not a Python file; give a config whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except SyntaxError as e:
        raise UserError(f"{path}: line {e.lineno} is not Python ({e.msg})") from e
    except UserError:
        raise
    except Exception as e:  # the file is a user's program
        problem = str(e).splitlines()[0] if str(e) else type(e).__name__
        frames = traceback.extract_tb(e.__traceback__)
        lines = [f.lineno for f in frames if Path(f.filename).resolve() == path.resolve()]
        raise UserError(f"{path}: line {lines[-1] if lines else 1}: {problem}{old_fields.hint(problem)}") from e
    if not isinstance(config, ConfigDict):
        raise UserError(f"{path}: get_config() returns {type(config).__name__}; it must return the config")
    config = config.copy_and_resolve_references()
    if old_fields.has_old(config):
        try:
            config = ConfigDict(old_fields.renamed(config.to_dict()))
        except ValueError as e:
            raise UserError(f"{path}: {e}") from e
    if path.resolve() != (SHIPPED / "base.py").resolve():
        _check_names(path, config)
    with config.unlocked():
        config.name = path.stem
    config.lock()
    for override in overrides:
        set_field(config, override)
    return config


def _check_names(path: Path, config: ConfigDict) -> None:
    """Raises `UserError` if a config has a field that no config has, or lacks one: `get_config` may begin anywhere."""
    known, given = dict(fields(load_config("base"))), dict(fields(config))
    for name in given:
        if name not in known and name != "name":
            raise UserError(f"{path}: the config has no field '{name}'{nearest(name, [*known])}")
    for name in known:
        if name not in given and name != "name":
            raise UserError(f"{path}: the config lacks the field '{name}'; begin with base.get_config()")


def recorded_config(values: Mapping[str, Any]) -> ConfigDict:
    """The contents of a run's `config.json` as a config with the current fields.

    Fields under old names get their new ones, and fields that the run lacks have their defaults.

    Args:
      values: as `json` reads them; lists become tuples again.
    """

    def merged(defaults: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
        groups = {k: merged(v, own.get(k, {})) for k, v in defaults.items() if isinstance(v, Mapping)}
        return {**defaults, **{k: _tuples(v) for k, v in own.items()}, **groups}

    return ConfigDict(merged(load_config("base").to_dict(), old_fields.renamed(values)))


def _tuples(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def set_field(config: ConfigDict, override: str) -> None:
    """Applies one `field.subfield=value` in place; raises `UserError` for an unknown field or a wrong type."""
    dotted, sep, text = override.partition("=")
    if not sep:
        raise UserError(f"--config.{override}: needs a value, as in --config.{override}=VALUE")
    dotted = old_fields.new_name(dotted)
    *parents, last = dotted.split(".")
    node = config
    for i, part in enumerate([*parents, last]):
        if not isinstance(node, ConfigDict) or part not in node:
            known = [name for name, _ in fields(config)]
            here = ".".join([*parents, last][: i + 1])
            raise UserError(f"--config.{dotted}: the config has no field '{here}'{nearest(dotted, known)}")
        if i < len(parents):
            node = node[part]
    old = node[last]
    if isinstance(old, ConfigDict):
        raise UserError(f"--config.{dotted}: is a group of fields; name one of {', '.join(sorted(old))}")
    where = f"--config.{dotted}"
    with node.ignore_type():
        node[last] = _per_class(text, where) if dotted in PER_CLASS else _parse(text, old, where)


def fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields every leaf of a config as (dotted name, value)."""
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            yield from fields(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def files_named(config: ConfigDict) -> list[Path]:
    """The existing files that a config names in its fields."""
    found = []
    for _, value in fields(config):
        if isinstance(value, str) and value and "\0" not in value and len(os.fsencode(value)) < 1024:
            path = Path(value)
            with contextlib.suppress(OSError):
                found += [path] if path.is_file() else []
    return found


def _per_class(text: str, where: str) -> float | tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in text.strip("()[] ").removesuffix(",").split(","))
    except ValueError as e:
        raise UserError(f"{where}={text}: needs a number, or one for each class, such as 4.0 or 1.0,1.0,4.0") from e
    return numbers if "," in text else numbers[0]


def _parse(text: str, old: object, where: str) -> object:
    if isinstance(old, str):
        return text
    if isinstance(old, bool):
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
        raise UserError(f"{where}={text}: needs true or false")
    if isinstance(old, tuple) and not text.strip():
        return ()
    kind = type(old).__name__
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = tuple(text.removesuffix(",").split(",")) if isinstance(old, tuple) else None
    if isinstance(old, tuple):
        return tuple(value) if isinstance(value, list | tuple) else (value,)
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        if isinstance(old, float):
            return float(value)
        if isinstance(old, int) and value == int(value):
            return int(value)
    raise UserError(f"{where}={text}: needs a value of type {kind}, such as {old!r}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown name: the closest known one, or nothing.

    >>> nearest("camvit", ["camvid", "shapes"])
    "; did you mean 'camvid'?"
    """
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""
