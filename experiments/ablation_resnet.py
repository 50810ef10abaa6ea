"""v2 Table 4: what each part adds to ResNet-101: MSC, COCO, Aug, LargeFOV, ASPP and the CRF.

  python -m experiments.ablation_resnet --config.data.dir=VOC --config.init_from=WEIGHTS --coco_init=runs/coco_pretrain
  python -m experiments.ablation_resnet --config shapes --config.num_steps=200 --rate_scale=0.33

MSC: input scales 1, 0.75, 0.5 fused by max. COCO: training starts from --coco_init, a run of configs/coco_pretrain.py;
without it the rows that have it in the paper start like the others, which their cell states. Aug: the config's random
scales, versus scale 1. The last row is the previous one after the CRF.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from experiments import common
from experiments.aspp import scaled
from experiments.common import Variant

FLAGS = flags.FLAGS

PARTS = ("MSC", "COCO", "Aug", "LargeFOV", "ASPP", "CRF")

# The parts in use, and mean IoU on VOC's validation set (v2 Table 4).
PAPER = (
    ((), 68.72),
    (("MSC",), 71.27),
    (("MSC", "COCO"), 73.28),
    (("MSC", "COCO", "Aug"), 74.87),
    (("MSC", "COCO", "Aug", "LargeFOV"), 75.54),
    (("MSC", "COCO", "Aug", "ASPP"), 76.35),
    (("MSC", "COCO", "Aug", "ASPP", "CRF"), 77.69),
)


def variants(
    backbone: str = "resnet101",
    continuous_scale: bool = False,
    coco_init: str = "",
    rate_scale: float = 1.0,
    stages: Sequence[tuple] = (),
) -> list[Variant]:
    """All rows except the last, which is the previous row measured after the CRF; `stages` is `config.data.stages`."""
    fixed = (1.0, 1.0) if continuous_scale else (1.0,)
    rows = []
    for parts, paper in PAPER[:-1]:
        overrides = {"model.head": "plain", "model.fine_branch": 0, "crf.train": "off"}
        if "LargeFOV" in parts:
            overrides |= {"model.head": "largefov", "model.head_rates": scaled((12,), rate_scale)}
        if "ASPP" in parts:
            overrides |= {"model.head": "aspp", "model.head_rates": scaled((6, 12, 18, 24), rate_scale)}
        if backbone == "resnet_small":  # v2's heads, not the small network's own
            overrides |= {"model.head_width": 0, "model.output_stride": 8}
        overrides["model.scales"] = (1.0, 0.75, 0.5) if "MSC" in parts else (1.0,)
        if "Aug" not in parts:
            overrides["data.scales"] = fixed
            overrides["data.stages"] = tuple((share, tuple(crop), fixed) for share, crop, _ in stages)
        if "COCO" in parts and coco_init:
            overrides["init_from"] = coco_init
        name = "_".join(parts).lower() or "plain"
        rows.append(Variant(name, overrides, tuple(part_cell(p, parts, coco_init) for p in PARTS), (paper,)))
    return rows


def part_cell(part: str, parts: Sequence[str], coco_init: str) -> str:
    """An x where a part is used."""
    if part not in parts:
        return ""
    return "paper only" if part == "COCO" and not coco_init else "x"


def main(argv: Sequence[str]) -> None:
    del argv
    config, out = common.load_config(), Path(FLAGS.out)
    rows = variants(
        config.model.backbone,
        config.data.continuous_scale,
        FLAGS.coco_init,
        FLAGS.rate_scale,
        config.data.stages,
    )
    chosen = ["none"] if FLAGS.rows == ["none"] else [r for r in FLAGS.rows if r != str(len(PAPER))]
    if chosen != FLAGS.rows and str(len(rows)) not in chosen and FLAGS.rows != ["none"]:
        chosen.append(str(len(rows)))  # the last row is measured on the previous run
    found = common.run_variants(config, rows, out, chosen)
    parts, paper = PAPER[-1]
    cells = tuple(part_cell(p, parts, FLAGS.coco_init) for p in PARTS)
    after = common.at_iterations(found[-1], -1)
    rows.append(Variant("with CRF", {}, cells, (paper,)))
    found.append([after | {"crf_iterations": 0}] if after else None)
    title = f"ResNet ablation (v2 Table 4): mean IoU in percent; ours: {config.model.backbone}"
    notes = () if FLAGS.coco_init else ("COCO: used in the paper's figures only; --coco_init gives ours.",)
    common.write_variants(out, "ablation_resnet", title, PARTS, {"mean IoU": 0}, rows, found, config.data.name, notes)


if __name__ == "__main__":
    common.define_flags("voc_aspp_l", "ablation_resnet", rows=True)
    flags.DEFINE_string("coco_init", "", "workdir or weights pretrained on MS-COCO, for the rows with COCO")
    flags.DEFINE_float("rate_scale", 1.0, "multiplies the atrous rates", lower_bound=0.0)
    cli.run(main)
