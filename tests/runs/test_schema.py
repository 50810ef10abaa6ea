"""Reading any contents of a workdir's files gives the form that the program uses, or one sentence."""

import copy
import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deeplab_jax.crf.params import FIELDS
from deeplab_jax.crf.setting import read_preset
from deeplab_jax.files import read_json
from deeplab_jax.inference import manifest
from deeplab_jax.runs import schema
from tests.toy_workdir import toy_config

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400) | st.just(1e308),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
RESULT = {
    "crf_iterations": 0, "mean_iou": 0.5, "pixel_accuracy": 0.5, "mean_accuracy": None, "per_class_iou": {"sky": 0.1},
    "trimap": {"3": {"mean_iou": 0.3, "pixel_accuracy": None}}, "images": 2,
}  # fmt: skip
PICTURES = {
    "images": [{"name": "a", "mean_iou": [0.1, None]}],
    "crf_iterations": [0, 5],
    "pictures": [{"kind": "best", "index": 0, "photo": "p.png", "truth": "t.png", "labels": {"0": "l.png"}}],
}
MANIFEST = {
    "format": "deeplab_jax artifact 1",
    "programs": [{"size": [9, 17], "file": "program_9x17.stablehlo", "bilateral": "exact"}],
    "weights": "weights.npz",
    "labels": ["a", "b"],
    "palette": [[0, 0, 0]] * 256,
    "crf": {"iterations": 4},
    "sha256": {"weights.npz": "00"},
}
WHOLE = {
    manifest.checked: MANIFEST,
    schema.config: json.loads(json.dumps(toy_config().to_dict())),
    schema.best_mark: {"step": 3, "mean_iou": 0.5},
    schema.run_entries: [{"time": "now"}],
    schema.history: [{"until_step": 3, "config": {"model": {}}}],
    schema.meta: {"class_names": ["a", "b"], "palette": [[0, 0, 0], [1, 2, 3]]},
    schema.results: [RESULT],
    schema.pictures: PICTURES,
}
FEW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def places(value, path=()):
    """The paths of all parts of a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield from places(part, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    value = copy.deepcopy(value)
    part = value
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = new
    return value


@pytest.mark.parametrize("check", WHOLE, ids=lambda c: c.__name__)
def test_what_the_program_writes_is_taken(check):
    assert check(copy.deepcopy(WHOLE[check])) is not None


@pytest.mark.parametrize("check", WHOLE, ids=lambda c: c.__name__)
@FEW
@given(data=st.data())
def test_anything_else_is_a_sentence(check, data):
    """Some part of a good file, or all of it, is replaced by anything."""
    path = data.draw(st.sampled_from(sorted(places(WHOLE[check]), key=str)))
    value = replaced(WHOLE[check], path, data.draw(JSON))
    try:
        check(value)
    except ValueError as e:
        assert 5 < len(str(e)) < 300 and "\n" not in str(e)


def test_a_config_of_an_older_program_has_defaults_for_what_it_lacks():
    value = copy.deepcopy(WHOLE[schema.config])
    del value["eval"]["size_multiple"], value["log"]
    config = schema.config(value)
    assert (config.eval.size_multiple, config.log.every) == (32, 20)
    assert config.data.crop == (321, 321)  # a tuple again


@pytest.mark.parametrize(
    ("path", "new", "sentence"),
    [
        (("model",), None, "lacks the group 'model'"),
        (("crf", "bilateral_rgb_std"), float("nan"), "bilateral_rgb_std"),
        (("crf", "bilateral_rgb_std"), 1e-50, "config.crf.bilateral_rgb_std=1e-50: must lie between 0.01 and 1e+06"),
        (("crf", "iterations"), 10**9, "config.crf.iterations=1000000000: must lie between 0 and 10000"),
        (("data", "gamma"), 2000.0, "config.data.gamma=2000.0: must lie between 0 and 8"),
        (("data", "color_cast"), 3.0, "config.data.color_cast=3.0: must lie between 0 and 1"),
        (("data", "blur"), -1.0, "config.data.blur=-1.0: must lie between 0 and 100"),
        (("eval", "size_multiple"), 0, "config.eval.size_multiple=0: must lie between 1 and 2048"),
        (("eval", "scales"), (), "config.eval.scales: needs at least one value"),
        (("eval", "scales"), [1e6], "config.eval.scales"),
        (("seed",), "3", "'seed' is '3', and should be like 0"),
        (("eval", "mirror"), 1, "'eval.mirror'"),
    ],
)
def test_what_is_wrong_with_a_config_is_named(path, new, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        schema.config(replaced(WHOLE[schema.config], path, new))


def test_a_palette_that_is_short_is_named():
    with pytest.raises(ValueError, match="has no palette of at least 2 colors"):
        schema.meta({"class_names": ["a", "b"], "palette": [[0, 0, 0]]})


@pytest.mark.parametrize(
    ("path", "new", "sentence"),
    [
        (("programs", 0, "file"), "../weights.npz", "has no list of programs with a file"),
        (("programs", 0, "size"), [1 << 20, 9], "size from 1 to 16384"),
        (("programs", 0, "size"), [True, 9], "size from 1 to 16384"),
        (("programs",), [], "has no list of programs"),
        (("weights",), "/etc/passwd", "names no file of this folder in 'weights'"),
        (("weights",), "a\0b", "names no file of this folder in 'weights'"),
        (("labels",), ["one"], "has no list of 2 to 256 class names"),
        (("palette",), [[0, 0, 0]], "has no 256 colors"),
        (("crf", "iterations"), 10**9, "has no iterations from 0 to 10000"),
        (("format",), "another", "is of format 'another', this version reads"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_named(path, new, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        manifest.checked(replaced(MANIFEST, path, new))


PRESET = dict.fromkeys(FIELDS, 3.0) | {"iterations": 5, "normalization": "after", "source": "here"}


@FEW
@given(name=st.sampled_from(sorted(PRESET)), new=JSON)
def test_a_preset_with_anything_in_it_is_a_sentence(tmp_path, name, new):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(PRESET | {name: new}))
    try:
        preset = read_preset(path)
    except ValueError as e:
        assert str(e).startswith(f"{path}: ") and "\n" not in str(e)
    else:
        assert 0 <= preset.iterations <= 10_000


@pytest.mark.parametrize("new", [1e308, 10**400, "3", True, [], [True], 1e-50, -1, None])
def test_widths_are_numbers_that_float32_holds(tmp_path, new):
    path = tmp_path / "preset.json"
    path.write_text(json.dumps(PRESET | {"bilateral_rgb_std": new}))
    with pytest.raises(ValueError, match="bilateral_rgb_std"):
        read_preset(path)


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"\xff", b"1" * 5000, b"{"])
def test_json_that_is_none_says_why(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is empty|nested too deeply|not UTF-8|is not JSON"):
        read_json(path)
    with pytest.raises(ValueError, match="cannot be read as a CRF preset"):
        read_preset(path)


def test_a_preset_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    for name, sentence in {"pipe": "is not a regular file", "zero": "is not a regular file", "none": "no such"}.items():
        with pytest.raises(ValueError, match=rf"{name}.json: cannot be read as a CRF preset \(.*{sentence}"):
            read_preset(tmp_path / f"{name}.json")


def test_a_folder_in_the_place_of_a_file_says_so(tmp_path):
    with pytest.raises(ValueError, match="is a folder"):
        read_json(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none")
