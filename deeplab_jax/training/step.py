"""The pmapped training step: the only place that maps over devices."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from deeplab_jax.training import losses
from deeplab_jax.training.optimizer import at_step, merge_params
from deeplab_jax.training.state import TrainState, update_ema

AXIS = "devices"
Batch = dict[str, jax.Array]


def create_train_step(
    model,
    config,
    optimizer: optax.GradientTransformation,
    class_weights: np.ndarray | None,
    devices: Sequence[jax.Device] | None = None,
) -> jax.stages.Wrapped:
    """Builds `step(state, batch) -> (state, metrics)`, mapped over this process's devices; the state is donated.

    Loss and gradient are global sums over the global number of valid positions: over devices, processes and
    micro-batches, so that the share of void on a device does not matter. If no position is valid, nothing changes. All
    randomness is keyed by seed, step and the example's index in the global batch.

    `devices` are other devices to map over, those of a topology for which to compile (`experiments.compile_for`).

    The batch has leading axes [devices, micro-batches, examples]: image [.., H, W, 3] uint8, label [.., H, W] uint8,
    valid [.., H, W] bool, index [..] int32. Metrics are scalars per device, equal on all: `loss`, `loss_<map>`,
    `gradient_norm`, `valid_positions`, `updated`, and `finite` [number of trainable leaves] bool: whether
    loss, gradient, updated parameter and batch norm's statistics are.
    """
    weights = None if class_weights is None else jnp.asarray(class_weights, jnp.float32)
    seed_key = jax.random.key(config.seed)
    unary_weight, resize = config.loss.unary_weight, model.architecture.resize
    fixed = model.architecture.frozen_batch_norm  # its statistics stay as they are

    def score_maps(params, batch_stats, micro, step):
        keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(seed_key, step), i))(micro["index"])
        variables = {"params": params, "batch_stats": batch_stats}
        (logits, out), updates = model.apply(
            variables, micro["image"], train=True, valid=micro["valid"], dropout_keys=keys, mutable=["batch_stats"]
        )
        return losses.named_score_maps(logits, out), updates.get("batch_stats", batch_stats)

    def step_fn(state: TrainState, batch: Batch):
        first = jax.tree.map(lambda x: x[0], batch)
        shapes, _ = jax.eval_shape(
            score_maps, merge_params(state.trainable, state.frozen), state.batch_stats, first, state.step
        )
        labels = batch["label"].reshape(-1, *batch["label"].shape[2:])
        here = [
            losses.valid_count(losses.labels_for(name, labels, shape.shape[1:3], config.loss.at, resize))
            for name, shape in shapes.items()
        ]
        # Devices meet twice, apart from batch norm's statistics: for these few numbers, which the gradients are scaled
        # by and which wait for nothing but labels, and for the gradients with the losses.
        counts = dict(zip(shapes, lax.psum(jnp.stack(here), AXIS), strict=True))
        # With a CRF after them the network's scores keep their own loss, weighted by `unary_weight`.
        scale = {
            name: (unary_weight if "crf" in shapes and name != "crf" else 1.0) / jnp.maximum(count, 1.0)
            for name, count in counts.items()
        }

        def loss_fn(trainable, batch_stats, micro):
            params = merge_params(trainable, state.frozen)
            maps, batch_stats = score_maps(params, batch_stats, micro, state.step)
            weigh_crf = config.loss.crf_class_weights
            sums = losses.loss_sums(maps, micro["label"], config.loss.at, weights, weigh_crf, resize)
            terms = {name: sums[name] * scale[name] for name in sums}
            return sum(terms.values()), (terms, batch_stats)

        def micro_step(carry, micro):
            gradient, terms, batch_stats = carry
            (_, (new_terms, batch_stats)), g = jax.value_and_grad(loss_fn, has_aux=True)(
                state.trainable, batch_stats, micro
            )
            return (jax.tree.map(jnp.add, gradient, g), jax.tree.map(jnp.add, terms, new_terms), batch_stats), None

        if config.optimizer.accumulate == 1:
            (_, (terms, batch_stats)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(
                state.trainable, state.batch_stats, first
            )
        else:
            zero = (
                jax.tree.map(jnp.zeros_like, state.trainable),
                {name: jnp.zeros(()) for name in shapes},
                state.batch_stats,
            )
            (gradient, terms, batch_stats), _ = lax.scan(micro_step, zero, batch)
        gradient, terms = lax.psum((gradient, terms), AXIS)

        updates, opt_state = optimizer.update(gradient, at_step(state.opt_state, state.step), state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        loss = sum(terms.values())
        valid = max(counts.values()) if len(counts) == 1 else jnp.max(jnp.stack(list(counts.values())))
        ema = state.ema
        if config.optimizer.ema:
            ema = update_ema(state.ema, trainable, batch_stats, state.step, config.optimizer.ema)
        # Finite gradients can still overflow in the update of the parameters. If nothing is valid, nothing is updated.
        squares = squared_norms(gradient)
        finite = finite_leaves(squares, trainable, {} if fixed else batch_stats) & jnp.isfinite(loss) | (valid == 0)
        # Known before the update, so that the choice is part of it. Only on request does the choice wait for the result
        # of the update, which takes another pass over the whole state.
        updated = valid > 0
        if config.optimizer.skip_nonfinite:
            updated &= jnp.all(finite)
        old = (state.trainable, state.opt_state, state.batch_stats, state.ema)
        trainable, opt_state, batch_stats, ema = jax.tree.map(
            lambda new, before: jnp.where(updated, new, before), (trainable, opt_state, batch_stats, ema), old
        )
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            trainable=trainable,
            opt_state=opt_state,
            batch_stats=batch_stats,
            ema=ema,
            skipped=state.skipped + (~updated & (valid > 0)),
        )
        metrics = {
            "loss": loss,
            "gradient_norm": jnp.sqrt(sum(jax.tree.leaves(squares))),
            "valid_positions": valid,
            "updated": updated,
            "finite": finite,
        }
        return state, metrics | {f"loss_{name}": term for name, term in terms.items()}

    return jax.pmap(step_fn, axis_name=AXIS, donate_argnums=(0,), devices=devices)


def squared_norms(gradient: dict) -> dict:
    """The sum of squares of each leaf, float32 []: the parts of the norm, not finite if the leaf is not."""
    return jax.tree.map(lambda g: jnp.sum(jnp.square(g)), gradient)


def finite_leaves(gradient: dict, trainable: dict, batch_stats: dict) -> jax.Array:
    """Whether each parameter and its gradient are finite, and with them all statistics of batch norm.

    Args:
      gradient, trainable: of the same structure, one leaf for each parameter; for the gradient, `squared_norms`
        suffice, which are computed anyway: one pass instead of two.
      batch_stats: statistics that this step has changed; they count for every parameter.

    Returns:
      [leaves of `gradient`] bool.
    """
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(trainable), strict=True)
    each = jnp.stack([_is_finite(g) & _is_finite(p) for g, p in pairs])
    for leaf in jax.tree.leaves(batch_stats):
        each &= _is_finite(leaf)
    return each


def _is_finite(leaf: jax.Array) -> jax.Array:
    return jnp.all(jnp.isfinite(leaf))


def replicate(state: TrainState) -> TrainState:
    """Puts one copy of a host state on each local device (a leading axis of devices)."""
    devices = jax.local_devices()
    like = _copies()(np.zeros(len(devices), np.int32))  # a program that returned the state would have to be compiled

    def put(leaf: np.ndarray) -> jax.Array:
        one = np.asarray(leaf)[None]
        copies = [jax.device_put(one, device, may_alias=False) for device in devices]  # the step overwrites them
        return jax.make_array_from_single_device_arrays((like.shape[0], *one.shape[1:]), like.sharding, copies)

    return jax.tree.map(put, state)


def unreplicate(tree):
    """The first device's copy as numpy arrays on the host."""
    return jax.tree.map(lambda x: np.asarray(x.addressable_shards[0].data)[0], tree)


@functools.cache
def _copies():
    return jax.pmap(lambda batch: batch, axis_name=AXIS)


def to_devices(batch: dict[str, np.ndarray], accumulate: int) -> Batch:
    """Starts copying this process's rows [b, ...] to its devices, in the form that the step expects; does not wait."""
    return _copies()(shard(batch, accumulate))


def shard(batch: dict[str, np.ndarray], accumulate: int) -> dict[str, np.ndarray]:
    """Reshapes this process's rows [b, ...] to [devices, micro-batches, examples, ...].

    Raises:
      ValueError: b is not divisible by devices x micro-batches.
    """
    devices = jax.local_device_count()

    def reshape(x: np.ndarray) -> np.ndarray:
        per = x.shape[0] // (devices * accumulate)
        return x.reshape(accumulate, devices, per, *x.shape[1:]).swapaxes(0, 1)

    return {name: reshape(x) for name, x in batch.items()}
