import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from deeplab_jax.config import load_config
from deeplab_jax.crf.setting import setting_from_config
from deeplab_jax.models import create_model, initial
from deeplab_jax.training import setup
from deeplab_jax.weights import files, transfer
from deeplab_jax.weights.initial import settings_of

TINY = (
    "model.widths=4,4,6,6",
    "model.blocks=1,1,1,1",
    "model.head_width=4",
    "model.head_rates=2,4",
    "model.fine_branch=4",
)
CRF = ("crf.train=end_to_end", "crf.train_iterations=2", "crf.stride=8")
GOLDEN = (0.009927090, -0.0040491945, -0.0013798837)
KERNEL, CLASSIFIER = ("params", "backbone", "res2a_branch2a", "kernel"), ("params", "head", "fc1", "kernel")


def tiny(*overrides):
    config = load_config("camvid", (*TINY, *overrides))
    return config, create_model(config.model, 5, crf=config.crf)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.batch_norm=frozen", "model.remat=true"),
        ("crf.train=end_to_end", "crf.train_iterations=2", "crf.stride=8"),
    ],
)
def test_a_plan_has_the_variables_of_flax_own_initialization(overrides):
    _, model = tiny(*overrides)
    flax = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 33, 33, 3)))
    shapes = initial.shapes(initial.plan(model))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), flax)


def test_draws_have_the_initializers_distributions():
    model = create_model(load_config("voc_vgg16_largefov").model, 21)
    planned = flatten_dict(initial.plan(model))
    chosen = [("params", "backbone", name, "kernel") for name in ("conv1_1", "conv3_1")] + [
        ("params", "head", "fc8", "kernel")
    ]
    some = {path: planned[path] for path in chosen}
    drawn = flatten_dict(initial.draw(model, unflatten_dict(some), seed=3))
    # He et al., fan_out: 9 positions times the outputs; v1 section 5: the classifier's deviation is 0.01.
    for path, std in zip(chosen, (np.sqrt(2 / (9 * 64)), np.sqrt(2 / (9 * 256)), 0.01), strict=True):
        values = drawn[path]
        assert (values.shape, values.dtype) == (planned[path].shape, np.float32)
        assert values.std() == pytest.approx(std, rel=6 / np.sqrt(2 * values.size))
        assert abs(values.mean()) < 5 * std / np.sqrt(values.size)
        theirs = planned[path].initializer(jax.random.key(0), values.shape, jnp.float32)
        assert values.std() == pytest.approx(float(theirs.std()), rel=8 / np.sqrt(2 * values.size))
        assert 4 < np.abs(values).max() / std < 6 or values.size < 1e5  # not truncated


def test_constants_are_filled():
    _, model = tiny()
    drawn = flatten_dict(initial.draw(model, initial.plan(model), seed=0))
    expected = {"mean": 0, "var": 1, "scale": 1, "bias": 0}
    seen = set()
    for path, values in drawn.items():
        if path[-1] in expected:
            assert (values == expected[path[-1]]).all()
            seen.add(path[-1])
    assert seen == set(expected)


def test_numbers_depend_on_seed_and_name_alone():
    _, model = tiny()
    planned = initial.plan(model)
    drawn, again, other = (flatten_dict(initial.draw(model, planned, seed)) for seed in (0, 0, 1))
    for path, values in drawn.items():
        np.testing.assert_array_equal(values, again[path])
        assert path[-1] != "kernel" or (values != other[path]).all()
    alone = initial.draw(model, unflatten_dict({KERNEL: flatten_dict(planned)[KERNEL]}), 0)
    np.testing.assert_array_equal(flatten_dict(alone)[KERNEL], drawn[KERNEL])
    second = drawn[("params", "backbone", "res2a_branch2b", "kernel")]
    assert second.shape == drawn[KERNEL].shape and (second != drawn[KERNEL]).all()
    # The same on every machine: a run of several processes begins with one network.
    np.testing.assert_allclose(drawn[CLASSIFIER][0, 0, 0, :3], GOLDEN, rtol=1e-6)


def test_other_initializers_are_flax_own():
    config, model = tiny(*CRF)
    planned = initial.plan(model)
    assert planned["params"]["crf"]["compatibility"].initializer is None
    drawn = initial.draw(model, planned, config.seed)["params"]["crf"]
    assert float(drawn["bilateral_weight"]) == setting_from_config(config.crf).params.bilateral_weight
    np.testing.assert_array_equal(drawn["compatibility"], 1 - np.eye(5))


def test_flax_init_gives_plain_arrays_of_the_same_distribution():
    kernel = initial.Normal(0.5)(jax.random.key(1), (3, 3, 8, 64))
    np.testing.assert_array_equal(kernel, 0.5 * jax.random.normal(jax.random.key(1), (3, 3, 8, 64)))
    assert isinstance(initial.ONES(None, (2,)), jax.Array)


def test_weights_that_a_file_replaces_are_not_drawn(tmp_path, monkeypatch):
    config, model = tiny()
    start = initial.draw(model, initial.plan(model), seed=8)
    path = tmp_path / "w.safetensors"
    files.write(path, {transfer.full_name(p): v for p, v in flatten_dict(start).items()}, settings_of(config.model))
    config.init_from = str(path)
    monkeypatch.setattr(initial.Normal, "draw", None)
    monkeypatch.setattr(initial.Constant, "draw", None)
    jax.tree.map(np.testing.assert_array_equal, setup.initial_variables(config, model), start)
