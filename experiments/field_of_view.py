"""v1 Table 2: kernel, rate, receptive field, parameters, mean IoU and training speed of four first FC layers.

  python -m experiments.field_of_view --steps 10                                        the published crops and batches
  python -m experiments.field_of_view --steps 5 --config camvid --config.batch_size=1 --config.data.crop=129,161
  python -m experiments.field_of_view --rows all --config.data.dir=VOC --config.init_from=WEIGHTS

Receptive fields and parameters are computed. --steps times this many training steps of each system, on noise, without
the input pipeline. --rows trains and evaluates systems for their mean IoU. With --config, data, crop, batch and
schedule are that config's, and the network is the row's.
"""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from deeplab_jax import cli
from deeplab_jax.config import load_config
from deeplab_jax.describe import classes_of
from deeplab_jax.models import architecture_of, vgg
from deeplab_jax.models.backbones import BACKBONES
from deeplab_jax.models.heads import FC_WIDTH
from deeplab_jax.models.summary import describe
from experiments import common

FLAGS = flags.FLAGS

# Name, shipped config; from v1 Table 2: kernel, input stride (rate), receptive field with zero padding, parameters,
# mean IoU on VOC's validation set after the CRF, images/s in training on a Titan GPU; and from v1 section 3.2 the
# receptive field in convolutional mode.
PAPER = (
    ("DeepLab-CRF-7x7", "voc_vgg16_7x7", 7, 4, 224, "134.3M", 67.64, 1.44, 404),
    ("DeepLab-CRF", "voc_vgg16", 4, 4, 128, "65.1M", 63.74, 2.90, 308),
    ("DeepLab-CRF-4x4", "voc_vgg16_4x4", 4, 8, 224, "65.1M", 67.14, 2.90, None),
    ("DeepLab-CRF-LargeFOV", "voc_vgg16_largefov", 3, 12, 224, "20.5M", 67.64, 4.84, None),
)

COLUMNS = (
    "system", "kernel", "rate", "paper: receptive field, zero-padded", "paper: convolutional", "ours: convolutional",
    "paper: parameters", "ours: parameters", "paper, VOC: mean IoU", "ours, {data}: mean IoU", "paper: images/s",
    "ours: images/s",
)  # fmt: skip


def thin_vgg16(width_multiplier: float) -> str:
    """The name of a backbone, VGG-16 with this fraction of its published channels, which trains on a CPU."""
    name = f"vgg16_times_{width_multiplier:g}"
    widths = tuple(max(1, round(width * width_multiplier)) for width in vgg.WIDTHS)
    BACKBONES[name] = dataclasses.replace(
        vgg.BACKBONE, trunk=lambda architecture, axis_name: vgg.VGG16(architecture, widths, name="backbone")
    )
    return name


def with_network(config: ConfigDict, shipped: str, width_multiplier: float = 1.0) -> ConfigDict:
    """A copy of the config with the network of a shipped one, at that fraction of its channels.

    Crops grow by a pixel if the network's pools need sides of 8 k + 2 instead of 8 k + 1.
    """
    config = common.changed(config, {"crf.train": "off"})
    config.model = load_config(shipped).model
    if width_multiplier != 1:
        config.model.backbone = thin_vgg16(width_multiplier)
        published = config.model.head_width or FC_WIDTH[config.model.head]
        config.model.head_width = max(1, round(published * width_multiplier))
    extra = architecture_of(config.model).size_extra

    def fitting(crop: tuple[int, ...]) -> tuple[int, ...]:
        return tuple((n - 1) // 8 * 8 + extra for n in crop)

    config.data.crop = fitting(config.data.crop)
    config.data.stages = tuple((share, fitting(crop), scales) for share, crop, scales in config.data.stages)
    return config


def images_per_second(config: ConfigDict, num_classes: int, steps: int) -> float:
    """Training speed on noise: the median of this many steps, after one that compiles."""
    import jax

    from deeplab_jax.training import setup
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard

    config = common.changed(config, {"init_from": ""})
    model, optimizer = setup.build_model(config, num_classes), create_optimizer(config)
    state = replicate(create_state(setup.initial_variables(config, model), config, optimizer))
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    rng, shape = np.random.default_rng(0), (config.batch_size, *config.data.crop)
    batch = {
        "image": rng.integers(0, 256, (*shape, 3), np.uint8),
        "label": rng.integers(0, num_classes, shape).astype(np.uint8),
        "valid": np.ones(shape, bool),
        "index": np.arange(config.batch_size, dtype=np.int32),
    }
    batch = shard(batch, config.optimizer.accumulate)
    seconds = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])
        seconds.append(time.perf_counter() - start)
    return config.batch_size / statistics.median(seconds[1:])


