"""A backbone is added as docs/extending.md does it: its file and one line."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.models import BACKBONES, create_model, is_classifier, output_size, summary
from deeplab_jax.training import setup
from tests.extending import module_of


@pytest.fixture
def toy(monkeypatch):
    """The page's example, in the registry as "toy"."""
    module = module_of("A backbone", "toy", monkeypatch)
    monkeypatch.setitem(BACKBONES, "toy", module.BACKBONE)
    return load_config("voc_largefov", ("model.backbone=toy", "model.head_rates=2,", "data.crop=33,41"))


def test_it_is_built_described_and_trained(toy):
    assert output_size(toy.model, (33, 41)) == (5, 6)
    found = summary.describe(toy, 4)
    assert [layer["name"] for layer in found["layers"]][:3] == ["backbone/conv1", "backbone/conv2", "backbone/conv3"]
    assert found["parameters"] == 16 * (9 * 3 + 1) + 2 * 16 * (9 * 16 + 1) + 4 * (9 * 16 + 1)
    assert found["score_shape"] == [5, 6, 4]
    setup.check(toy)  # without batch norm, frozen statistics need no initial weights
    model = create_model(toy.model, 4)
    image = np.random.default_rng(0).integers(0, 256, (1, 33, 41, 3)).astype(np.uint8)
    variables = jax.jit(model.init)(jax.random.key(0), image)

    def loss(params):
        return jnp.square(model.apply({"params": params}, image)[0]).sum()

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient["backbone"]))
    assert is_classifier(("params", "head", "fc1", "kernel"))


def test_its_own_check_and_the_registrys(toy):
    toy.model.output_stride = 16
    with pytest.raises(ValueError, match="backbone 'toy' has only 8"):
        create_model(toy.model, 4)
    toy.model.backbone = "resnet18"
    with pytest.raises(ValueError, match="'resnet18' is not one of 'resnet101', 'resnet50', 'resnet_small', 'vgg16'"):
        create_model(toy.model, 4)
