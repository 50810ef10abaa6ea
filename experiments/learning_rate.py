"""v2 Table 2: learning-rate policy, batch size and number of steps of LargeFOV, before the CRF.

  python -m experiments.learning_rate --config voc_vgg16_largefov --config.data.dir=VOC --config.init_from=WEIGHTS
  python -m experiments.learning_rate --config shapes --config.num_steps=200 --config.batch_size=12

The paper's longest run has 20,000 steps and its largest batch 30 images. On data other than VOC the config's num_steps
and batch_size replace these, and the other rows are scaled in proportion; --in_proportion does the same on VOC.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from experiments import common
from experiments.common import Variant

FLAGS = flags.FLAGS

# Policy, batch, steps, mean IoU on VOC's validation set (v2 Table 2).
PAPER = (
    ("step", 30, 6_000, 62.25),
    ("poly", 30, 6_000, 63.42),
    ("poly", 30, 10_000, 64.90),
    ("poly", 10, 10_000, 64.71),
    ("poly", 10, 20_000, 65.88),
)
LONGEST, LARGEST = 20_000, 30


def variants(longest: int, largest: int) -> list[Variant]:
    """The rows, up to a longest run of this many steps and a largest batch of this many images."""
    rows = []
    for policy, paper_batch, paper_steps, paper in PAPER:
        steps = max(1, round(longest * paper_steps / LONGEST))
        batch = max(1, round(largest * paper_batch / LARGEST))
        overrides = {
            "num_steps": steps,
            "batch_size": batch,
            "optimizer.schedule": policy,
            # The step policy divides by 10 twice: every 2000 of 6000.
            "optimizer.step_size": max(1, steps // 3),
            "crf.train": "off",
            "crf.iterations": 0,
            "eval.crf_iterations": (0,),
        }
        rows.append(Variant(f"{policy}_batch{batch}_steps{steps}", overrides, (policy, batch, steps), (paper,)))
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    config, out = common.load_config(), Path(FLAGS.out)
    as_published = config.data.name == "voc_segmentation" and not FLAGS.in_proportion
    rows = variants(LONGEST, LARGEST) if as_published else variants(config.num_steps, config.batch_size)
    found = common.run_variants(config, rows, out, FLAGS.rows)
    title = "Learning-rate policy (v2 Table 2): mean IoU in percent, before the CRF"
    heads = ("policy", "batch", "steps")
    common.write_variants(out, "learning_rate", title, heads, {"mean IoU": 0}, rows, found, config.data.name)


if __name__ == "__main__":
    common.define_flags("voc_vgg16_largefov", "learning_rate", rows=True)
    flags.DEFINE_bool("in_proportion", False, "on VOC too, config.num_steps replaces 20,000 and batch_size 30")
    cli.run(main)
