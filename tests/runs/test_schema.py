"""Reading any contents of a workdir's files gives the form that the program uses, or one sentence."""

import copy
import json
import os
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deeplab_jax.config import SHIPPED, fields, load_config
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


def test_a_kernels_weight_may_be_one_for_each_class():
    config = schema.config(replaced(WHOLE[schema.config], ("crf", "bilateral_weight"), [1, 4.0, 2.5]))
    assert config.crf.bilateral_weight == (1, 4.0, 2.5)


@pytest.mark.parametrize(
    ("path", "new", "sentence"),
    [
        (("model",), None, "lacks the group 'model'"),
        (("crf", "bilateral_rgb_std"), float("nan"), "bilateral_rgb_std"),
        (("crf", "bilateral_rgb_std"), 1e-50, "config.crf.bilateral_rgb_std=1e-50: must lie between 0.01 and 1e+06"),
        (("crf", "bilateral_weight"), [1.0, 1e30], "config.crf.bilateral_weight=(1.0, 1e+30): must lie between -1e+06"),
        (("crf", "bilateral_weight"), [1.0, "x"], "'crf.bilateral_weight' is \"[1.0, 'x']\""),
        (("crf", "bilateral_xy_std"), [1.0, 2.0], "'crf.bilateral_xy_std' is '[1.0, 2.0]', and should be like 67.0"),
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


@pytest.mark.parametrize("name", sorted(p.stem for p in SHIPPED.glob("*.py") if p.stem != "__init__"))
def test_commands_take_every_shipped_config(name):
    assert schema.problem(load_config(name)) == ""


@pytest.mark.parametrize(("name", "choice"), [(name, c) for name, known in schema.CHOICES.items() for c in known])
def test_every_choice_can_be_taken(name, choice):
    assert schema.problem(load_config("base", [f"{name}={choice}"])) == ""


_FREE = {  # texts of any kind; presets, data sets and splits are looked up where they are read
    "init_from", "crf.preset", "data.name", "data.dir", "data.cache_dir", "data.train_split", "data.holdout_by",
    "data.on_corrupt", "data.images", "data.masks", "data.classes", "data.train_list", "data.val_list",
    "data.mask_prefix", "data.mask_suffix", "eval.split", "eval.select_split", "name",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(name for name, v in fields(load_config("base")) if isinstance(v, str)))
def test_a_misspelt_choice_of_any_field_is_named(name):
    problem = schema.problem(load_config("base", [f"{name}=misspelt"] if name != "name" else []))
    assert problem == "" if name in _FREE else problem.startswith(f"config.{name}=") and "misspelt" in problem


_NUMBERS = {name: value for name, value in fields(load_config("base")) if not isinstance(value, str | bool)}
for name in ("crf.learn", "search.thin", "data.mirror_swaps", "data.stages", "data.ignore"):  # no numbers, or ids
    del _NUMBERS[name]


@pytest.mark.parametrize("value", [-(1 << 40), 10**40])
@pytest.mark.parametrize("name", sorted(_NUMBERS))
def test_an_impossible_number_of_any_field_is_named(name, value):
    comma = "," * isinstance(_NUMBERS[name], tuple)
    problem = schema.problem(load_config("base", [f"{name}={value}{comma}"]))
    assert problem.startswith(f"config.{name}=") and ("must lie between" in problem or "must be finite" in problem)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["optimizer.schedule=foo"], "config.optimizer.schedule=foo: must be one of poly, step, constant, cosine"),
        (["optimizer.name=adam"], "config.optimizer.name=adam: must be one of sgd, adamw"),
        (["crf.train=foo"], "config.crf.train=foo: must be one of off, end_to_end"),
        (["crf.learn=weights,foo"], "config.crf.learn=foo: must be one of weights, compatibility, stds"),
        (["loss.at=foo"], "config.loss.at=foo: must be one of scores, pixels"),
        (["search.objective=iou"], "config.search.objective=iou: must be one of mean_iou, trimap, both"),
        (["eval.trimap_source=foo"], "config.eval.trimap_source=foo: must be one of boundary, void"),
        (["eval.submission=foo"], 'config.eval.submission=foo: must be one of "", voc, cityscapes'),
        (["model.dtype=half"], "config.model.dtype='half' is not one of 'float32', 'bfloat16'"),
        (["seed=-1"], "config.seed=-1: must lie between 0 and"),
        (["optimizer.momentum=5"], "config.optimizer.momentum=5.0: must lie between 0 and 0.99999"),
        (["optimizer.ema=2"], "config.optimizer.ema=2.0: must lie between 0 and 1"),
        (["loss.class_weights=-1,1,1"], "config.loss.class_weights=(-1, 1, 1): must lie between 0 and 1e+06"),
        (["search.passes=0"], "config.search.passes=0: must lie between 1 and 64"),
        (["search.grid.bilateral_xy_std=0,9"], "config.search.grid.bilateral_xy_std=(0, 9): must lie between 0.01"),
        (["search.grid.gaussian_weight=()"], "config.search.grid.gaussian_weight: needs at least one value"),
        (
            ["optimizer.schedule=step", "optimizer.step_size=0"],
            "config.optimizer.step_size=0: must be at least 1 with config.optimizer.schedule=step",
        ),
        (["eval.size_multiple=12"], "config.eval.size_multiple=12: must be a multiple of 8"),
        (["eval.scales=half"], "config.eval.scales=('half',): needs numbers, such as 1.0"),
        (["eval.crf_iterations=0,2.5"], "config.eval.crf_iterations=(0, 2.5): needs whole numbers, such as 0,1,2,5"),
        (["data.stages=((0.5,(9,9),(1e999,)),)"], "config.data.stages=((0.5, (9, 9), (inf,)),): must be finite"),
    ],
)
def test_what_no_command_can_use_is_named(overrides, sentence):
    assert schema.problem(load_config("base", overrides)).startswith(sentence)


def test_a_number_that_does_not_count_may_be_0():
    assert schema.problem(load_config("base", ["optimizer.step_size=0"])) == ""


@pytest.mark.parametrize(
    ("path", "value"),
    [(("optimizer", "ema"), 2.0), (("crf", "train"), "foo"), (("loss", "at"), "foo"), (("optimizer", "name"), "foo")],
)
def test_a_record_keeps_what_training_took_when_it_was_not_checked(path, value):
    found = schema.config(replaced(WHOLE[schema.config], path, value))
    assert found[path[0]][path[1]] == value


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


@pytest.mark.parametrize("crop", [(321,), (65, 65, 3)])
def test_a_crop_has_two_sides(crop):
    config = load_config("voc_aspp_l")
    config.data.crop = crop
    assert schema.problem(config) == f"config.data.crop={crop}: must be two sizes in pixels, height and width"


def test_a_network_has_stages():
    config = load_config("camvid")
    config.model.update(blocks=(), widths=())
    assert schema.problem(config) == "config.model.blocks=(): needs at least one stage"
