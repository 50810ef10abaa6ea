"""The scores of a photograph do not depend on the size of the program that computes them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.inference.from_config import create_segmenter
from deeplab_jax.inference.tiling import padded_size
from deeplab_jax.inference.views import network_scores
from deeplab_jax.models.deeplab import create_model

MULTIPLE = 32
SMALL = ["model.widths=4,6,8,10", "model.head_width=8"]
SIZE = (70, 41)


def network(name, overrides):
    """A model and variables with biases, and statistics, that make something of padding."""
    model = create_model(load_config(name, overrides).model, num_classes=3)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 65, 65, 3)))
    rng = np.random.default_rng(0)

    def changed(path, leaf):
        name = path[-1].key
        noise = rng.normal(0, 0.3, leaf.shape) if name in ("bias", "mean") else 0
        return leaf + np.float32(noise)

    return model, jax.tree_util.tree_map_with_path(changed, variables)


def scores(model, variables, image, program, multiple, **views):
    """Log-probabilities of one image in a program for a size."""
    (height, width), extra = image.shape[:2], model.architecture.size_extra
    size = [n + extra - 1 for n in program]
    padded = np.pad(image, ((0, size[0] - height), (0, size[1] - width), (0, 0)), mode="edge")
    views = {"scales": (1.0,), "mirror": False, **views}
    found = network_scores(
        model, variables, jnp.asarray(padded)[None], jnp.array([[height, width]]), multiple=multiple,
        extra=extra, resize=model.architecture.resize, **views,
    )  # fmt: skip
    return np.asarray(found[0])[:height, :width]


@pytest.mark.parametrize(
    ("name", "overrides", "views"),
    [
        ("shapes", SMALL, {}),
        ("camvid", SMALL, {"mirror": True}),
        ("camvid", [*SMALL, "model.output_stride=8"], {"scales": (0.75, 1.0, 1.5)}),
        pytest.param("voc_vgg16_largefov", [], {}, marks=pytest.mark.long),
        pytest.param("voc_resnet101_msc", ["model.allow_random_frozen=True"], {}, marks=pytest.mark.long),
    ],
)
def test_the_scores_in_a_larger_program_are_those_alone(name, overrides, views):
    model, variables = network(name, overrides)
    image = np.random.default_rng(1).integers(0, 256, (*SIZE, 3), np.uint8)
    own = [padded_size(n, MULTIPLE) for n in SIZE]
    alone = scores(model, variables, image, own, None, **views)
    np.testing.assert_allclose(scores(model, variables, image, own, MULTIPLE, **views), alone, atol=1e-5)
    large = scores(model, variables, image, (129, 161), MULTIPLE, **views)
    np.testing.assert_allclose(large, alone, rtol=1e-3, atol=2e-3)
    without = scores(model, variables, image, (129, 161), None, **views)
    assert np.abs(without - alone).max() > 0.02  # else it shows nothing


def test_a_batch_keeps_each_image_within_its_own_canvas():
    model, variables = network("camvid", SMALL)
    rng = np.random.default_rng(2)
    sizes = np.array([[33, 97], [97, 33], [97, 97]])
    images = rng.integers(0, 256, (3, 97, 97, 3), np.uint8)
    found = network_scores(
        model, variables, jnp.asarray(images), jnp.asarray(sizes), scales=(1.0,), mirror=True, multiple=MULTIPLE
    )
    for image, (height, width), both in zip(images, sizes, found, strict=True):
        alone = scores(model, variables, image[:height, :width], (height, width), None, mirror=True)
        np.testing.assert_allclose(np.asarray(both)[:height, :width], alone, atol=1e-4)


def test_other_photographs_of_a_call_do_not_matter():
    config = load_config("shapes", [*SMALL, "eval.mirror=True"])
    _, variables = network("shapes", SMALL)
    segmenter = create_segmenter(config, variables, ("a", "b", "c"), voc_palette())
    image = np.random.default_rng(3).integers(0, 256, (*SIZE, 3), np.uint8)
    (alone,) = segmenter.scores([image])
    segmenter.plan([SIZE, (200, 20), (20, 200), (100, 100), (150, 90)])
    assert segmenter.padded_shape(SIZE) == (257, 257)
    np.testing.assert_allclose(segmenter.scores([image])[0], alone, atol=1e-4)
