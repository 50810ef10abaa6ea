"""Is end-to-end training worth it? Further training of one network, piecewise and with the CRF, for equal time.

  python -m experiments.end_to_end --config shapes --config.data.holdout=100 --config.num_steps=400 --steps 200 \\
      --rate 0.02
  python -m experiments.end_to_end --config camvid --config.data.dir=PATH/camvid --start "runs/camvid_{seed}" \\
      --rows a,b,c,c_stride2 --seeds 0,1,2 --steps 500

All rows start from the same network, trained piecewise, and from the CRF parameters that a search found for it:
  a        more piecewise training, then the search again
  b        the CRF's parameters are learned, the network is fixed
  c        both are learned
In training b and c use the searched weights divided by --softer: a CRF as strong as the search finds it leaves
marginals of 0 and 1, and a loss that a few wrong pixels make up. Rows are tested with the parameters that they learned,
and with those that the search found for the start ("start's"); those of a and c also with a search of their own.

A variation changes one thing of b or c: c_sharp (the searched weights as they are), c_stride2 (the map on which the CRF
runs in training; also 1, and 8 with the exact filter), c_pixels (the loss at every pixel), c_one_weight,
c_no_compatibility, c_iterations10, c_crf_rate10, c_crf_rate100, c_crf_loss_alone (no loss on the scores before the
CRF), c_unweighted (no class weights after the CRF), c_no_ema, c_stored_norm, c_exact (the filter), c_crfasrnn (Zheng et
al. 2015); and of a: a_pixels. Row a has --steps steps; the others have as many as fit into the same time, or with
--equal steps the same number. A stopped command continues where it was.

Choose between rows on held-out images (--config.eval.split=holdout), and use the validation images once.
"""

import copy
import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from deeplab_jax import cli
from deeplab_jax.errors import UserError
from experiments import common, runs
from experiments.end_to_end_rows import CRFASRNN_RATE, EMA, SOFTER, WHAT, WITH_CRF, kinds_of, overrides_of

FLAGS = flags.FLAGS
TRIMAP = "3"


