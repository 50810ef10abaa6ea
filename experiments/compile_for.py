"""Compiles this project's programs for a TPU or GPU that is not here, and says what came of it.

    python -m experiments.compile_for --target v5e:2x4 [--config voc_aspp_l] [--what crf.exact,network,step] [--json]

Targets: v5e:1x1, v5e:2x4, v5e:16x16, v5p:2x2x1, v6e:2x2, h100:1, h100:8, ... Nothing runs: memory, collectives and
operations are facts of the compiled program, times are estimates. What it needs is `pip install '.[aot]'`.

crf      10 iterations over a photograph of 500 x 375 with 21 labels; crf.exact, crf.separable, crf.permutohedral
network  scores of one photograph at --side, --config.model.dtype=bfloat16 for bfloat16
step     a training step on all devices of the target, at the config's crop and scales
pool     the gradient of ResNet's max pool alone
"""

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from deeplab_jax import cli, files
from deeplab_jax.console import say
from deeplab_jax.errors import UserError
from experiments.program_text import costs
from experiments.targets import Chip, chip_of, devices_of, installed, missing, prepare_environment

FLAGS = flags.FLAGS
FILTERS = ("separable", "permutohedral", "exact")
WHAT = ("crf", *(f"crf.{name}" for name in FILTERS), "network", "step", "pool")
PHOTOGRAPH, LABELS, ITERATIONS = (500, 375), 21, 10


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("target", "v5e:2x4", "chip and how many of them: v5e:2x4, v5p:2x2x1, v6e:2x2, h100:8")
    flags.DEFINE_string("config", "voc_aspp_l", "config file or shipped name; --config.field=value changes a field")
    flags.DEFINE_list("what", ["network", "step"], f"programs: {', '.join(WHAT)}")
    flags.DEFINE_integer("per_device", 1, "images per device in a step (over all micro-batches)", lower_bound=1)
    flags.DEFINE_integer("side", 513, "side of the network's photograph", lower_bound=33)
    flags.DEFINE_integer("classes", LABELS, "classes of network and step", lower_bound=2)
    flags.DEFINE_bool("json", False, "print JSON in place of the table")
    flags.DEFINE_string("text", None, "a folder into which the text of each compiled program is written")


def main(argv: Sequence[str]) -> None:
    """Prints the table."""
    del argv
    chip = chip_of(FLAGS.target)
    unknown = sorted(set(FLAGS.what) - set(WHAT))
    if unknown:
        raise UserError(f"--what={','.join(unknown)}: choose from {', '.join(WHAT)}")
    if not installed(chip.platform):
        raise UserError(f"--target={FLAGS.target}: needs its compiler; {missing(chip)}")
    config = cli.config_from_flags(FLAGS.config)
    devices = devices_of(FLAGS.target)
    what = [w for name in FLAGS.what for w in ([f"crf.{f}" for f in FILTERS] if name == "crf" else [name])]
    rows = []
    for n, name in enumerate(what):
        say(f"{n + 1} of {len(what)}: {name} for {FLAGS.target} ...")
        text = Path(FLAGS.text) / f"{FLAGS.target.replace(':', '_')}_{name}.txt" if FLAGS.text else None
        rows.append({"program": name, "target": FLAGS.target} | compiled(program(name, config, devices), chip, text))
        say(f"{name}: {rows[-1]['result']}, {rows[-1]['seconds']} s")
    print(json.dumps(rows, indent=1) if FLAGS.json else table(rows))
    if any(row["result"] != "compiled" for row in rows):
        sys.exit(1)


# ---- programs ------------------------------------------------------------------------------------------------------


def program(name: str, config: Any, devices: Sequence) -> Callable[[], Any]:
    """A function that lowers one of `WHAT` for the devices, and gives a `jax.stages.Lowered`."""
    if name.startswith("crf."):
        return functools.partial(lower_crf, name[4:], devices[0])
    if name == "network":
        return lambda: lower_network(config, FLAGS.classes, FLAGS.side, devices[0])
    if name == "pool":
        return lambda: lower_pool(devices[0])
    return lambda: lower_step(config, FLAGS.classes, FLAGS.per_device, devices)


def lower_crf(bilateral: str, device, size: tuple[int, int] = PHOTOGRAPH, iterations: int = ITERATIONS):
    """Mean field with one filter over one photograph."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.crf import PRESETS, mean_field

    preset = PRESETS["v2_resnet101"]

    def marginals(unary, image):
        return mean_field(
            unary, image, preset.params, iterations, bilateral=bilateral, normalization=preset.normalization
        )

    shapes = (jax.ShapeDtypeStruct((*size, LABELS), jnp.float32), jax.ShapeDtypeStruct((*size, 3), jnp.uint8))
    return _lower_on(device, marginals, *shapes)


def lower_network(config, classes: int, side: int, device):
    """The scores of one photograph, at the config's input scales and without CRF."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.models import create_model

    model = create_model(config.model, classes)
    image = jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return _lower_on(device, lambda v, x: model.apply(v, x)[0], variables, image)


