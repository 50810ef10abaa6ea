"""The start-up time of commands: CPU seconds of `--help`, of `describe`, and to the first computation.

python -m experiments.bench_start [--repeats 3] [--first_step]

CPU seconds of the whole process and its children, the least of several runs: time used by other programs on the machine
is not counted, though they make caches colder. With --first_step also a process that ends after the first training step
of ResNet-101 with ASPP-L at one scale (batch 1, a batch in memory), from an empty and from a filled cache of compiled
programs.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import flags

from deeplab_jax import cli, startup

FLAGS = flags.FLAGS
COMMANDS = (
    "main", "predict", "refine", "describe", "convert_weights", "crf_search", "check_dataset", "export", "report",
    "serve",
)  # fmt: skip
# Everything before the first computation of `predict` and `refine` except the model and the photograph.
IMPORTS = {
    "predict, all imports": "import deeplab_jax.inference.load, deeplab_jax.inference.photographs",
    "refine, all imports": "import deeplab_jax.refinement.files",
}


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_integer("repeats", 3, "runs of each; the least counts", lower_bound=1)
    flags.DEFINE_string("config", "voc_aspp_l", "config for describe")
    flags.DEFINE_bool("first_step", False, "also the first training step; minutes")


def main(argv: Sequence[str]) -> None:
    """Prints a table."""
    del argv
    rows = {f"{name} --help": ["-m", f"deeplab_jax.{name}", "--help"] for name in COMMANDS}
    rows |= {name: ["-c", f"from deeplab_jax import startup; startup.set_xla_defaults(); {code}"]
             for name, code in IMPORTS.items()}  # fmt: skip
    rows[f"describe --config {FLAGS.config}"] = ["-m", "deeplab_jax.describe", f"--config={FLAGS.config}"]
    for what, arguments in rows.items():
        print(f"{what:32} {min(seconds(arguments)[0] for _ in range(FLAGS.repeats)):6.2f} s CPU", flush=True)
    if FLAGS.first_step:
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("empty", "filled"):
                cpu, wall = seconds(["-c", "from experiments.bench_start import first_step; first_step()"], cache)
                print(f"first step, {kind + ' cache':20} {cpu:6.2f} s CPU, {wall:.2f} s in all", flush=True)


def seconds(arguments: Sequence[str], cache: str = "off") -> tuple[float, float]:
    """CPU seconds, user and system, and seconds of one Python process with these arguments.

    Args:
      arguments: of Python.
      cache: folder for compiled programs, or "off".
    """
    began = time.perf_counter()
    environment = {**os.environ, "DEEPLAB_COMPILATION_CACHE": cache}
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - began


def first_step() -> None:
    """What `main` does to the end of its first step, apart from the workdir and the data."""
    startup.collect_rarely()
    startup.set_xla_defaults(training=True)
    startup.persistent_compilation_cache()
    import jax

    from deeplab_jax.config import load_config
    from deeplab_jax.training import setup
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step, replicate, to_devices
    from experiments.bench_train import random_batch

    overrides = ["model.scales=1.0,", "batch_size=1", "optimizer.accumulate=1", "model.allow_random_frozen=true"]
    config = load_config("voc_aspp_l", overrides)
    model, optimizer = setup.build_model(config, 21), create_optimizer(config)
    state = replicate(create_state(setup.initial_variables(config, model), config, optimizer))
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    _, metrics = step(state, to_devices(random_batch(1), 1))
    jax.block_until_ready(metrics)
    os._exit(0)  # giving back memory is no part of it


if __name__ == "__main__":
    define_flags()
    cli.run(main)
