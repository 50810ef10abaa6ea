"""Every score map's positions are positions of the labels, or the config is refused with crops that fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from deeplab_jax.models import create_model
from deeplab_jax.training import losses
from deeplab_jax.training.crops import check_crop, map_lengths

SCALES = "model.scales=(1.0, 0.75, 0.5)"
SMALL = ("model.widths=8,8,8,8", "model.head_width=8", "loss.at=scores")


def maps(config) -> dict[str, jax.ShapeDtypeStruct]:
    """The score maps of the config's network at its crop, by tracing alone."""
    model = create_model(config.model, 3, crf=config.crf)

    def run(image):
        logits, out = model.init_with_output({"params": jax.random.key(0), "dropout": jax.random.key(1)}, image)[0]
        return losses.named_score_maps(logits, out)

    return jax.eval_shape(run, jnp.zeros((1, *config.data.crop, 3)))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("shapes", SMALL),
        ("shapes", (*SMALL, SCALES, "data.crop=97,105")),
        ("shapes", (*SMALL, "model.fine_branch=8", "data.crop=241,321")),
        ("shapes", (*SMALL, "model.output_stride=16", "data.crop=97,129")),
        ("voc_vgg16", ()),
        ("voc_vgg16", (SCALES,)),
        ("voc_vgg16", (SCALES, "data.crop=298,314")),
        ("voc_vgg16_aspp_l", (SCALES,)),
        ("voc_vgg16_msc", (SCALES,)),
    ],
)
def test_lengths_are_the_networks_and_the_labels(name, overrides):
    config = load_config(name, overrides)
    check_crop(config)
    found = maps(config)
    for axis, n in enumerate(config.data.crop):
        assert dict(map_lengths(config.model, n)) == {name: shape.shape[1 + axis] for name, shape in found.items()}
    labels = np.zeros((1, *config.data.crop), np.uint8)
    for shape in found.values():
        assert losses.subsample_labels(labels, shape.shape[1:3]).shape == shape.shape[:3]


def test_scales_of_the_first_papers_network_line_up():
    """Sides of 8k + 2 at every scale: position i of the half-size map coincides with 2i of the full-size one."""
    found = maps(load_config("voc_vgg16", [SCALES]))
    assert {name: shape.shape[1:3] for name, shape in found.items()} == {
        "fused": (39, 39),
        "scale_0": (39, 39),
        "scale_1": (39, 39),
        "scale_2": (20, 20),
    }


@pytest.mark.parametrize(
    "name",
    ["voc_aspp_l", "voc_resnet101", "voc_largefov", "voc_vgg16_largefov", "voc_vgg16_msc_largefov", "cityscapes_aspp_l",
     "person_part_aspp_l", "context_aspp_l", "camvid", "camvid_all", "camvid_resnet101", "folder"],
)  # fmt: skip
def test_shipped_crops_fit(name):
    check_crop(load_config(name))


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "voc_aspp_l",
            ("data.crop=320,320",),
            r"320,320: at 320 .* suitable crops are 313,313 and 321,321 \(sides of 8k\+1\)",
        ),
        ("voc_aspp_l", ("data.crop=321,320",), r"suitable crops are 321,313 and 321,321"),
        ("voc_vgg16", ("data.crop=305,306",), r"suitable crops are 298,306 and 306,306 \(sides of 8k\+2\)"),
        (
            "shapes",
            ("crf.train=end_to_end", "loss.at=scores", "crf.stride=3"),
            r"config\.crf\.stride=3: must be one of 1, 2, 4",
        ),
        ("shapes", ("data.crop=97,",), r"config\.data\.crop=\(97,\): must be two sizes"),
        ("voc_aspp_l", ("model.scales=(1.5, 1.0)",), r"config\.model\.scales=\(1\.5, 1\.0\): .* begin with 1"),
        ("voc_aspp_l", ("model.output_stride=9",), r"config\.model: config\.model\.output_stride=9"),
    ],
)
def test_crops_that_do_not_fit_are_refused_with_those_that_do(name, overrides, message):
    with pytest.raises(UserError, match=message):
        check_crop(load_config(name, overrides))


def test_at_pixels_any_crop_will_do():
    check_crop(load_config("voc_aspp_l", ["data.crop=320,320", "loss.at=pixels"]))


def test_with_half_pixel_centres_any_crop_will_do_and_each_map_has_its_labels():
    config = load_config("shapes", (*SMALL, SCALES, "data.crop=96,100", "model.resize=half_pixel"))
    check_crop(config)
    labels = np.zeros((1, 96, 100), np.uint8)
    found = {name: shape.shape[1:3] for name, shape in maps(config).items()}
    assert found == {"fused": (13, 13), "scale_0": (13, 13), "scale_1": (10, 10), "scale_2": (7, 7)}
    for name, size in found.items():
        assert losses.labels_for(name, labels, size, "scores", "half_pixel").shape == (1, *size)


def test_the_crop_of_the_first_steps_is_checked_too():
    config = load_config("shapes", (*SMALL, "data.stages=((0.0,(64,64),(0.5,1.0)),)"))
    check_crop(config)  # without such steps it does not matter
    config.data.stages = ((0.5, (64, 64), (0.5, 1.0)),)
    with pytest.raises(UserError, match=r"config\.data\.stages\[0\]: crop=64,64: at 64 pixels .* nearest suitable"):
        check_crop(config)
