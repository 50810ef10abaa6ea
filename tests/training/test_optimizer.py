"""Schedules, groups and updates against the papers' tables and Caffe's formula."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from deeplab_jax.runs.flat import flatten_state, unflatten_state
from deeplab_jax.runs.schema import CHOICES
from deeplab_jax.training.optimizer import (
    at_step,
    create_optimizer,
    create_schedule,
    decays,
    merge_params,
    rate_multiplier,
    split_params,
)
from deeplab_jax.training.state import create_state


def test_poly_table_of_the_second_paper():
    config = load_config("voc_aspp_l")
    rate = create_schedule(config)
    table = {0: 2.5e-4, 5_000: 1.92972e-4, 10_000: 1.33972e-4, 15_000: 7.17940e-5, 19_999: 3.36557e-8, 20_000: 0.0}
    for step, expected in table.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_step_table_of_the_first_paper():
    rate = create_schedule(load_config("voc_vgg16_largefov"))
    table = {0: 1e-3, 1_999: 1e-3, 2_000: 1e-4, 3_999: 1e-4, 4_000: 1e-5, 5_999: 1e-5}
    for step, expected in table.items():
        assert float(rate(step)) == pytest.approx(expected, rel=1e-5)


def test_warmup_rises_linearly():
    config = load_config("base", ["optimizer.schedule=constant", "optimizer.warmup_steps=4"])
    rate = create_schedule(config)
    np.testing.assert_allclose([float(rate(s)) / 2.5e-4 for s in range(6)], [0.25, 0.5, 0.75, 1, 1, 1], rtol=1e-6)


def test_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"config\.optimizer\.schedule=polly"):
        create_schedule(load_config("base", ["optimizer.schedule=polly"]))


@pytest.mark.parametrize("schedule", CHOICES["optimizer.schedule"])
@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_every_choice_is_an_optimizer(schedule, name):
    config = load_config("base", [f"optimizer.schedule={schedule}", f"optimizer.name={name}"])
    assert float(create_schedule(config)(0)) == pytest.approx(2.5e-4)
    assert create_optimizer(config).init({"head": {"fc1": {"bias": jnp.ones(2)}}})


@pytest.mark.parametrize(
    ("path", "multiplier", "decayed"),
    [
        (("backbone", "conv1_1", "kernel"), 1, True),
        (("backbone", "conv1_1", "bias"), 2, False),
        (("head", "fc8", "kernel"), 10, True),
        (("head", "fc8", "bias"), 20, False),
        (("head", "fc1_c2", "kernel"), 10, True),
        (("head", "fc1_c2", "bias"), 20, False),
        (("head", "fc6", "kernel"), 1, True),
        (("backbone", "bn_conv1", "bias"), 1, False),
        (("crf", "compatibility"), 1, False),
    ],
)
def test_groups_of_the_papers(path, multiplier, decayed):
    config = load_config("base")
    assert rate_multiplier(path, config) == multiplier
    assert decays(path) is decayed


def test_updates_are_caffes():
    config = load_config("base", ["optimizer.schedule=step", "optimizer.step_size=2", "optimizer.learning_rate=0.1"])
    optimizer = create_optimizer(config)
    params = {"backbone": {"conv1": {"kernel": jnp.array([1.0, -2.0])}}, "head": {"fc1": {"bias": jnp.array([0.5])}}}
    state = optimizer.init(params)
    weight, bias = np.array([1.0, -2.0]), np.array([0.5])
    v_weight, v_bias = np.zeros(2), np.zeros(1)
    for step in range(4):
        gradient = jax.tree.map(lambda p, s=step: jnp.sin(p + s), params)
        rate = 0.1 * 0.1 ** (step // 2)
        v_weight = 0.9 * v_weight + rate * (np.sin(weight + step) + 5e-4 * weight)
        v_bias = 0.9 * v_bias + 20 * rate * np.sin(bias + step)
        weight, bias = weight - v_weight, bias - v_bias
        updates, state = optimizer.update(gradient, state, params)
        params = jax.tree.map(jnp.add, params, updates)
    np.testing.assert_allclose(params["backbone"]["conv1"]["kernel"], weight, rtol=1e-5)
    np.testing.assert_allclose(params["head"]["fc1"]["bias"], bias, rtol=1e-5)


def test_frozen_parts_take_no_optimizer_memory():
    config = load_config("base")
    params = {
        "backbone": {"conv1": {"kernel": jnp.ones((7, 7, 3, 64))}, "bn_conv1": {"scale": jnp.ones(64)}},
        "head": {"fc1_c0": {"kernel": jnp.ones((3, 3, 4, 21))}},
    }
    trainable, frozen = split_params(params, config)
    assert set(traverse_util.flatten_dict(frozen)) == {("backbone", "bn_conv1", "scale")}
    state = create_optimizer(config).init(trainable)
    learned = sum(x.size for x in jax.tree.leaves(trainable))
    assert sum(x.size for x in jax.tree.leaves(state)) == learned + 1  # the momentum, and the step
    assert jax.tree.structure(merge_params(trainable, frozen)) == jax.tree.structure(params)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_state_begins_with_the_optimizers_own_memory(name):
    config = load_config("base", [f"optimizer.name={name}", "optimizer.ema=0.9"])
    params = {"head": {"fc1_c0": {"kernel": np.ones((3, 3, 4, 21), np.float32)}}}
    optimizer = create_optimizer(config)
    state = create_state({"params": params}, config, optimizer)
    expected = optimizer.init(params)
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(state.opt_state), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(state.ema["trainable"]["head"]["fc1_c0"]["kernel"], 1)


def test_a_frozen_network_leaves_the_crf_to_learn():
    config = load_config("base", ["model.freeze_network=True"])
    network = {"backbone": {"conv1": {"kernel": jnp.ones(3)}}, "head": {"fc1": {"bias": jnp.ones(2)}}}
    trainable, frozen = split_params({**network, "crf": {"bilateral_weight": jnp.ones(())}}, config)
    assert set(trainable) == {"crf"} and set(frozen) == {"backbone", "head"}
    with pytest.raises(UserError, match="freeze_network=True leaves nothing to learn"):
        split_params(network, config)


@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_a_step_that_updates_nothing_counts_for_the_schedule(name):
    """The record states the rate of the step's number; steps without a valid label must not put the schedule off."""
    config = load_config("base", [f"optimizer.name={name}", "num_steps=10", "optimizer.schedule=poly"])
    schedule = create_schedule(config)
    optimizer = create_optimizer(config, schedule)
    params = {"head": {"fc1": {"bias": jnp.ones(2)}}}
    state = optimizer.init(params)
    at_four = at_step(state, jnp.int32(4))
    counted = [s for s in jax.tree.leaves(at_four, is_leaf=_is_schedule) if _is_schedule(s)]
    assert len(counted) == 1 and int(counted[0].count) == 4
    assert jax.tree.structure(at_four) == jax.tree.structure(state)
    first, _ = optimizer.update(params, state, params)
    later, after = optimizer.update(params, at_four, params)
    ratio = later["head"]["fc1"]["bias"] / first["head"]["fc1"]["bias"]
    np.testing.assert_allclose(ratio, float(schedule(4)) / float(schedule(0)), rtol=1e-5)
    assert [int(s.count) for s in jax.tree.leaves(after, is_leaf=_is_schedule) if _is_schedule(s)] == [5]


