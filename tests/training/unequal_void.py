"""The training step's gradient on two devices, one of which may hold nothing but void, against one without devices."""

import jax
import numpy as np
import optax

from deeplab_jax.config import load_config
from deeplab_jax.models import create_model, initial
from deeplab_jax.training import losses
from deeplab_jax.training.optimizer import merge_params, split_params
from deeplab_jax.training.state import create_state
from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard, unreplicate

OVERRIDES = (
    "batch_size=4", "model.widths=8,8,8,8", "model.blocks=1,1,1,1", "model.head_width=8", "crf.train=off",
    "model.batch_norm=frozen", "model.allow_random_frozen=true", "loss.at=scores", "optimizer.warmup_steps=0",
)  # fmt: skip


def compare(arguments: list[str]) -> None:
    """The work of a process with two devices: asserts that both weigh every position alike."""
    assert jax.device_count() == 2
    config = load_config("shapes", OVERRIDES)
    model = create_model(config.model, 7)
    variables = initial.draw(model, initial.plan(model), seed=0)
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (4, 33, 33, 3)).astype(np.uint8)
    label = rng.integers(0, 7, (4, 33, 33)).astype(np.uint8)
    label[0, :, 4:], label[2:] = 255, 255
    batch = {"image": image, "label": label, "valid": np.ones((4, 33, 33), bool), "index": np.arange(4, dtype=np.int32)}
    optimizer = optax.sgd(1.0)

    steps = {}

    def gradient(accumulate, batch):
        config.optimizer.accumulate = accumulate
        if accumulate not in steps:
            steps[accumulate] = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
        state = create_state(variables, config, optimizer)
        new, metrics = steps[accumulate](replicate(state), shard(batch, accumulate))
        change = jax.tree.map(lambda a, b: np.asarray(a) - b, state.trainable, unreplicate(new).trainable)
        return change, unreplicate(metrics)

    def reference(trainable):
        frozen = split_params(variables["params"], config)[1]
        full = {**variables, "params": merge_params(trainable, frozen)}
        logits, _ = model.apply(full, batch["image"], train=True, valid=batch["valid"])
        sums = losses.loss_sums({"s": jax.nn.log_softmax(logits)}, batch["label"], "scores")
        return sums["s"] / losses.valid_count(label[:, ::8, ::8])

    expected = jax.jit(jax.grad(reference))(split_params(variables["params"], config)[0])
    for accumulate in (1, 2):
        got, _ = gradient(accumulate, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-6), got, expected)
    got, metrics = gradient(1, dict(batch, label=np.full_like(label, 255)))
    assert not metrics["updated"] and metrics["loss"] == 0
    assert all(not np.any(x) for x in jax.tree.leaves(got))
