"""How many mean-field iterations, which parameters, and is end-to-end training worth it?

  python -m experiments.crf_iterations --config shapes --config.num_steps=200 --config.data.holdout=20
  python -m experiments.crf_iterations --config camvid --config.data.dir=PATH/camvid --workdir runs/camvid \
      --learn_steps 100

Mean IoU and mean IoU within --trimap_width pixels of boundaries after 0 to 10 iterations of the CRF, with its
parameters fixed (a published preset), searched on held-out images, and learned end to end.

Without --workdir two networks are trained from the same start on the same batches for config.num_steps steps: one
piecewise (the CRF follows training, as in the papers), one with the loss after the CRF. With --workdir that run is the
piecewise one; --learn_steps N trains it further twice, for N steps each: piecewise and end to end.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError
from experiments import common, runs

FLAGS = flags.FLAGS

# Mean IoU on VOC's validation set: v2 Table 4's last network without CRF, and after the papers' 10 iterations.
PAPER = {0: 76.35, 10: 77.69}


@dataclasses.dataclass(frozen=True)
class System:
    """A network and its CRF.

    Attributes:
      training: how the network was trained.
      parameters: the origin of the CRF's parameters.
      results: one entry per number of iterations, see `deeplab_jax.evaluation.evaluate`.
    """

    training: str
    parameters: str
    results: Sequence[dict]

    @property
    def name(self) -> str:
        return f"{self.training}, {self.parameters}"

    def curve(self, trimap: str = "") -> list[float | None]:
        """Mean IoU in percent after each number of iterations; in the trimap of a width if one is named."""
        return [common.percent((r["trimap"][trimap] if trimap else r)["mean_iou"]) for r in self.results]


def experiment(
    config,
    out: Path,
    *,
    workdir: Path | None = None,
    preset: str = "v2_resnet101",
    search_images: int = 0,
    learn_steps: int = 0,
    learn_rate: float = 0.0,
) -> list[System]:
    """Trains missing runs and measures every system.

    Args:
      config: of training and evaluation; `config.eval.crf_iterations` are the iterations.
      out: folder for runs and results.
      workdir: a trained run; None = two runs are trained, see above.
      preset: the fixed parameters.
      search_images: parameters are searched on this many held-out images; 0 = only if the run has done so.
      learn_steps: with `workdir`, the length of both continuations; 0 = none.
      learn_rate: their initial learning rate; 0 = a tenth of the config's.

    Raises:
      UserError: `workdir` is not a piecewise-trained run, or a run cannot be trained.
    """
    from deeplab_jax.runs.provenance import read_config

    if workdir is not None and read_config(workdir).crf.train != "off":
        raise UserError(f"{workdir}: was trained end to end; give a run with config.crf.train=off as the piecewise one")
    results = out / "results"
    systems = []

    def add(training: str, run: Path, parameters: str, source: str | None) -> None:
        systems.append(System(training, parameters, runs.measure(config, run, results, preset=source)))

    base = workdir or runs.trained(common.changed(config, {"crf.train": "off"}), out / "piecewise")
    searched = None
    if search_images or runs.own_preset(base):
        searched = runs.searched_preset(config, base, search_images)
    length = config.num_steps if workdir is None else _steps(base)
    piecewise = f"piecewise {length}"
    add(piecewise, base, f"fixed ({preset})", preset)
    if searched:
        add(piecewise, base, "searched", searched)
    if workdir is None:
        learned = runs.trained(common.changed(config, {"crf.train": "end_to_end"}), out / "end_to_end")
        add(f"end to end {length}", learned, "learned", None)
    elif learn_steps:
        rate = learn_rate or config.optimizer.learning_rate / 10
        further = {
            kind: runs.continued(
                config,
                base,
                out / f"{kind}_{learn_steps}",
                steps=learn_steps,
                rate=rate,
                end_to_end=kind != "piecewise",
            )
            for kind in ("piecewise", "end_to_end")
        }
        more = f"{piecewise} + {learn_steps} piecewise"
        add(more, further["piecewise"], f"fixed ({preset})", preset)
        if searched:
            add(more, further["piecewise"], "searched", searched)
        add(f"{piecewise} + {learn_steps} end to end", further["end_to_end"], "learned", None)
    return systems


def tables(systems: Sequence[System], trimap_width: int, data: str) -> list[common.Table]:
    """The gain of each system, and mean IoU and trimap mean IoU by iterations."""
    counts = [r["crf_iterations"] for r in systems[0].results]
    band = str(trimap_width)
    images = systems[0].results[0]["images"]
    summary = []
    for s in systems:
        whole, near = s.curve(), s.curve(band)
        best = max(range(len(counts)), key=lambda i: whole[i])
        summary.append(
            (s.training, s.parameters, whole[0], whole[-1], whole[-1] - whole[0], near[0], near[-1],
             near[-1] - near[0], f"{whole[best]:.2f} at {counts[best]}")
        )  # fmt: skip
    last = counts[-1]
    heads = ("training (steps)", "CRF parameters", "network", f"CRF x{last}", "gain", f"{band} px: network",
             f"{band} px: CRF x{last}", f"{band} px: gain", "best")  # fmt: skip
    first = common.Table(f"{images} images of {data}, mean IoU in percent", heads, summary)
    found = [first]
    for trimap, what in (("", "Mean IoU"), (band, f"Mean IoU within {band} px of boundaries")):
        curves = [s.curve(trimap) for s in systems]
        rows = [
            (str(n), None if trimap else PAPER.get(n), *(curve[i] for curve in curves)) for i, n in enumerate(counts)
        ]
        columns = ("iterations", "paper, VOC (v2 Table 4)", *(s.name for s in systems))
        found.append(common.Table(f"{what} in percent by mean-field iterations", columns, rows))
    return found


def plot(systems: Sequence[System], trimap_width: int):
    """Both curves of every system; colors are networks, dashed lines fixed parameters."""
    figure = common.new_figure(10.5, 4.4)
    networks = list(dict.fromkeys(s.training for s in systems))
    for place, (trimap, what) in enumerate((("", "mean IoU"), (str(trimap_width), f"mean IoU, {trimap_width} px")), 1):
        axes = figure.add_subplot(1, 2, place)
        for s in systems:
            style = {"f": "--", "s": "-", "l": "-."}[s.parameters[0]]
            counts = [r["crf_iterations"] for r in s.results]
            axes.plot(counts, s.curve(trimap), f"{style}o", color=f"C{networks.index(s.training)}", label=s.name, ms=4)
        axes.set_xticks(counts)
        axes.set_xlabel("mean-field iterations")
        axes.set_ylabel(f"{what} [%]")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _steps(workdir: Path) -> int:
    from deeplab_jax.runs.checkpoints import load_workdir

    return load_workdir(workdir)[2]["step"]


def main(argv: Sequence[str]) -> None:
    del argv
    config, out = common.load_config(), Path(FLAGS.out)
    overrides = {
        "eval.crf_iterations": tuple(range(FLAGS.iterations + 1)),
        "eval.trimap_widths": (FLAGS.trimap_width,),
        "eval.overlays": 0,
    }
    config = common.changed(config, overrides)
    systems = experiment(
        config,
        out,
        workdir=Path(FLAGS.workdir) if FLAGS.workdir else None,
        preset=FLAGS.preset,
        search_images=FLAGS.search_images or config.search.images,
        learn_steps=FLAGS.learn_steps,
        learn_rate=FLAGS.learn_rate,
    )
    data = {"systems": [dataclasses.asdict(s) for s in systems]}
    found = tables(systems, FLAGS.trimap_width, config.data.name)
    common.write(out, "crf_iterations", found, data, plot(systems, FLAGS.trimap_width))


if __name__ == "__main__":
    common.define_flags("shapes", "crf_iterations")
    flags.DEFINE_string("workdir", "", "a trained run; none: train the config, piecewise and end to end")
    flags.DEFINE_integer("iterations", 10, "mean-field iterations, from 0 to this", lower_bound=1)
    flags.DEFINE_integer("trimap_width", 3, "pixels around boundaries", lower_bound=1)
    flags.DEFINE_string("preset", "v2_resnet101", "the fixed parameters: a published preset or a preset file")
    flags.DEFINE_integer("search_images", 0, "search parameters on this many held-out images; 0 = as in the config")
    flags.DEFINE_integer("learn_steps", 0, "with --workdir: steps of the two continuations", lower_bound=0)
    flags.DEFINE_float("learn_rate", 0.0, "learning rate of the continuations; 0 = a tenth of the config's")
    cli.run(main)