def table(configs: Sequence[ConfigDict], speeds: Sequence[float | None], found: Sequence, data: str) -> common.Table:
    """The paper's table with ours beside it."""
    rows = []
    for (name, _, kernel, rate, padded, params, iou, speed, field), config, ours, results in zip(
        PAPER, configs, speeds, found, strict=True
    ):
        built = describe(config, classes_of(config))
        after = common.mean_iou(common.at_iterations(results, -1))
        rows.append(
            (name, f"{kernel}x{kernel}", rate, padded, field, built["receptive_field"], params, built["parameters"],
             iou, after, speed, ours)
        )  # fmt: skip
    columns = [c.format(data=data) for c in COLUMNS]
    notes = [
        f"{classes_of(configs[0])} classes. The zero-padded receptive field is the crop that one output covers in "
        "classification; the convolutional one is computed from kernels, strides and rates.",
    ]
    if any(speeds):
        import jax

        one = configs[-1]
        notes.append(
            f"Images/s: paper on a Titan GPU at 306 or 321 pixels; ours on {jax.devices()[0].device_kind} "
            f"({jax.device_count()} device), batch {one.batch_size}, crop {one.data.crop[0]}x{one.data.crop[1]}: "
            "compare ratios within a column."
        )
    return common.Table("Field of view (v1 Table 2)", columns, rows, notes)


def plot(speeds: Sequence[float | None], found: Sequence, parameters: Sequence[int], data: str):
    """Training speed relative to the 7x7 system, and mean IoU after the CRF, the paper's and ours, as available."""
    ious = [common.mean_iou(common.at_iterations(results, -1)) for results in found]
    panels = [("training speed, 7x7 = 1", [row[7] / PAPER[0][7] for row in PAPER], "paper, Titan GPU", "ours")]
    if all(speeds):
        panels[0] += ([s / speeds[0] for s in speeds],)
    if all(v is not None for v in ious):
        panels.append(("mean IoU with CRF [%]", [row[6] for row in PAPER], "paper, VOC", f"ours, {data}", ious))
        panels = panels if all(speeds) else panels[1:]
    names = [f"{row[0].removeprefix('DeepLab-CRF-')}\n{p / 1e6:.1f}M" for row, p in zip(PAPER, parameters)]
    figure = common.new_figure(6 * len(panels), 3.8)
    for number, (measure, papers, theirs, label, *ours) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), number)
        axes.plot(range(len(PAPER)), papers, "o--", label=theirs)
        for values in ours:
            axes.plot(range(len(PAPER)), values, "s-", label=label)
        axes.set_xticks(range(len(PAPER)), names, fontsize=8)
        axes.set_ylabel(measure)
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def main(argv: Sequence[str]) -> None:
    del argv
    out = Path(FLAGS.out)
    if FLAGS.config:
        base = common.load_config()
        configs = [with_network(base, row[1], FLAGS.width_multiplier) for row in PAPER]
    else:
        configs = [with_network(cli.config_from_flags(row[1]), row[1], FLAGS.width_multiplier) for row in PAPER]
    chosen = common.chosen_rows(FLAGS.rows, len(PAPER))
    found = []
    for number, (config, row) in enumerate(zip(configs, PAPER)):
        workdir = out / row[1]
        found.append(common.run(config, workdir) if number in chosen else common.results_of(config, workdir))
    speeds: list[float | None] = []
    for config, row in zip(configs, PAPER):
        speeds.append(images_per_second(config, classes_of(config), FLAGS.steps) if FLAGS.steps else None)
        if FLAGS.steps:
            print(f"{row[0]}: {speeds[-1]:.3f} images/s", flush=True)
    result = table(configs, speeds, found, configs[0].data.name)
    figure = plot(speeds, found, [row[7] for row in result.rows], configs[0].data.name)
    common.write(out, "field_of_view", [result], {"rows": result.rows, "results": found}, figure)


if __name__ == "__main__":
    common.define_flags("", "field_of_view")
    flags.DEFINE_list("rows", ["none"], "rows to train and evaluate, counted from 1; all or none")
    flags.DEFINE_integer("steps", 0, "training steps timed for each row; 0 = none", lower_bound=0)
    flags.DEFINE_float("width_multiplier", 1.0, "share of the published channels, trunk and head", lower_bound=1 / 64)
    cli.run(main)
