"""The start-up time of commands: CPU seconds of `--help`, of `describe`, and to the first computation.

python -m experiments.bench_start [--repeats 3]

CPU seconds of the whole process and its children, the least of several runs: time used by other programs on the machine
is not counted, though they make caches colder.
"""

import os
import subprocess
import sys
from collections.abc import Sequence

from absl import flags

from deeplab_jax import cli

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


def main(argv: Sequence[str]) -> None:
    """Prints a table."""
    del argv
    rows = {f"{name} --help": ["-m", f"deeplab_jax.{name}", "--help"] for name in COMMANDS}
    rows |= {name: ["-c", f"from deeplab_jax import startup; startup.set_xla_defaults(); {code}"]
             for name, code in IMPORTS.items()}  # fmt: skip
    rows[f"describe --config {FLAGS.config}"] = ["-m", "deeplab_jax.describe", f"--config={FLAGS.config}"]
    for what, arguments in rows.items():
        print(f"{what:32} {min(cpu_seconds(arguments) for _ in range(FLAGS.repeats)):6.2f} s CPU", flush=True)


def cpu_seconds(arguments: Sequence[str]) -> float:
    """CPU seconds, user and system, of one Python process with these arguments."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"python {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    define_flags()
    cli.run(main)
