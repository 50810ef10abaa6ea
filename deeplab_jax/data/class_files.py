"""Class lists: text files in the format of this package, and those that annotation tools export."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.files import read_file, reason
from deeplab_jax.imaging.palettes import VOID

# Words of headings. A heading has one of the first; alone on its line, "label" may be a class and is taken for one.
_HEADS = frozenset({"name", "names", "class", "classes", "label", "labels", "category"})
_COLUMNS = _HEADS | {"id", "ids", "index", "idx", "r", "g", "b", "red", "green", "blue", "rgb", "color", "hex", "value"}
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")
_COMMENT = re.compile(r"\s#")
_BRACKETED = re.compile(r"^(?P<name>[^()\[\]]+?)[\s:,=]*[(\[](?P<color>\s*\d+\s*,\s*\d+\s*,\s*\d+\s*)[)\]]$")
_CVAT = re.compile(r"^(?P<name>.*?):\s*(?P<color>\d+\s*,\s*\d+\s*,\s*\d+)\s*(:.*)?$")
_HEX = re.compile(r"^#?(?P<hex>[0-9a-fA-F]{6})$")
_LARGEST_ID = 65535  # a number above it is no id, and would be as many classes


class _Line(NamedTuple):
    """One class: its place in the file, its name, and R G B or None."""

    where: str
    name: str
    color: tuple[int, ...] | None


def read_classes(path: Path) -> tuple[tuple[str, ...], np.ndarray | None]:
    """The classes in the order of their ids, and uint8 `[K, 3]` colors if they have them (all or none).

    Text: one class per line, `name`, `name R G B`, `R G B name`, `name,R,G,B`, `name #RRGGBB`, `id name`, or CVAT's
    `name:R,G,B:parts:actions`; empty lines, comments after # and a heading are ignored. JSON: COCO's categories (an
    annotation file too), Supervisely's `meta.json` and tables of names and colors, CVAT's and Label Studio's label
    lists, lists of names, and tables of ids and names. If a tool's list starts at 1 or lacks the background, the
    background is inserted first, in black.

    Raises:
      UserError: no such file, an empty one, a line that is not understood (it is shown), colors on only some lines, two
        classes with one color or name, more than 255 classes.
    """
    try:
        data = read_file(path)
        text = data.decode("utf-16") if data[:2] in (b"\xff\xfe", b"\xfe\xff") else data.decode("utf-8-sig")
    except FileNotFoundError as e:
        raise UserError(f"{path}: no such file; check the name of the classes file") from e
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot be read as a list of classes ({reason(e)}); save it as UTF-8 text") from e
    if text.lstrip()[:1] in ("{", "["):
        lines = _from_json(path, text)
    elif text.lstrip()[:1] == "<":
        raise UserError(f"{path}: is XML; give a text file with one class per line, or run python -m "
                        "deeplab_jax.convert_labels on the annotations, which writes one")  # fmt: skip
    else:
        lines = _from_text(path, text)
    if not lines:
        raise UserError(f"{path}: is empty; it should name one class per line")
    return _checked(path, lines)


def write_classes(names: Sequence[str], colors: np.ndarray) -> str:
    """The text of a classes file that `read_classes` reads."""
    return "".join(f"{name} {r} {g} {b}\n" for name, (r, g, b) in zip(names, np.asarray(colors).tolist()))


def _checked(path: Path, lines: Sequence[_Line]) -> tuple[tuple[str, ...], np.ndarray | None]:
    names, colors = [line.name for line in lines], [line.color for line in lines if line.color is not None]
    for line in lines:
        if not line.name:
            raise UserError(f"{path}: {line.where} names no class")
        if line.color is not None and max(line.color) > 255:
            raise UserError(f"{path}: {line.where} has a color above 255")
    if colors and len(colors) != len(names):
        bare = next(line for line in lines if line.color is None)
        raise UserError(
            f"{path}: {len(colors)} of {len(names)} lines have a color R G B, but {bare.where} has none; give it on "
            "all lines or on none"
        )
    if len(set(names)) != len(names):
        raise UserError(f"{path}: the class '{max(names, key=names.count)}' occurs twice; names must differ")
    if len(set(colors)) != len(colors):
        raise UserError(f"{path}: two classes have the same color {max(colors, key=colors.count)}; colors must differ")
    if len(names) > VOID:
        raise UserError(f"{path}: has {len(names)} classes; at most 255 are supported")
    return tuple(names), np.array(colors, np.uint8) if colors else None


# Text.


def _from_text(path: Path, text: str) -> list[_Line]:
    numbered = [(n, _uncommented(line)) for n, line in enumerate(text.splitlines(), 1)]
    numbered = [(n, line) for n, line in numbered if line]
    if len(numbered) > 1 and _is_heading(numbered[0][1]):
        numbered = numbered[1:]
    lines = [_text_line(path, f"line {n} ('{line}')", line) for n, line in numbered]
    if len(lines) == 1 and lines[0].color is None and re.search(r"[,;]", numbered[0][1]):
        raise UserError(f"{path}: {lines[0].where} is not understood; write one class per line")
    return _without_ids(path, lines)


def _is_heading(line: str) -> bool:
    """Whether the first line names columns: `name`, `name,r,g,b`, `class_id,class_name`, `ClassName R G B`."""
    words = [w.casefold() for w in _WORD.findall(line)]
    named = re.sub(r"[\s,;:_]", "", line).isalpha() and {*words} <= _COLUMNS and not _HEADS.isdisjoint(words)
    return named and words not in (["label"], ["labels"])


def _uncommented(line: str) -> str:
    """The line without what follows a # that begins no color."""
    line = line.strip()
    if line.startswith("#"):
        return ""
    for sign in _COMMENT.finditer(line):
        word = line[sign.end() :].split(maxsplit=1)[:1]
        if not (word and _HEX.match(word[0])):
            return line[: sign.start()].rstrip()
    return line


