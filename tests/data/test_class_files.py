"""Class lists of the tools that people use."""

import json

import numpy as np
import pytest

from deeplab_jax.data.class_files import read_classes, write_classes
from deeplab_jax.errors import UserError

NAMES, COLORS = ("background", "red car", "sky"), [[0, 0, 0], [255, 0, 0], [0, 0, 255]]


@pytest.mark.parametrize(
    "text",
    [
        "background 0 0 0\nred car 255 0 0\nsky 0 0 255\n",
        "# label:color_rgb:parts:actions\nbackground:0,0,0::\nred car:255,0,0::\nsky:0,0,255:a,b:c\n",
        "name,r,g,b\nbackground,0,0,0\nred car,255,0,0\nsky,0,0,255\n",
        "background (0, 0, 0)\nred car: [255, 0, 0]\nsky = (0,0,255)\n",
        "ClassName\tR\tG\tB\nbackground\t0\t0\t0\nred car\t255\t0\t0\nsky\t0\t0\t255\n",
        "background #000000 # none\nred car\t#ff0000\t#1 of # all\nsky #0000FF\n",
        "0 0 0\tbackground\n255 0 0\tred car\n0 0 255\tsky\n",
        "background #000000\nred car #ff0000  # by hand\nsky #0000FF\n",
        "\ufeffbackground 0 0 0\r\n\r\nred car 255 0 0\r\nsky 0 0 255",
        json.dumps({"background": [0, 0, 0], "red car": [255, 0, 0], "sky": [0, 0, 255]}),
        json.dumps([{"name": "red car", "color": "#ff0000", "attributes": []}, {"name": "sky", "color": "#0000ff"}]),
        json.dumps({"classes": [{"title": "red car", "color": "#FF0000"}, {"title": "sky", "color": "#0000FF"}]}),
        json.dumps({"categories": [{"id": 2, "name": "sky", "color": [0, 0, 255]},
                                   {"id": 1, "name": "red car", "color": [255, 0, 0]}], "images": []}),
    ],
)  # fmt: skip
def test_lists_with_colors(tmp_path, text):
    (tmp_path / "c").write_bytes(text.encode())
    names, colors = read_classes(tmp_path / "c")
    assert names == NAMES
    np.testing.assert_array_equal(colors, COLORS)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a\nb\n", ("a", "b")), ("0 a\n1 b\n", ("a", "b")), ("0: a\n1: b\n", ("a", "b")), ("a 0\nb 1\n", ("a", "b")),
        ("lane 1\nlane 2\n", ("lane 1", "lane 2")), ('["a", "b"]', ("a", "b")), ('{"0": "a", "1": "b"}', ("a", "b")),
        ('{"b": 1, "a": 0}', ("a", "b")),
        ("class_id,class_name\n0,a\n1,b\n", ("a", "b")), ("Index;Class\n0;a\n1;b\n", ("a", "b")),
        ("ClassName\na\nb\n", ("a", "b")), ("label id\na 0\nb 1\n", ("a", "b")), ("name\na\nb\n", ("a", "b")),
        ("label\ncap\nbottle\n", ("label", "cap", "bottle")), ("blue\nred\n", ("blue", "red")),
        ("class A\nclass B\n", ("class A", "class B")), ("a\t# one\nb # two # three\n", ("a", "b")),
        ('[{"id": 3, "name": "b", "attributes": []}, {"id": 5, "name": "a", "attributes": []}]',
         ("background", "b", "a")),
        ('{"categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}]}', ("a", "b")),
        ('{"categories": [{"id": 1, "name": "a"}, {"id": 3, "name": "b"}]}', ("background", "a", "unused 2", "b")),
    ],
)  # fmt: skip
def test_lists_of_names(tmp_path, text, names):
    (tmp_path / "c").write_text(text)
    assert read_classes(tmp_path / "c") == (names, None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a 0 0 0\nb 1 2\n", r"line 2 \('b 1 2'\) is not understood"),
        ("a, b, c\n", r"line 1 \('a, b, c'\) is not understood; write one class per line"),
        ("a: b: c\n", r"line 1 \('a: b: c'\) is not understood"),
        ("a 0 0 0\nb\n", r"1 of 2 lines have a color R G B, but line 2 \('b'\) has none"),
        ("1 a\n2 b\n", r"line 1 \('1 a'\) has the id 1 where 0 is expected"),
        ("a 0 0 300\n", r"line 1 \('a 0 0 300'\) has a color above 255"),
        ("<annotations/>", "is XML; .*convert_labels"),
        ('{"a": ', "is neither a list of classes"),
        ('{"shapes": [3]}', "is JSON, but neither"),
        ('{"version": 1000000000000}', "is JSON, but neither"),
        ("# only\n", "is empty"),
        ("a\na\n", "'a' occurs twice"),
        ("a 1 1 1\nb 1 1 1\n", "two classes have the same color"),
    ],
)
def test_what_is_not_understood_is_shown(tmp_path, text, words):
    (tmp_path / "c").write_text(text)
    with pytest.raises(UserError, match=words):
        read_classes(tmp_path / "c")


def test_what_is_written_is_read_back(tmp_path):
    (tmp_path / "c").write_text(write_classes(NAMES, np.array(COLORS)))
    names, colors = read_classes(tmp_path / "c")
    assert names == NAMES and colors.tolist() == COLORS