@dataclasses.dataclass(frozen=True)
class Start:
    """The common start of all rows of a seed.

    Attributes:
      config: of the whole experiment.
      run: the run of the network.
      searched: file with the CRF's parameters that the search found.
      softer: the same with smaller weights, for training.
      rate: learning rate at the beginning of a row.
    """

    config: ConfigDict
    run: Path
    searched: str
    softer: str
    rate: float

    def continuation(self, row: str, steps: int) -> ConfigDict:
        """The config of a row's training over this many steps."""
        from deeplab_jax.runs.provenance import read_config

        config = copy.deepcopy(self.config)
        model = read_config(self.run).model
        for name in config.model:
            if name in model:  # a field newer than the run keeps its default
                config.model[name] = model[name]
        config.init_from = str(self.run)
        config.num_steps = steps
        config.crf.preset = self.searched if row.endswith("_sharp") else self.softer
        config.data.stages = ()
        tiny = CRFASRNN_RATE if row.endswith("_crfasrnn") else 1.0
        config.optimizer.update(learning_rate=float(self.rate) * tiny, warmup_steps=min(20, steps // 10), ema=EMA)
        config.eval.update(every=0, select_split="")
        config.checkpoint.every = max(1, steps // 4)
        return common.changed(config, overrides_of(row))

    def seconds(self, row: str, folder: Path) -> float:
        """Seconds per step of the row, measured once for all seeds and stored in `folder`."""
        about = {
            "row": overrides_of(row),
            "batch": self.config.batch_size,
            "crop": self.config.data.crop,
            "model": self.continuation(row, 1).model.to_dict(),
            "crf": [self.config.crf.train_iterations, self.config.crf.bilateral, self.config.crf.stride],
            "loss": self.config.loss.to_dict(),
        }
        path = folder / f"{row}.json"
        return common.remembered(path, about, lambda: [seconds_per_step(self.continuation(row, 1))])[0]


def seconds_per_step(config: ConfigDict, steps: int = 5) -> float:
    """The median of this many training steps on the config's own batches, after one that compiles."""
    import jax

    from deeplab_jax.data import open_dataset, train_batches
    from deeplab_jax.training import setup
    from deeplab_jax.training.optimizer import create_optimizer
    from deeplab_jax.training.state import create_state
    from deeplab_jax.training.step import AXIS, create_train_step, replicate, shard

    dataset = open_dataset(config.data, config.data.train_split, seed=config.seed)
    model, optimizer = setup.build_model(config, dataset.num_classes), create_optimizer(config)
    state = replicate(create_state(setup.initial_variables(config, model), config, optimizer))
    step = create_train_step(model.clone(axis_name=AXIS), config, optimizer, None)
    batches = train_batches(dataset, config)
    seconds = []
    for _ in range(steps + 1):
        batch = shard(next(batches), config.optimizer.accumulate)
        began = time.perf_counter()
        state, metrics = step(state, batch)
        jax.block_until_ready(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    batches.close()
    return statistics.median(seconds[1:])


def softened(preset: str, divisor: float, path: Path) -> str:
    """Writes a preset file's parameters with their weights divided, and returns the new file's name."""
    from deeplab_jax.crf.params import WEIGHT_FIELDS
    from deeplab_jax.crf.setting import read_preset, write_preset

    setting = read_preset(preset)
    weights = {name: np.divide(getattr(setting.params, name), divisor) for name in WEIGHT_FIELDS}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_preset(path, dataclasses.replace(setting, params=dataclasses.replace(setting.params, **weights)))
    return str(path)


def steps_of(row: str, steps: int, seconds: Mapping[str, float]) -> int:
    """The number of steps of a row that take as long as `steps` of row a.

    >>> steps_of("c", 100, {"a": 0.2, "c": 0.5})
    40
    """
    return max(1, round(steps * seconds["a"] / seconds[row]))


def experiment(
    config: ConfigDict,
    out: Path,
    *,
    rows: Sequence[str] = ("a", "b", "c"),
    seeds: Sequence[int] = (0,),
    steps: int = 200,
    rate: float = 0.0,
    equal: str = "time",
    start: str = "",
    softer: float = SOFTER,
) -> list[dict]:
    """Trains and measures missing rows; everything is stored in `out`.

    Args:
      config: of the training; `config.eval.split` is measured.
      out: folder for runs and results.
      rows: see `overrides_of`.
      seeds: of the start and the continuations.
      steps: of row a.
      rate: initial learning rate of each row; 0 = a tenth of the config's.
      equal: "time" or "steps".
      start: trained runs, with "{seed}" for the seed; "" = the config is trained piecewise here.
      softer: in training the searched weights are divided by this.

    Returns:
      One dict per row, seed and kind of CRF parameters: `row`, `seed`, `parameters` (of `kinds_of`), `steps`
      and `results`, see `deeplab_jax.evaluation.evaluate`.

    Raises:
      UserError: there is no such row, no images are held out for the search, or a start was trained end to end.
    """
    from deeplab_jax.runs.provenance import read_config

    rows = list(dict.fromkeys(["a", *rows]))  # all others are compared with it
    for row in rows:
        overrides_of(row)
    rate = rate or config.optimizer.learning_rate / 10
    found = []
    for seed in seeds:
        seeded = common.changed(config, {"seed": seed})
        folder = out / f"seed_{seed}"
        if start:
            base = Path(start.replace("{seed}", str(seed)))
            if read_config(base).crf.train != "off":
                raise UserError(f"{base}: was trained end to end; give a run with config.crf.train=off to start from")
        else:
            base = runs.trained(common.changed(seeded, {"crf.train": "off"}), folder / "start")
        own_search = runs.own_preset(base) if start else None  # with the settings of that run
        preset = own_search or runs.searched_preset(
            common.changed(seeded, {"crf.train": "off"}), base, config.search.images
        )

        def add(
            row: str, run: Path, kind: str, steps: int, seeded=seeded, seed=seed, folder=folder, first=preset
        ) -> None:
            own = first if kind == "start's" else None
            if kind == "searched":
                own = runs.searched_preset(seeded, run, config.search.images)
            results = runs.measure(seeded, run, folder / "results" / kind.replace("'", ""), preset=own)
            found.append({"row": row, "seed": seed, "parameters": kind, "steps": steps, "results": results})

        add("start", base, "start's", 0)
        begin = Start(seeded, base, preset, softened(preset, softer, folder / "softer.json"), rate)
        for row in rows:
            length = steps
            if equal == "time" and not row.startswith("a"):
                length = steps_of(row, steps, {name: begin.seconds(name, out / "seconds") for name in ("a", row)})
            run = runs.trained(begin.continuation(row, length), folder / f"{row}_{length}")
            for kind in kinds_of(row):
                add(row, run, kind, length)
    return found


# ---- tables and plot -----------------------------------------------------------------------------------------------


def summary(found: Sequence[Mapping], iterations: int) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Percent by (row, parameters): `network`, `crf`, `trimap`, and over row a of the same seed `gain`, `trimap_gain`.

    Args:
      found: the result of `experiment`.
      iterations: of the mean field, one of those measured.
    """

    def values(entry: Mapping) -> dict[str, float]:
        by_count = {r["crf_iterations"]: r for r in entry["results"]}
        return {
            "network": 100 * by_count[0]["mean_iou"],
            "crf": 100 * by_count[iterations]["mean_iou"],
            "trimap": 100 * by_count[iterations]["trimap"][TRIMAP]["mean_iou"],
        }

    of_a = [entry for entry in found if entry["row"] == "a" and entry["parameters"] == "searched"]
    piecewise = {entry["seed"]: values(entry) for entry in of_a}
    table: dict[tuple[str, str], dict[str, list[float]]] = {}
    for entry in found:
        own, other = values(entry), piecewise[entry["seed"]]
        own |= {"gain": own["crf"] - other["crf"], "trimap_gain": own["trimap"] - other["trimap"]}
        columns = table.setdefault((entry["row"], entry["parameters"]), {name: [] for name in own})
        for name, value in own.items():
            columns[name].append(value)
    return table


def spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard deviation over seeds.

    >>> spread([1.0, 2.0, 3.0], "+"), spread([1.0])
    ('+2.00 ± 1.00', '1.00')
    """
    mean = f"{statistics.fmean(values):{sign}.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def tables(found: Sequence[Mapping], data: str, split: str) -> list[common.Table]:
    """One table for each measured number of iterations except 0."""
    counts = sorted(r["crf_iterations"] for r in found[0]["results"])
    steps = {(e["row"], e["parameters"]): e["steps"] for e in found}
    heads = ("row", "CRF parameters", "steps", "seeds", "network", "with CRF", "over a", "3 px", "3 px over a")
    made = []
    for n in counts[1:]:
        rows = []
        for (row, parameters), v in summary(found, n).items():
            signed = [spread(v[name], "+") if row not in ("a", "start") else None for name in ("gain", "trimap_gain")]
            rows.append((row, parameters, steps[row, parameters], len(v["crf"]), spread(v["network"]),
                         spread(v["crf"]), signed[0], spread(v["trimap"]), signed[1]))  # fmt: skip
        title = f"{data}, split '{split}', {n} mean-field iterations: mean IoU in percent, mean ± deviation over seeds"
        made.append(common.Table(title, heads, rows))
    return made


def plot(found: Sequence[Mapping]):
    """Gain over row a against the stride of the training map, and mean IoU by iterations of the mean field."""
    counts = sorted(r["crf_iterations"] for r in found[0]["results"])
    figure = common.new_figure(10.5, 4.0)
    left, right = figure.subplots(1, 2)
    after = summary(found, counts[-1])
    shown = {"start": "start's", "b": "learned"}  # the others by a search of their own, as they are meant to be used
    for letter in "bc":
        at = {8: f"{letter}_stride8", WITH_CRF["crf.stride"]: letter, 2: f"{letter}_stride2", 1: f"{letter}_stride1"}
        kind = shown.get(letter, "searched")
        points = {stride: after[row, kind] for stride, row in at.items() if (row, kind) in after}
        for name, style in (("gain", "o-"), ("trimap_gain", "s--")):
            if points:
                where = "3 px" if name == "trimap_gain" else "whole image"
                means = [statistics.fmean(v[name]) for v in points.values()]
                left.plot(list(points), means, style, label=f"{WHAT[letter]}, {where}", ms=4)
    left.axhline(0, color="0.6", lw=1)
    left.set_xscale("log", base=2)
    left.set_xticks([1, 2, 4, 8], labels=["1", "2", "4", "8"])
    left.set_xlabel("stride of the map in training")
    left.set_ylabel("over more piecewise training [points]")
    for row, parameters in after:
        if parameters != shown.get(row.partition("_")[0], "searched"):
            continue
        means = [statistics.fmean(summary(found, n)[row, parameters]["crf" if n else "network"]) for n in counts]
        right.plot(counts, means, "o-" if row[0] == "c" else "s--", label=row, ms=4)
    right.set_xlabel("mean-field iterations")
    right.set_ylabel("mean IoU [%]")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    return figure


def main(argv: Sequence[str]) -> None:
    del argv
    config, out = common.load_config(), Path(FLAGS.out)
    fields = {"eval.crf_iterations": (0, 5, 10), "eval.trimap_widths": (int(TRIMAP),), "eval.overlays": 0}
    config = common.changed(config, fields)
    if not config.search.images:
        config.search.images = 40
    found = experiment(
        config,
        out,
        rows=FLAGS.rows,
        seeds=[int(seed) for seed in FLAGS.seeds],
        steps=FLAGS.steps,
        rate=FLAGS.rate,
        equal=FLAGS.equal,
        start=FLAGS.start,
        softer=FLAGS.softer,
    )
    made = tables(found, config.data.name, config.eval.split)
    common.write(out, "end_to_end", made, {"found": found}, plot(found))


if __name__ == "__main__":
    common.define_flags("shapes", "end_to_end")
    flags.DEFINE_list("rows", ["a", "b", "c"], "rows to run, see above; a is always included")
    flags.DEFINE_list("seeds", ["0"], "one start and one continuation for each")
    flags.DEFINE_integer("steps", 200, "steps of row a", lower_bound=1)
    flags.DEFINE_float("rate", 0.0, "initial learning rate of each row; 0 = a tenth of the config's")
    flags.DEFINE_enum("equal", "time", ["time", "steps"], "what the rows have in common")
    flags.DEFINE_float("softer", SOFTER, "in training the searched weights are divided by this", lower_bound=1.0)
    flags.DEFINE_string("start", "", "trained runs to start from, with {seed} for the seed; none: train the config")
    cli.run(main)
