"""The receptive field that `describe` computes is the one that a gradient sees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.models import create_model, layers
from deeplab_jax.models.summary import describe
from tests.models import thin


def measured(config, size, beside=0):
    """Side and middle, over 8 times the score's number, of the pixels on which a score depends: the middle one's, or
    that of a score `beside` it.

    With positive weights and no maximum.
    """
    model = create_model(config.model, 2)
    x = jnp.ones((1, size, size, 3))
    shapes = thin.shapes(model)
    variables = jax.tree.map(lambda p: jnp.full(p.shape, 1.0 / max(p.size // p.shape[-1], 1)), shapes)
    middle = jax.eval_shape(lambda x: model.apply(variables, x)[0], x).shape[1] // 2 + beside
    # The mean color is subtracted inside: bright pixels keep every ReLU open.
    grad = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0][0, middle, middle, 0]))(x * 255)
    rows, columns = (np.flatnonzero(np.any(np.asarray(grad[0]) != 0, axis=(axis, 2))) for axis in (1, 0))
    assert rows[0] > 0 and rows[-1] < size - 1, "the image is too small"
    assert rows[-1] - rows[0] == columns[-1] - columns[0]
    return int(rows[-1] - rows[0]) + 1, (rows[0] + rows[-1]) / 2 - 8 * middle


@pytest.mark.parametrize(
    ("name", "size", "field"), [("voc_vgg16_7x7", 514, 404), ("voc_vgg16", 514, 308), ("voc_vgg16_largefov", 641, None)]
)
def test_computed_is_measured(monkeypatch, name, size, field):
    thin.narrow(monkeypatch)
    monkeypatch.setattr(layers, "max_pool", layers.average_pool)
    config = load_config(name)
    config.model.head_width = 2
    computed = describe(config, 2)["receptive_field"]
    assert field in (None, computed)
    # With sides padded to 8 k + 1, score i belongs to pixel 8 i; to 8 k + 2, to the middle of 8 i and 8 i + 1.
    extra = create_model(config.model, 2).architecture.size_extra
    assert extra == size % 8
    assert measured(config, size) == (computed, (extra - 1) / 2)


@pytest.mark.parametrize(("stride", "fine_branch", "positions"), [(8, 0, 1), (8, 4, 2), (16, 4, 4)])
def test_small_network(monkeypatch, stride, fine_branch, positions):
    monkeypatch.setattr(layers, "max_pool", layers.average_pool)
    config = load_config("camvid", (f"model.output_stride={stride}",))
    config.model.update(
        widths=(2, 2, 2, 2), blocks=(1, 1, 1, 1), head_width=2, head_rates=(2, 4), fine_branch=fine_branch,
        batch_norm="frozen", preprocessing="caffe_bgr",
    )  # fmt: skip
    field = describe(config, 2)["receptive_field"]
    # What a score between two coarse positions depends on differs with its place between them.
    assert field == max(measured(config, 641, beside)[0] for beside in range(positions))
