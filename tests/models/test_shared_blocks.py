"""Residual blocks of one form are traced once; nothing else is different from a trunk whose blocks run one by one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import ScopeParamShapeError

from deeplab_jax.config import load_config
from deeplab_jax.models import create_model, layers
from tests.models import thin


def network(**fields):
    config = load_config("camvid")
    config.model.update(
        widths=(4, 4, 6, 6), blocks=(1, 1, 4, 1), head_width=4, head_rates=(2, 4), fine_branch=0, **fields
    )  # fmt: skip
    return create_model(config.model, 3)


def observed(next_call, args, kwargs, context):
    """An interceptor, with which each block is run by itself."""
    return next_call(*args, **kwargs)


def pieces(model, variables, x):
    """Scores, statistics and gradients of a training step."""

    def loss(params):
        (scores, _), new = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
        return (scores**2).sum(), (scores, new)

    return jax.value_and_grad(loss, has_aux=True)(variables["params"])


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"batch_norm": "trained"}, marks=pytest.mark.long),
        {"batch_norm": "frozen"},
        {"batch_norm": "trained", "remat": True},
    ],
)
def test_results_are_those_of_blocks_run_one_by_one(fields):
    model = network(**fields)
    variables, x = thin.variables(model), jax.random.uniform(jax.random.key(7), (2, 33, 33, 3)) * 255
    shared = jax.jit(lambda v: pieces(model, v, x))(variables)
    with nn.intercept_methods(observed):
        alone = jax.jit(lambda v: pieces(model, v, x))(variables)
    assert jax.tree.structure(shared) == jax.tree.structure(alone)
    jax.tree.map(lambda a, b: thin.assert_close(a, b, 1e-5), shared, alone)
    before, after = variables["batch_stats"]["backbone"], shared[0][1][1]["batch_stats"]["backbone"]
    moved = (np.abs(after["bn4b3_branch2a"]["mean"] - before["bn4b3_branch2a"]["mean"]) > 0).all()
    assert moved == (fields["batch_norm"] == "trained")


def test_a_form_is_traced_once(monkeypatch):
    model = network()
    variables = thin.variables(model)
    traced = []
    conv = layers.convolution.conv
    monkeypatch.setattr(layers.convolution, "conv", lambda x, *rest: traced.append(x.shape) or conv(x, *rest))
    # A size of its own, so that no other test has traced it: conv1, five forms of block (4b1 to 4b3 are one), three
    # of them with a projection, and the head's four.
    jax.eval_shape(lambda v: model.apply(v, jnp.zeros((1, 41, 57, 3)))[0], variables)
    projections = 1  # 4 to 6 channels; the others keep their width
    assert len(traced) == 1 + 5 * 2 + projections + 4


def test_interceptors_and_captures_see_every_layer():
    model = network()
    variables, x, seen = thin.variables(model), jnp.zeros((1, 33, 33, 3)), []

    def record(next_call, args, kwargs, context):
        if isinstance(context.module, layers.Conv):
            seen.append(context.module.name)
        return next_call(*args, **kwargs)

    model.apply(variables, x)  # has traced the blocks
    with nn.intercept_methods(record):
        jax.eval_shape(lambda v: model.apply(v, x)[0], variables)
    assert {"conv1", *(f"res4b{i}_branch2{c}" for i in (1, 2, 3) for c in "ab")} <= set(seen)
    _, kept = jax.eval_shape(lambda v: model.apply(v, x, capture_intermediates=True), variables)
    assert "res4b3_branch2b" in kept["intermediates"]["backbone"]


def test_a_parameter_of_another_shape_is_an_error():
    layer = layers.Conv(4)
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 5, 5, 2)))
    with pytest.raises(ScopeParamShapeError, match="kernel"):
        layer.apply(variables, jnp.zeros((1, 5, 5, 3)))
