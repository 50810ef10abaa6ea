"""Where a training step's time goes: a trace of some steps, summed by operation.

    python -m experiments.profile_step [--crf] [--steps 3] [--top 30] [--out runs/profile]

ResNet-101 with ASPP-L, 321 x 321, batch 1. Writes `perfetto_trace.json.gz` under --out for ui.perfetto.dev.
"""

import collections
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
from absl import flags

from deeplab_jax import cli
from experiments.bench_train import training_step

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_bool("crf", False, "with the CRF end to end")
    flags.DEFINE_integer("steps", 3, "steps to trace", lower_bound=1)
    flags.DEFINE_integer("top", 30, "operations to show", lower_bound=1)
    flags.DEFINE_string("out", "runs/profile", "folder for the trace")


def main(argv: Sequence[str]) -> None:
    """Prints milliseconds per step by kind of operation and for the slowest operations."""
    del argv
    run = training_step(1, crf=FLAGS.crf)
    run()
    with jax.profiler.trace(FLAGS.out, create_perfetto_trace=True):
        for _ in range(FLAGS.steps):
            run()
    newest = max(Path(FLAGS.out).rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    spent, calls = collections.Counter(), collections.Counter()
    kinds = collections.Counter()
    for name, milliseconds in operations(newest):
        spent[name] += milliseconds / FLAGS.steps
        calls[name] += 1 / FLAGS.steps
        kinds[re.sub(r"[.\d]+$", "", name)] += milliseconds / FLAGS.steps
    for title, counter in (("kind", kinds), ("operation", spent)):
        print(f"\n{title:60} {'ms/step':>10} {'calls':>7}")
        for name, milliseconds in counter.most_common(FLAGS.top):
            print(f"{name[:60]:60} {milliseconds:10.1f} {calls[name] or '':>7}")


def operations(trace: Path) -> Iterator[tuple[str, float]]:
    """(name of the compiled operation, milliseconds) of each event of the trace that is an operation."""
    with gzip.open(trace, "rt") as f:
        events = json.load(f)["traceEvents"]
    for event in events:
        name = (event.get("args") or {}).get("hlo_op")
        if event.get("ph") == "X" and name:
            yield name, event["dur"] / 1000


if __name__ == "__main__":
    define_flags()
    cli.run(main)