def lower_pool(device):
    """The gradient of a max pool over 8 maps of 161 x 161 x 64, ResNet's at a crop of 321."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.models.layers import max_pool

    def gradient(x, dy):
        return jax.vjp(lambda x: max_pool(x, 3, 2, 1), x)[1](dy)

    x = jax.ShapeDtypeStruct((8, 161, 161, 64), jnp.float32)
    return _lower_on(device, gradient, x, jax.eval_shape(lambda x: max_pool(x, 3, 2, 1), x))


def lower_step(config, classes: int, per_device: int, devices: Sequence):
    """`training.step`'s own step, mapped over the devices."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.models import create_model
    from deeplab_jax.target import tracing_for
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step

    height, width = config.data.crop
    model, optimizer = create_model(config.model, classes, crf=config.crf), create_optimizer(config)
    # This one process stands for all hosts of the target: it has their rows, too.
    rows = (len(devices), config.optimizer.accumulate, per_device // config.optimizer.accumulate)

    def start(key):
        variables = model.init({"params": key, "dropout": key}, jnp.zeros((1, height, width, 3)))
        return create_state(variables, config, optimizer)

    with tracing_for(devices[0].platform):
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype), jax.eval_shape(start, jax.random.key(0))
        )
        batch = {
            "image": jax.ShapeDtypeStruct((*rows, height, width, 3), jnp.uint8),
            "label": jax.ShapeDtypeStruct((*rows, height, width), jnp.uint8),
            "valid": jax.ShapeDtypeStruct((*rows, height, width), jnp.bool_),
            "index": jax.ShapeDtypeStruct(rows, jnp.int32),
        }
        step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None, devices=devices)
        return step.lower(state, batch)


def _lower_on(device, function: Callable, *shapes):
    import jax

    from deeplab_jax.target import tracing_for

    on = jax.sharding.SingleDeviceSharding(device)
    with tracing_for(device.platform):
        return jax.jit(function, in_shardings=on, out_shardings=on).lower(*shapes)


# ---- results -------------------------------------------------------------------------------------------------------


def compiled(lower: Callable[[], Any], chip: Chip, text_file: Path | None = None) -> dict:
    """Compiles a program, counts, and writes its text to a file where one is named.

    Returns:
      `result` ("compiled", or the compiler's first line), `seconds` and, for one device: `cpu_seconds` (of lowering and
      compilation, all threads), `argument_bytes`, `temporary_bytes`, `peak_bytes`, `memory_share`, `costs`' counts,
      `estimate_ms` (see `estimate`).
    """
    began, worked = time.monotonic(), time.process_time()
    try:
        program = lower().compile()
    except Exception as e:  # whatever a compiler says is the result
        line = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        return {"result": line[:300], "seconds": round(time.monotonic() - began, 1)}
    seconds, cpu_seconds = round(time.monotonic() - began, 1), round(time.process_time() - worked, 1)
    text = program.as_text()
    if text_file is not None:
        files.write_atomically(text_file, lambda path: path.write_text(text))
    memory, counts = program.memory_analysis(), costs(text)
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    peak = getattr(memory, "peak_memory_in_bytes", 0) or whole - memory.alias_size_in_bytes
    return {
        "result": "compiled",
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "peak_bytes": peak,
        "memory_share": peak / chip.memory,
        **{name: int(value) for name, value in counts.items()},
        **estimate(counts, chip),
    }


def estimate(counts: dict[str, float], chip: Chip) -> dict[str, float]:
    """Milliseconds that a program takes at least: by products at the chip's peak, by bytes at its bandwidth.

    Without what is sent between devices, and without the launches of kernels. `cycles_ms` is what a TPU's compiler
    thinks; it prices no gather and no scatter.
    """
    highest, half = counts.get("flops_highest", 0), counts.get("flops_bfloat16", 0)
    plain = counts.get("flops", 0) - highest - half
    products = highest / chip.highest + half / chip.bfloat16 + plain / chip.default
    moved = counts.get("bytes", 0) / chip.bandwidth
    found = {"products_ms": 1e3 * products, "bytes_ms": 1e3 * moved, "estimate_ms": 1e3 * max(products, moved)}
    if chip.clock and counts.get("cycles"):
        found["cycles_ms"] = 1e3 * counts["cycles"] / chip.clock
    return found


COLUMNS = (
    ("program", "program", 1), ("compile s", "seconds", 1), ("CPU s", "cpu_seconds", 1),
    ("arguments MB", "argument_bytes", 1e6), ("temporaries MB", "temporary_bytes", 1e6), ("peak MB", "peak_bytes", 1e6),
    ("of memory %", "memory_share", 0.01), ("GFLOP", "flops", 1e9), ("GB moved", "bytes", 1e9),
    ("collectives", "collectives", 1), ("MB sent", "collective_bytes", 1e6), ("gathers", "gathers", 1),
    ("scatters", "scatters", 1), ("sorts", "sorts", 1), ("loop steps", "loop_steps", 1),
    ("loops of unknown length", "unknown_loops", 1), ("kernels", "kernels", 1), ("estimate ms", "estimate_ms", 1),
    ("cycles ms", "cycles_ms", 1),
)  # fmt: skip


def table(rows: Sequence[dict]) -> str:
    """The results as a Markdown table; below it, what did not compile."""
    lines = ["| " + " | ".join(head for head, _, _ in COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for row in rows:
        if row["result"] == "compiled":
            cells = [_cell(row.get(key, 0), unit) for _, key, unit in COLUMNS]
            lines.append("| " + " | ".join(cells) + " |")
    lines += [f"{row['program']}: {row['result']}" for row in rows if row["result"] != "compiled"]
    return "\n".join([*lines, "Times are estimates: nothing ran."])


def _cell(value: Any, unit: float) -> str:
    if isinstance(value, str):
        return value
    number = value / unit
    return f"{number:,.0f}" if number == int(number) or number >= 100 else f"{number:.3g}"


if __name__ == "__main__":
    prepare_environment()  # before anything imports JAX
    define_flags()
    cli.run(main)
