"""Every shipped config loads, builds, and agrees with the papers."""

import jax
import jax.numpy as jnp
import pytest

from deeplab_jax.config import SHIPPED, load_config
from deeplab_jax.crf import PRESETS, setting_from_config
from deeplab_jax.models import create_model, output_size
from tests.models import thin

NAMES = sorted(p.stem for p in SHIPPED.glob("*.py") if p.stem not in ("__init__", "base"))


@pytest.mark.parametrize("name", NAMES)
def test_builds(monkeypatch, name):
    thin.narrow(monkeypatch)
    config = load_config(name)
    model = create_model(config.model, 5, config.crf)
    crop = tuple(config.data.crop)
    image = jnp.zeros((1, *crop, 3))
    (logits, out), _ = jax.eval_shape(lambda key: model.init_with_output(key, image), jax.random.key(0))
    h, w = output_size(config.model, crop)
    assert logits.shape == (1, h, w, 5)
    assert len(out.get("scales", ())) == (3 if len(config.model.scales) == 3 else 0)
    setting_from_config(config.crf)
    assert config.crf.preset in ("", *PRESETS)
    # Labels subsampled by the stride must fall on the scores.
    stride = 4 if config.model.fine_branch else config.model.output_stride
    assert [-(-n // stride) for n in crop] == [h, w]


def test_all_promised_configs_are_there():
    promised = """voc_aspp_l voc_aspp_s voc_largefov voc_resnet101 voc_vgg16 voc_vgg16_4x4 voc_vgg16_7x7
        voc_vgg16_largefov voc_vgg16_msc voc_vgg16_msc_largefov voc_vgg16_aspp_s voc_vgg16_aspp_l coco_pretrain
        context_aspp_l person_part_aspp_l cityscapes_aspp_l camvid camvid_all camvid_resnet101 folder shapes"""
    assert set(promised.split()) <= set(NAMES)


def test_card():
    c = load_config("voc_aspp_l")
    assert (c.model.backbone, c.model.head, tuple(c.model.head_rates)) == ("resnet101", "aspp", (6, 12, 18, 24))
    assert (c.model.output_stride, tuple(c.model.scales), c.model.batch_norm) == (8, (1.0, 0.75, 0.5), "frozen")
    assert (c.batch_size, c.num_steps, tuple(c.data.crop), c.crf.iterations) == (10, 20_000, (321, 321), 10)
    o = c.optimizer
    assert (o.schedule, o.learning_rate, o.poly_power, o.momentum, o.weight_decay) == ("poly", 2.5e-4, 0.9, 0.9, 5e-4)
    assert (o.classifier_multiplier, o.bias_multiplier) == (10.0, 2.0)
    assert tuple(c.data.scales) == (0.5, 0.75, 1.0, 1.25, 1.5)


@pytest.mark.parametrize(
    ("name", "batch", "crop", "kernel", "rates", "preset"),
    [
        ("voc_vgg16", 20, 306, 4, (4,), "deeplab_v1"),
        ("voc_vgg16_4x4", 20, 306, 4, (8,), "deeplab_v1"),
        ("voc_vgg16_7x7", 20, 306, 7, (4,), "deeplab_v1"),
        ("voc_vgg16_largefov", 30, 321, 3, (12,), "v1_largefov"),
        ("voc_vgg16_msc", 20, 306, 4, (4,), "v1_msc"),
        ("voc_vgg16_msc_largefov", 30, 321, 3, (12,), "v1_msc_largefov"),
    ],
)
def test_v1(name, batch, crop, kernel, rates, preset):
    c = load_config(name)
    assert (c.batch_size, c.num_steps, tuple(c.data.crop)) == (batch, 6000, (crop, crop))
    assert (c.model.head_kernel, tuple(c.model.head_rates), c.crf.preset) == (kernel, rates, preset)
    o = c.optimizer
    assert (o.schedule, o.step_size, o.learning_rate) == ("step", 2000, 1e-3)
    assert c.model.msc == c.model.freeze_trunk == ("msc" in name)
    assert c.model.pool5a == ("largefov" in name) == (not c.model.base_pools)
    assert tuple(c.data.scales) == (1.0,)


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("voc_vgg16_v2_largefov", (12,)),
        ("voc_vgg16_aspp_s", (2, 4, 8, 12)),
        ("voc_vgg16_aspp_l", (6, 12, 18, 24)),
    ],
)
def test_v2_vgg(name, rates):
    c = load_config(name)
    assert (c.batch_size, c.num_steps, c.optimizer.schedule, c.optimizer.learning_rate) == (10, 20_000, "poly", 1e-3)
    assert (tuple(c.model.head_rates), c.model.pool5a, c.crf.preset) == (rates, False, "v2_vgg16")


def test_data_sets():
    data = {n: load_config(n).data.name for n in NAMES}
    assert data["coco_pretrain"] == "coco_voc"
    assert data["context_aspp_l"] == "pascal_context"
    assert data["person_part_aspp_l"] == "pascal_person_part"
    assert data["cityscapes_aspp_l"] == "cityscapes" and load_config("cityscapes_aspp_l").eval.tile > 0


def test_rows_of_v2_table_4():
    heads = {"voc_resnet101": "plain", "voc_resnet101_msc": "plain", "voc_resnet101_msc_aug": "plain",
             "voc_largefov": "largefov", "voc_aspp_l": "aspp"}  # fmt: skip
    for name, head in heads.items():
        c = load_config(name)
        assert (c.model.backbone, c.model.head) == ("resnet101", head)
        assert (len(c.model.scales) == 3) == (name != "voc_resnet101")  # MSC
        assert (len(c.data.scales) > 1) == (name not in ("voc_resnet101", "voc_resnet101_msc"))  # Aug
