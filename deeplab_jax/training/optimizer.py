"""Momentum SGD as in the papers: schedules, per-group rates, decay masks, as one optax chain."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from deeplab_jax.errors import UserError
from deeplab_jax.models import is_classifier, is_frozen
from deeplab_jax.runs.schema import CHOICES

Path = tuple[str, ...]


def create_schedule(config) -> Callable[[jax.Array], jax.Array]:
    """The learning rate as a function of the step, from `config.optimizer` and `config.num_steps`.

    "poly": base * (1 - step / max) ** power (v2 section 4.1); "step": base * 0.1 ** (step // step_size) (v1 section
    5); "cosine", "constant". The first `warmup_steps` rise linearly.

    Raises:
      ValueError: an unknown schedule.
    """
    opt, total = config.optimizer, config.num_steps
    base = opt.learning_rate
    schedules = {
        "poly": lambda: optax.polynomial_schedule(base, 0.0, opt.poly_power, total),
        "step": lambda: optax.exponential_decay(base, opt.step_size, 0.1, staircase=True),
        "cosine": lambda: optax.cosine_decay_schedule(base, max(total, 1)),
        "constant": lambda: optax.constant_schedule(base),
    }
    if opt.schedule not in schedules:
        raise ValueError(f"config.optimizer.schedule={opt.schedule}: must be one of {', '.join(schedules)}")
    after = schedules[opt.schedule]()
    if not opt.warmup_steps:
        return after
    return lambda step: after(step) * jnp.minimum((step + 1) / opt.warmup_steps, 1.0)


def rate_multiplier(path: Path, config) -> float:
    """A parameter's multiple of the base rate: classifier 10x, its bias 20x, other biases 2x (v1 section 5)."""
    if path[0] == "crf":
        return config.crf.learning_rate_multiplier
    bias = path[-1] == "bias" and not is_norm(path)
    if is_classifier(path):
        return config.optimizer.classifier_multiplier * (2.0 if bias else 1.0)
    return config.optimizer.bias_multiplier if bias else 1.0


def decays(path: Path) -> bool:
    """Whether weight decay applies: to kernels only, not to biases, batch-norm affine or CRF parameters."""
    return path[-1] == "kernel" and path[0] != "crf"


def is_norm(path: Path) -> bool:
    """Whether a parameter belongs to a batch-norm layer (their names start with bn)."""
    return len(path) > 1 and path[-2].startswith("bn")


def split_params(params: dict, config) -> tuple[dict, dict]:
    """Splits a parameter tree into (trainable, frozen); frozen ones get neither gradients nor optimizer memory.

    Raises:
      UserError: everything is frozen.
    """
    flat = traverse_util.flatten_dict(params)
    frozen = {p: v for p, v in flat.items() if is_frozen(p, config.model)}
    if len(frozen) == len(flat):
        raise UserError(
            "config.model.freeze_network=True leaves nothing to learn; set --config.crf.train=end_to_end, so that the "
            "CRF on top of it learns, or --config.model.freeze_network=false"
        )
    trainable = {p: v for p, v in flat.items() if p not in frozen}
    return traverse_util.unflatten_dict(trainable), traverse_util.unflatten_dict(frozen)


def merge_params(trainable: dict, frozen: dict) -> dict:
    """The complete parameter tree; the inverse of `split_params`."""
    flat = traverse_util.flatten_dict(trainable) | traverse_util.flatten_dict(frozen)
    return traverse_util.unflatten_dict(flat)


def create_optimizer(config, schedule: Callable | None = None) -> optax.GradientTransformation:
    """Caffe's SGD: v <- momentum v + rate (g + decay w); w <- w - v.

    The rate is inside the momentum, as in Caffe: when it drops, the velocity is unchanged.

    Args:
      config: see configs/base.py.
      schedule: the result of `create_schedule`; None = created here.

    Raises:
      ValueError: an unknown `config.optimizer.name` or schedule.
    """
    opt = config.optimizer
    if opt.name not in CHOICES["optimizer.name"]:
        raise ValueError(f"config.optimizer.name={opt.name}: must be one of {', '.join(CHOICES['optimizer.name'])}")

    def scale_by_group(updates, params=None):
        del params
        return _map_with_path(lambda path, u: u * rate_multiplier(path, config), updates)

    group = optax.stateless(scale_by_group)
    decay = optax.add_decayed_weights(opt.weight_decay, mask=lambda p: _map_with_path(lambda path, _: decays(path), p))
    rate = optax.scale_by_schedule(schedule or create_schedule(config))
    if opt.name == "adamw":
        adam = _clipped(optax.scale_by_adam(b1=opt.momentum), opt.clip_norm)
        return optax.chain(adam, decay, group, rate, optax.scale(-1.0))
    momentum = optax.trace(decay=opt.momentum, nesterov=opt.nesterov)
    return optax.chain(_clipped(decay, opt.clip_norm), group, rate, momentum, optax.scale(-1.0))


def _clipped(first: optax.GradientTransformation, norm: float) -> optax.GradientTransformation:
    """`first` of gradients up to a global norm; 0 = any. Its state is `first`'s, so that a run can turn it on."""
    if not norm:
        return first
    clip = optax.clip_by_global_norm(norm)

    def update(updates, state, params=None):
        return first.update(clip.update(updates, optax.EmptyState())[0], state, params)

    return optax.GradientTransformation(first.init, update)


def at_step(opt_state: optax.OptState, step: jax.typing.ArrayLike) -> optax.OptState:
    """The optimizer's state with its schedule at `step`: steps that updated nothing count, as in the record."""

    def is_schedule(state: Any) -> bool:
        return isinstance(state, optax.ScaleByScheduleState)

    return jax.tree.map(
        lambda s: s._replace(count=jnp.asarray(step, s.count.dtype)) if is_schedule(s) else s,
        opt_state,
        is_leaf=is_schedule,
    )


def _map_with_path(fn, tree: dict) -> dict:
    return traverse_util.unflatten_dict({p: fn(p, v) for p, v in traverse_util.flatten_dict(tree).items()})