def _text_line(path: Path, where: str, line: str) -> _Line:
    cvat = _CVAT.match(line)
    if cvat:
        return _Line(where, cvat["name"].strip(), tuple(int(w) for w in cvat["color"].split(",")))
    bracketed = _BRACKETED.match(line)
    if bracketed:
        return _Line(where, bracketed["name"].strip(), tuple(int(w) for w in bracketed["color"].split(",")))
    words = line.replace(",", " ").replace(";", " ").replace("\t", " ").split()
    if len(words) >= 2 and (hexadecimal := _HEX.match(words[-1])) and words[-1].startswith("#"):
        return _Line(where, " ".join(words[:-1]), _from_hex(hexadecimal["hex"]))
    trailing = len(words) - next((i for i in range(len(words), 0, -1) if not _is_number(words[i - 1])), 0)
    if trailing >= 3 and len(words) > 3 and all(w.isdecimal() for w in words[-3:]):
        return _Line(where, " ".join(words[:-3]), tuple(int(w) for w in words[-3:]))
    if len(words) > 3 and all(w.isdecimal() for w in words[:3]):
        return _Line(where, " ".join(words[3:]), tuple(int(w) for w in words[:3]))
    if (trailing >= 2 and len(words) > 1) or any(c in line for c in "{}[]<>=") or (":" in line and _odd_colon(line)):
        raise UserError(f"{path}: {where} is not understood; write a class as: name, or name R G B")
    return _Line(where, " ".join(words), None)


def _odd_colon(line: str) -> bool:
    """Whether a colon belongs to an unknown format; `0: name` is known."""
    return not re.match(r"^\d+\s*:\s*[^\d:]", line)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _without_ids(path: Path, lines: list[_Line]) -> list[_Line]:
    """Lines `0 name`, `1 name` (or `name 0`) without their numbers, which must be the line numbers."""
    for pattern in (r"^(?P<id>\d+)\s*:?\s+(?P<name>.+)$", r"^(?P<name>.+?)\s+(?P<id>\d+)$"):
        matches = [re.match(pattern, line.name) for line in lines]
        found = [m for m in matches if m]
        if len(lines) < 2 or len(found) < len(lines):
            continue
        ids, names = [int(m["id"]) for m in found], [m["name"] for m in found]
        if len(set(names)) < len(names) or len(set(ids)) < len(ids):
            continue  # lane 1, lane 2
        if ids != list(range(len(ids))):
            wrong = next(i for i, number in enumerate(ids) if number != i)
            raise UserError(
                f"{path}: {lines[wrong].where} has the id {ids[wrong]} where {wrong} is expected; write the classes in "
                "the order of their ids from 0, one per line"
            )
        return [line._replace(name=name) for line, name in zip(lines, names)]
    return lines


