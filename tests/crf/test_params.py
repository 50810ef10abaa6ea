import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from deeplab_jax.crf import PRESETS, CRFParams, Setting, read_preset, setting_from_config, write_preset
from deeplab_jax.crf.params import check_params


def values(params):
    names = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")
    return tuple(getattr(params, name) for name in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deeplab_v1", (5, 50, 10, 3, 3)),
        ("v1_msc", (3, 95, 3, 3, 3)),
        ("v1_largefov", (4, 121, 5, 3, 3)),
        ("v1_msc_largefov", (4, 83, 5, 3, 3)),
        ("v1_coco_largefov", (5, 69, 5, 3, 3)),
        ("v1_msc_coco_largefov", (4, 59, 5, 3, 3)),
        ("v2_vgg16", (4, 65, 3, 2, 2)),
        ("v2_resnet101", (4, 67, 3, 3, 1)),
        ("deeplab_pytorch", (4, 67, 3, 3, 1)),
        ("crfasrnn", (5, 160, 3, 3, 3)),
    ],
)
def test_published_parameters(name, expected):
    preset = PRESETS[name]
    assert values(preset.params) == expected
    normalization = "symmetric" if name == "deeplab_pytorch" else "after"
    assert (preset.iterations, preset.normalization) == (10, normalization)
    assert preset.source
    docs = (Path(__file__).parents[2] / "docs" / "crf.md").read_text()
    numbers = " | ".join(f"{n:g}" for n in (*values(preset.params), preset.iterations))
    assert f"| `{name}` | {numbers} | `{normalization}` |" in docs


def test_preset_files_keep_every_number(tmp_path):
    preset = Setting(CRFParams(np.array([1.0, 2.0]), (5.0, 6.0), 3.5, 0.25, 1.0), 7, "symmetric", "a search")
    write_preset(tmp_path / "p.json", preset)
    back = read_preset(tmp_path / "p.json")
    for a, b in zip(values(preset.params), values(back.params)):
        np.testing.assert_array_equal(a, b)
    assert (back.iterations, back.normalization, back.source, back.bilateral) == (7, "symmetric", "a search", None)
    assert set(json.loads((tmp_path / "p.json").read_text())) == {
        "bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std", "iterations",
        "normalization", "source",
    }  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["p.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as a CRF preset"),
        ("{}", "a CRF preset has the fields bilateral_weight"),
        ('"bilateral_xy_std": "wide"', "bilateral_xy_std=wide is not a number"),
        ('"bilateral_xy_std": 0', "bilateral_xy_std=0.0 must be greater than 0"),
        ('"bilateral_xy_std": 1, "iterations": -1', "iterations=-1 must be at least 0 and at most 10000"),
        ('"bilateral_xy_std": 1, "normalization": "both"', "normalization='both' must be one of"),
        ('"bilateral_xy_std": 1, "normalization": ["after"]', r"normalization=.*must be one of"),
        ('"bilateral_xy_std": 1, "source": 5', "source must be text"),
        ('"bilateral_xy_std": 1, "bilateral": 5', "bilateral must be text"),
        ('"bilateral_xy_std": 1, "bilateral": "box"', "bilateral='box' must be one of auto, permutohedral"),
    ],
)
def test_preset_files_that_cannot_be_used_are_named(tmp_path, text, message):
    if not text.startswith("{"):
        text = f'{{"bilateral_weight": 1, "bilateral_rgb_std": 1, "gaussian_weight": 1, "gaussian_xy_std": 1, {text}}}'
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_preset(tmp_path / "p.json")
    assert "p.json" in str(error.value)


