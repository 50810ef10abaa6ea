"""v1 Figure 5: pixel accuracy and mean IoU in a narrow band around object boundaries, against the band's width.

  python -m experiments.trimap --config camvid --config.data.dir=PATH/camvid --workdir runs/camvid
  python -m experiments.trimap --config shapes --config.num_steps=100

--workdir names trained runs, separated by commas, each drawn without and with CRF; without it the config is trained
first. --preset takes other CRF parameters than the config's. The paper's Figure 5 has curves but no figures, so the
paper's column gives what Table 1 says of the whole image.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from experiments import common

FLAGS = flags.FLAGS

WIDTHS = (1, 2, 3, 5, 10, 20, 40)

# Mean IoU on VOC's validation set, raw and after the CRF, over whole images (v1 Table 1).
PAPER = {"DeepLab": (59.80, 63.74), "DeepLab-MSc": (61.30, 65.21), "DeepLab-LargeFOV": (62.25, 67.64)}


def table(curves: Mapping[str, Mapping], measure: str, data: str) -> common.Table:
    """One row for each width, one column for each curve, and the whole image in the last row.

    Args:
      curves: name -> an entry as `evaluation.evaluate` returns them.
      measure: "mean_iou" or "pixel_accuracy".
      data: name of the data set.
    """
    first = next(iter(curves.values()))
    widths = sorted(map(int, first["trimap"]))
    rows = [(f"{w} px", None, *(common.percent(r["trimap"][str(w)][measure]) for r in curves.values())) for w in widths]
    whole = ", ".join(f"{name} {a:.2f} / {b:.2f}" for name, (a, b) in PAPER.items()) if measure == "mean_iou" else None
    rows.append(("whole image", whole, *(common.percent(r[measure]) for r in curves.values())))
    source = {"boundary": "the annotated boundaries", "void": "void pixels (the paper's rule)"}[first["trimap_source"]]
    title = f"Around boundaries (v1 Figure 5): {measure.replace('_', ' ').replace('iou', 'IoU')} in percent"
    note = f"{first['images']} images of {data}; bands around {source}. Paper: raw / after CRF."
    return common.Table(title, ("band", "paper, VOC", *(f"ours: {name}" for name in curves)), rows, (note,))


def plot(curves: Mapping[str, Mapping]):
    """Both measures against the width, as Figure 5 (b) and (c)."""
    figure = common.new_figure(10, 4)
    for place, (measure, label) in enumerate((("pixel_accuracy", "pixel accuracy"), ("mean_iou", "mean IoU")), 1):
        axes = figure.add_subplot(1, 2, place)
        for n, (name, r) in enumerate(curves.items()):
            widths = sorted(map(int, r["trimap"]))
            values = [common.percent(r["trimap"][str(w)][measure]) for w in widths]
            shown = [float("nan") if v is None else v for v in values]
            axes.plot(widths, shown, "o-" if n % 2 else "s--", color=f"C{n // 2}", label=name)
        axes.set_xlabel("trimap width [pixels]")
        axes.set_ylabel(f"{label} [%]")
        axes.grid(alpha=0.3)
        axes.legend()
    return figure


def labels_of(workdirs: Sequence[Path]) -> list[str]:
    """Each run's name, with as many of its folders as it takes to tell it from the others.

    >>> labels_of([Path("r/seed0/camvid"), Path("r/seed1/camvid")])
    ['seed0/camvid', 'seed1/camvid']
    """
    parts = [workdir.resolve().parts for workdir in workdirs]
    for count in range(1, max(map(len, parts), default=1) + 1):
        labels = ["/".join(part[-count:]) for part in parts]
        if len(set(labels)) == len(set(parts)):
            return labels
    return [str(workdir) for workdir in workdirs]


def main(argv: Sequence[str]) -> None:
    del argv
    from experiments.runs import measure, own_preset, trained

    config, out = common.load_config(), Path(FLAGS.out)
    workdirs = [Path(w) for w in FLAGS.workdir] or [trained(config, out / "run")]
    overrides = {
        "eval.crf_iterations": (0, config.crf.iterations or 10),
        "eval.trimap_widths": WIDTHS,
        "eval.overlays": 0,
    }
    curves = {}
    for workdir, label in zip(workdirs, labels_of(workdirs)):
        results = measure(
            common.changed(config, overrides), workdir, out / "results", preset=FLAGS.preset or own_preset(workdir)
        )
        prefix = f"{label}, " if len(workdirs) > 1 else ""
        for r in results:
            name = f"CRF, {r['crf_iterations']} iterations" if r["crf_iterations"] else "network alone"
            curves[prefix + name] = r
    tables = [table(curves, m, config.data.name) for m in ("mean_iou", "pixel_accuracy")]
    common.write(out, "trimap", tables, {"curves": curves}, plot(curves))


if __name__ == "__main__":
    common.define_flags("camvid", "trimap")
    flags.DEFINE_list("workdir", [], "trained runs; none: train the config first")
    flags.DEFINE_string(
        "preset", "", "CRF parameters: a published preset or a preset file; default those the run searched or learned"
    )
    cli.run(main)