# JSON.


def _from_json(path: Path, text: str) -> list[_Line]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: is neither a list of classes, one per line, nor valid JSON ({e})") from e
    if isinstance(content, dict):
        for key in ("categories", "classes", "labels", "names"):
            if isinstance(content.get(key), list | dict):
                content = content[key]
                break
    try:
        lines = _entries(content)
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration):
        lines = []
    if not lines:
        raise UserError(f"{path}: is JSON, but neither categories nor a table of class names; give a text file, one "
                        "name per line")  # fmt: skip
    return lines


def _entries(content: object) -> list[_Line]:
    if isinstance(content, list) and content and all(isinstance(c, str) for c in content):
        return [_Line(f"entry {n}", str(name), None) for n, name in enumerate(content)]
    if isinstance(content, list):
        return _from_objects(content)
    if isinstance(content, dict) and all(isinstance(v, str) and k.isdecimal() for k, v in content.items()):
        return _by_id([(int(k), v, None) for k, v in content.items()])
    if isinstance(content, dict) and all(isinstance(v, int) for v in content.values()):
        return _by_id([(v, k, None) for k, v in content.items()])
    if isinstance(content, dict):
        found = [(None, k, _color(v)) for k, v in content.items()]
        return _with_background(found)
    return []


def _from_objects(content: list) -> list[_Line]:
    found = []
    for entry in content:
        name = next(entry[key] for key in ("name", "title", "value", "label") if key in entry)
        color = next((_color(entry[key]) for key in ("color", "background", "color_rgb") if entry.get(key)), None)
        found.append((entry.get("id"), str(name), color))
    if any(color is None for _, _, color in found):
        found = [(i, name, None) for i, name, _ in found]
    ids = [i for i, _, _ in found]
    coco = all(isinstance(i, int) and 0 <= i < VOID for i in ids) and len(set(ids)) == len(ids)
    coco = coco and not any("attributes" in entry for entry in content)  # CVAT's, whose ids count all its labels
    return _by_id(found) if coco else _with_background(found)


def _by_id(found: Iterable[tuple[int, str, tuple[int, ...] | None]]) -> list[_Line]:
    """In the order of the ids; the background is 0 if they start at 1, and missing ids between are named as unused."""
    table = {i: (name, color) for i, name, color in found}
    if max(table) > _LARGEST_ID:
        raise ValueError(max(table))
    colored = any(color is not None for _, color in table.values())
    if 0 not in table:
        table[0] = ("background", (0, 0, 0) if colored else None)
    lines = []
    for i in range(max(table) + 1):
        name, color = table.get(i, (f"unused {i}", None))
        if color is None and colored:
            colored = False
        lines.append(_Line(f"id {i}", name, color))
    return lines if colored else [line._replace(color=None) for line in lines]


def _with_background(found: Sequence[tuple[object, str, tuple[int, ...] | None]]) -> list[_Line]:
    lines = [_Line(f"entry {n}", name, color) for n, (_, name, color) in enumerate(found)]
    known = {line.name.casefold() for line in lines}
    if not known & {"background", "__bg__", "neutral", "unlabeled"} and (0, 0, 0) not in [x.color for x in lines]:
        lines.insert(0, _Line("the background", "background", (0, 0, 0) if lines[0].color is not None else None))
    return lines


def _color(value: object) -> tuple[int, ...]:
    if isinstance(value, str):
        match = _HEX.match(value.strip())
        if not match:
            raise ValueError(value)
        return _from_hex(match["hex"])
    color = tuple(int(v) for v in value)  # type: ignore[attr-defined]
    if len(color) != 3:
        raise ValueError(value)
    return color


def _from_hex(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text))
