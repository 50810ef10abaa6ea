"""The state of a run between two steps."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax

from deeplab_jax.training.optimizer import merge_params, split_params


@flax.struct.dataclass
class TrainState:
    """One step's state. Leaves are float32 arrays; on devices each has a leading axis of local devices.

    Attributes:
      step: int32 scalar, the number of steps done.
      trainable: parameters that learn (network and CRF), nested by layer name.
      frozen: parameters that do not: no gradient, no optimizer memory.
      batch_stats: batch-norm means and variances.
      opt_state: optax state over `trainable`.
      ema: {"trainable", "batch_stats"} averaged over steps, or {} if `config.optimizer.ema` is 0.
      skipped: int32 scalar, steps skipped for a non-finite gradient.
    """

    step: jax.Array | np.ndarray
    trainable: dict
    frozen: dict
    batch_stats: dict
    opt_state: optax.OptState
    ema: dict
    skipped: jax.Array | np.ndarray

    def variables(self) -> dict:
        """Flax variables for `model.apply`: the averaged ones if there are any."""
        source = self.ema or {"trainable": self.trainable, "batch_stats": self.batch_stats}
        variables = {"params": merge_params(source["trainable"], self.frozen)}
        if source["batch_stats"]:
            variables["batch_stats"] = source["batch_stats"]
        return variables


def create_state(variables: dict, config, optimizer: optax.GradientTransformation) -> TrainState:
    """The state of step 0 from initialized (or imported) Flax variables, on the host.

    The memory of optax's optimizers begins with zeros; NumPy's need no program for each shape.
    """
    trainable, frozen = split_params(variables["params"], config)
    batch_stats = variables.get("batch_stats", {})
    averaged = {"trainable": trainable, "batch_stats": batch_stats} if config.optimizer.ema else {}
    return TrainState(
        step=np.zeros((), np.int32),
        trainable=trainable,
        frozen=frozen,
        batch_stats=batch_stats,
        opt_state=jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(optimizer.init, trainable)),
        ema=averaged,
        skipped=np.zeros((), np.int32),
    )


def update_ema(ema: dict, trainable: dict, batch_stats: dict, step: jax.Array | np.ndarray, decay: float) -> dict:
    """Moves the averages towards the new values; early steps use a shorter memory, (1 + t) / (10 + t)."""
    kept = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    new = {"trainable": trainable, "batch_stats": batch_stats}
    return jax.tree.map(lambda a, b: a + (1 - kept) * (b - a), ema, new)
