"""Does the input pipeline limit training? Steps per second with the real batches over steps with one batch in memory.

python -m experiments.bench_feeding --config camvid --config.data.dir=PATH/camvid
"""

import statistics
import time
from collections.abc import Sequence

from absl import flags

from deeplab_jax import cli

FLAGS = flags.FLAGS
flags.DEFINE_string("config", "camvid", "a config file or the name of a shipped config")
flags.DEFINE_integer("steps", 10, "steps per round", lower_bound=2)
flags.DEFINE_integer("rounds", 6, "interleaved rounds of each kind", lower_bound=1)
flags.DEFINE_bool("pipeline_only", False, "measure only the images per second of the pipeline")


def main(argv: Sequence[str]) -> None:
    """Prints the two rates, their ratio, the pipeline's own rate and the size of the decoded cache."""
    del argv
    config = cli.config_from_flags(FLAGS.config)
    import jax

    from deeplab_jax import data

    dataset = data.open_dataset(config.data, config.data.train_split, config.seed)
    for i in range(len(dataset)):  # fills the cache: training sees the second and later epochs
        dataset[i]
    batches = data.train_batches(dataset, config, first_step=0)
    images = 20 * config.batch_size
    start, cpu = time.perf_counter(), time.thread_time()
    for n in range(images):
        batches.example(*divmod(n, config.batch_size))
    wall, cpu = time.perf_counter() - start, time.thread_time() - cpu
    print(f"pipeline, one thread: {images / wall:.0f} images/s, {1000 * cpu / images:.1f} ms of CPU each")
    print(f"decoded cache: {dataset.cached_bytes / 2**20:.0f} MiB for {len(dataset)} images")
    if FLAGS.pipeline_only:
        return
    step = _step(config, dataset)
    fixed = next(batches)
    jax.block_until_ready(step(fixed))
    rates: dict[str, list[float]] = {"real": [], "fixed": []}
    for _ in range(FLAGS.rounds):
        for kind in rates:
            start = time.perf_counter()
            for _ in range(FLAGS.steps):
                jax.block_until_ready(step(next(batches) if kind == "real" else fixed))
            rates[kind].append(FLAGS.steps / (time.perf_counter() - start))
    real, fixed_rate = (statistics.median(rates[kind]) for kind in ("real", "fixed"))
    ratio = statistics.median(r / f for r, f in zip(rates["real"], rates["fixed"]))
    print(f"steps/s: {real:.3f} with real batches, {fixed_rate:.3f} with a fixed one; ratio {ratio:.3f}")
    batches.close()


def _step(config, dataset):
    """A forward and backward pass of the config's network, without the CRF, with which feeding must keep up."""
    import jax
    import jax.numpy as jnp
    import optax

    from deeplab_jax.models import create_model

    model = create_model(config.model, dataset.num_classes)
    variables = model.init(jax.random.key(0), jnp.zeros((1, *config.data.crop, 3)))
    state = {k: v for k, v in variables.items() if k != "params"}

    @jax.jit
    def gradient(params, batch):
        def loss(params):
            (scores, _), _ = model.apply(
                {"params": params, **state}, batch["image"], train=True, valid=batch["valid"],
                mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)},
            )  # fmt: skip
            h, w = scores.shape[1:3]
            label = jax.image.resize(batch["label"], (len(scores), h, w), "nearest").astype(jnp.int32)
            known = label != 255
            each = optax.softmax_cross_entropy_with_integer_labels(scores, jnp.where(known, label, 0))
            return (each * known).sum() / jnp.maximum(known.sum(), 1)

        return jax.grad(loss)(params)

    return lambda batch: gradient(variables["params"], batch)


if __name__ == "__main__":
    cli.run(main)