def _is_schedule(state) -> bool:
    return isinstance(state, optax.ScaleByScheduleState)


@pytest.mark.parametrize("name", CHOICES["optimizer.name"])
def test_a_run_can_begin_to_clip(name):
    """A stop because of values that are not finite advises it. Runs that clipped from the beginning go on, too."""
    config = load_config("voc_aspp_l")
    config.optimizer.name = name
    params = {"head": {"fc1": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}}
    before = {"opt_state": create_optimizer(config).init(params)}
    flat = flatten_state(before)
    config.optimizer.clip_norm = 1.0
    clipping = create_optimizer(config)
    after = unflatten_state({"opt_state": clipping.init(params)}, flat)
    updates, _ = clipping.update(jax.tree.map(lambda p: 1e6 * p, params), after["opt_state"], params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    old = {re.sub(r"^opt_state\.(\d+)", lambda m: f"opt_state.{int(m[1]) + 1}", k): v for k, v in flat.items()}
    assert old.keys() != flat.keys()
    jax.tree.map(np.testing.assert_array_equal, unflatten_state(before, old), before)
    config.optimizer.name = "adamw" if name == "sgd" else "sgd"
    with pytest.raises(UserError, match="the checkpoint is of another optimizer: it"):
        unflatten_state({"opt_state": create_optimizer(config).init(params)}, flat)
