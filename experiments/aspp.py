"""v2 Table 3: LargeFOV versus ASPP-S and ASPP-L on VGG-16, before and after the CRF.

  python -m experiments.aspp --config voc_vgg16_aspp_l --config.data.dir=VOC --config.init_from=WEIGHTS
  python -m experiments.aspp --config shapes --config.num_steps=200 --rate_scale=0.33

Only the head differs between the rows. --rate_scale multiplies the atrous rates, for crops smaller than 321.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from experiments import common
from experiments.common import Variant

FLAGS = flags.FLAGS

# Name, head, rates, mean IoU on VOC's validation set before and after the CRF (v2 Table 3).
PAPER = (
    ("LargeFOV", "largefov", (12,), 65.76, 69.84),
    ("ASPP-S", "aspp", (2, 4, 8, 12), 66.98, 69.73),
    ("ASPP-L", "aspp", (6, 12, 18, 24), 68.96, 71.57),
)


def scaled(rates: Sequence[int], factor: float) -> tuple[int, ...]:
    """Rates times a factor, at least 1.

    >>> scaled((2, 4, 8, 12), 0.25)
    (1, 1, 2, 3)
    """
    return tuple(max(1, round(r * factor)) for r in rates)


def variants(backbone: str = "vgg16", rate_scale: float = 1.0) -> list[Variant]:
    """The rows; on a ResNet the heads are v2's single atrous convolutions directly to the classes."""
    rows = []
    for name, head, rates, before, after in PAPER:
        rates = scaled(rates, rate_scale)
        overrides = {"model.head": head, "model.head_rates": rates, "model.fine_branch": 0, "crf.train": "off"}
        if backbone == "resnet_small":
            overrides |= {"model.head_width": 0, "model.output_stride": 8}
        cells = (name, ", ".join(map(str, rates)))
        rows.append(Variant(name.lower().replace("-", "_"), overrides, cells, (before, after)))
    return rows


def main(argv: Sequence[str]) -> None:
    del argv
    config, out = common.load_config(), Path(FLAGS.out)
    rows = variants(config.model.backbone, FLAGS.rate_scale)
    found = common.run_variants(config, rows, out, FLAGS.rows)
    title = "Atrous spatial pyramid pooling (v2 Table 3): mean IoU in percent"
    measures = {"before CRF": 0, "after CRF": -1}
    common.write_variants(out, "aspp", title, ("head", "rates"), measures, rows, found, config.data.name)


if __name__ == "__main__":
    common.define_flags("voc_vgg16_aspp_l", "aspp", rows=True)
    flags.DEFINE_float("rate_scale", 1.0, "multiplies the atrous rates", lower_bound=0.0)
    cli.run(main)