def test_setting_from_config(tmp_path):
    five = dict(
        zip(("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight"), (1.0, 2.0, 3.0, 4.0))
    )
    chosen = {"preset": "", "iterations": 7, "normalization": "before", "bilateral": "exact"}
    config = SimpleNamespace(**chosen, gaussian_xy_std=5.0, **five)
    setting = setting_from_config(config)
    assert values(setting.params) == (1, 2, 3, 4, 5)
    assert setting.options == {"iterations": 7, "normalization": "before", "bilateral": "exact"}
    config.preset = "v2_vgg16"
    setting = setting_from_config(config)
    assert setting.params == PRESETS["v2_vgg16"].params and setting.source == PRESETS["v2_vgg16"].source
    assert setting.options == {"iterations": 7, "normalization": "before", "bilateral": "exact"}
    config.preset = "deeplab_pytorch"  # found with another normalization than all others, which it includes
    assert setting_from_config(config).normalization == "symmetric"
    config.preset = str(tmp_path / "found.json")
    write_preset(config.preset, Setting(CRFParams(), normalization="none"))
    assert setting_from_config(config).options == {"iterations": 7, "normalization": "none", "bilateral": "exact"}
    write_preset(config.preset, Setting(CRFParams(), bilateral="separable"))
    assert setting_from_config(config).bilateral == "separable"
    config.preset = "v3"
    with pytest.raises(ValueError, match="preset='v3' is neither"):
        setting_from_config(config)


def test_at_stride_divides_positions_only():
    assert values(CRFParams(4.0, 64.0, 3.0, 3.0, (8.0, 4.0)).at_stride(8)) == (4, 8, 3, 3, (1, 0.5))


@pytest.mark.parametrize("stride", [0, -1, float("nan"), float("inf"), "2", True])
def test_at_stride_needs_a_number_above_0(stride):
    with pytest.raises(ValueError, match=f"stride={stride!r} must be a number above 0"):
        CRFParams().at_stride(stride)


@pytest.mark.parametrize("value", [np.full((3, 2), "wide", object), np.full((3, 2), np.nan), np.full((3, 2), -1.0)])
def test_a_parameter_of_several_rows_is_named_in_one_line(value):
    with pytest.raises(ValueError, match="bilateral_rgb_std=") as caught:
        check_params(CRFParams(1.0, 1.0, value, 1.0, 1.0))
    assert "\n" not in str(caught.value)


def test_weights_of_some_classes():
    matrix = np.arange(9.0).reshape(3, 3)
    params = CRFParams(np.float32([1, 2, 3]), 20.0, (5.0, 6.0, 7.0), matrix, 2.0)
    found = params.of_classes(np.uint8([0, 2]))
    np.testing.assert_array_equal(found.bilateral_weight, [1, 3])
    np.testing.assert_array_equal(found.gaussian_weight, [[0, 2], [6, 8]])
    assert (found.bilateral_xy_std, found.bilateral_rgb_std) == (20.0, (5.0, 6.0, 7.0))
    assert CRFParams().of_classes(np.uint8([9])) == CRFParams()
    with pytest.raises(ValueError, match=r"bilateral_weight has .* the classes 0 to 2, and none for 3"):
        params.of_classes(np.uint8([0, 3]))
    with pytest.raises(ValueError, match="-1 is no class id"):
        params.of_classes(np.array([-1, 0]))
    with pytest.raises(ValueError, match="for each of 3 classes, but there are 2"):
        params.of_classes(np.uint8([0, 1]), classes=2)


@pytest.mark.parametrize("weight", [(), ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), np.ones((1, 2, 2))])
def test_weights_of_no_usable_shape_are_refused(weight):
    with pytest.raises(ValueError, match=r"gaussian_weight has shape \(.*\); give one number, C numbers or C x C"):
        check_params(CRFParams(gaussian_weight=weight))


@pytest.mark.parametrize("value", ["4", True])
def test_text_and_truth_values_are_no_numbers(value):
    with pytest.raises(ValueError, match=f"bilateral_xy_std={value} is not a number"):
        check_params(CRFParams(bilateral_xy_std=value))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (Setting(CRFParams(), normalization="foo"), "normalization='foo' must be one of"),
        (Setting(CRFParams(), iterations=3.7), "iterations=3.7 must be a whole number"),
        (Setting(CRFParams(), bilateral="foo"), "foo"),
        (Setting(CRFParams(bilateral_xy_std=0.0)), "bilateral_xy_std=0.0 must be greater than 0"),
        (Setting(CRFParams(gaussian_weight=float("nan"))), "gaussian_weight=nan must be finite"),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        write_preset(tmp_path / "mine.json", setting)
    assert not list(tmp_path.iterdir())
    write_preset(tmp_path / "mine.json", Setting(CRFParams(), iterations=np.int64(3)))
    assert read_preset(tmp_path / "mine.json").iterations == 3
