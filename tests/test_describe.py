import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deeplab_jax import cli, describe
from deeplab_jax.config import SHIPPED, load_config
from deeplab_jax.errors import UserError
from deeplab_jax.models import create_model, summary
from tests.models import thin

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "parameters", "score", "field"),
    [
        ("voc_vgg16", 65_140_565, 39, 308),
        ("voc_vgg16_4x4", 65_140_565, 39, 404),
        ("voc_vgg16_7x7", 134_346_581, 39, 404),
        ("voc_vgg16_largefov", 20_505_429, 41, None),
        ("voc_vgg16_aspp_l", 37_877_652, 41, None),
    ],
)
def test_published_networks(name, parameters, score, field):
    found = summary.describe(load_config(name), 21)
    assert found["parameters"] == parameters
    assert found["score_shape"] == [score, score, 21]
    assert found["output_stride"] == 8
    assert field in (None, found["receptive_field"])
    assert sum(layer["parameters"] for layer in found["layers"]) == parameters


DOCUMENTED = re.findall(r"^\| `(\w+)` \|.*\| ([\d,]+) \|$", (ROOT / "docs" / "configs.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("name", "parameters"), sorted(DOCUMENTED, key=lambda row: row[1]))
def test_parameters_that_the_documentation_states(name, parameters):
    """Of the same network one after the other, at one size: it is traced once."""
    config = load_config(name)
    config.model.scales = (1.0,)  # scales share their weights
    config.data.crop = (321, 321)
    assert summary.describe(config, describe.classes_of(config))["parameters"] == int(parameters.replace(",", ""))


def test_every_published_system_is_documented():
    names = {p.stem for p in SHIPPED.glob("*.py")} - {
        "__init__",
        "base",
        "camvid",
        "camvid_all",
        "camvid_resnet101",
        "folder",
        "shapes",
    }
    assert {name for name, _ in DOCUMENTED} == names


def test_resnet_aspp_l():
    found = summary.describe(load_config("voc_aspp_l"), 21)
    heads = [layer for layer in found["layers"] if layer["name"].startswith("head/")]
    assert [layer["rate"] for layer in heads] == [6, 12, 18, 24]
    assert sum(layer["parameters"] for layer in heads) == 1_548_372
    assert sum(layer["name"].endswith("branch2b") for layer in found["layers"]) == 33
    # ResNet-101 has 42.5 M parameters without its classifier, batch norm's affine among them.
    assert found["parameters"] == 42_500_160 + 1_548_372


def test_flops_are_the_compilers():
    config = load_config("camvid")
    config.model.update(widths=(8, 16, 16, 16), blocks=(1, 1, 1, 1), head_width=8, fine_branch=8)
    config.data.crop = (97, 129)
    model = create_model(config.model, 11)
    variables = thin.variables(model)
    compiled = jax.jit(lambda x: model.apply(variables, x)[0]).lower(jnp.zeros((1, 97, 129, 3))).compile()
    theirs = compiled.cost_analysis()["flops"] / 1e9
    # The compiler leaves out products with padding and adds normalization and ReLU.
    assert summary.describe(config, 11)["gflops"] == pytest.approx(theirs, rel=0.2)


def test_command(capsys):
    argv = ["describe", "--config=camvid", "--config.data.crop=(97,129)"]
    try:
        describe.define_flags()
    except Exception as e:  # another test module may have defined flags of these names
        pytest.skip(str(e))
    for extra in (["--json"], []):
        with pytest.raises(SystemExit) as stop:
            cli.run(describe.main, argv + extra)
        text = capsys.readouterr().out
        assert stop.value.code == 0
        if extra:
            found = json.loads(text)
            assert found["score_shape"] == [25, 33, 11]
        else:
            assert f"{found['parameters']:,}" in text
        from absl import flags

        flags.FLAGS.unparse_flags()
        flags.FLAGS["json"].value = False


@pytest.mark.parametrize(
    ("name", "crop", "fields", "stride", "score"),
    [
        ("voc_aspp_l", (20, 20), {}, 8, (3, 3)),
        ("voc_aspp_l", (5, 321), {}, 8, (1, 41)),
        ("voc_vgg16", (1, 1), {}, 8, None),
        ("camvid", (1, 9), {}, 4, (1, 3)),
        ("voc_vgg16_msc_largefov", (320, 64), {}, 8, (41, 9)),
        ("voc_vgg16_msc_largefov", (73, 73), {"output_stride": 16}, 16, None),
    ],
)
def test_any_crop_is_described(name, crop, fields, stride, score):
    config = load_config(name)
    config.data.crop = crop
    config.model.update(fields)
    described = summary.describe(config, 21)
    assert described["output_stride"] == stride
    assert score is None or tuple(described["score_shape"][:2]) == score


def test_a_wrong_network_is_one_sentence(capsys):
    config = load_config("camvid")
    config.model.head = "fc"
    with pytest.raises(UserError, match=r"config\.model\.head"):
        summary.describe(config, 11)


def test_memory_of_a_step_grows_with_the_batch_and_the_optimizer():
    config = load_config("camvid", ("optimizer.ema=0.9", "data.crop=97,129"))
    one, two = (summary.kept_for_backward(config, 11, batch) for batch in (1, 2))
    parameters = summary.describe(config, 11)["parameters"]
    assert one["gradients"] == 4 * parameters
    assert one["optimizer"] == 2 * one["gradients"]  # momentum and averaged weights
    assert one["parameters"] == two["parameters"] > one["gradients"]  # with batch norm's statistics
    assert 1.9 < two["activations"] / one["activations"] < 2.1
    config.optimizer.name = "adamw"
    assert summary.kept_for_backward(config, 11, 1)["optimizer"] == 3 * one["gradients"]


@pytest.mark.long
def test_memory_of_a_step_leaves_out_what_is_frozen():
    config = load_config("voc_aspp_l", ("data.crop=33,33",))
    kept = summary.kept_for_backward(config, 21, 1)
    norms = kept["parameters"] - kept["gradients"]
    assert kept["optimizer"] == kept["gradients"]
    assert norms == 4 * 4 * 52_672  # four numbers for each channel of ResNet-101's batch norms


def test_memory_of_a_step_is_near_the_compilers_account():
    config = load_config("shapes", ("crf.train=off",))
    kept = summary.kept_for_backward(config, 7, 8)
    compiled = summary.training_memory(config, 7, 8)
    assert 0.5 < (sum(kept.values()) - kept["optimizer"]) / compiled < 2
