"""Shared by the experiments: runs of a config, tables with the paper's figures beside ours, complete files.

Every experiment has a config whose fields flags can change, so that it runs on PASCAL VOC if its data are available
and, smaller, on CamVid or the embedded `shapes`: --config shapes --config.num_steps=100. The papers' figures are those
of their tables; a cell is empty if the paper has none, or if the run has not been made yet.
"""

import copy
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from deeplab_jax import cli
from deeplab_jax.config import fields, set_field
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically, write_text

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # the flags below belong to the experiment that defines them


def define_flags(config: str, name: str, *, rows: bool = False) -> None:
    """Declares `--config` and `--out`, and `--rows` for an experiment that makes one run for each row of its table."""
    flags.DEFINE_string("config", config, "config file or shipped name; --config.field=value changes a field")
    flags.DEFINE_string("out", f"runs/experiments/{name}", "folder for runs, tables and plots")
    if rows:
        flags.DEFINE_list("rows", ["all"], "rows to run, counted from 1; all, or none: show what has been run")


def load_config() -> ConfigDict:
    """The config that the command line names."""
    return cli.config_from_flags(FLAGS.config)


# ---- tables --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of text and numbers; None is an empty cell.

    Attributes:
      title: one line.
      columns: the heads of the columns.
      rows: as many cells each.
      notes: lines below.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """Aligned, numbers to the right."""
        lines = [tuple(self.columns), *([cell(v) for v in row] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        words = self._words()
        rows = [
            "  ".join(
                c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, words, strict=True)
            ).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, "", rows[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *rows[1:], *self.notes])

    def markdown(self) -> str:
        """As GitHub renders it."""
        words = self._words()
        rule = ["---" if left else "---:" for left in words]
        lines = [self.columns, rule, *([cell(v) for v in row] for row in self.rows)]
        body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + "".join(f"\n{note}\n" for note in self.notes)

    def _words(self) -> list[bool]:
        """Which columns hold text; the others are numbers, or empty."""
        kinds = ([type(row[i]) for row in self.rows if row[i] is not None] for i in range(len(self.columns)))
        return [bool(found) and set(found) == {str} for found in kinds]


def cell(value: object) -> str:
    """A table's cell.

    >>> [cell(v) for v in (None, float("nan"), 67.637, 134346581, "7x7", True)]
    ['', '', '67.64', '134,346,581', '7x7', 'x']
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "x" if value else ""
    if isinstance(value, float):
        return f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def percent(fraction: float | None) -> float | None:
    """100 times a fraction; None stays None."""
    return None if fraction is None else 100 * fraction


# ---- results -------------------------------------------------------------------------------------------------------


def write(out: Path, name: str, tables: Sequence[Table], data: Mapping, figure=None) -> None:
    """Prints the tables and writes `<name>.md`, `<name>.json` and, given a figure, `<name>.png` into `out`."""
    print("\n\n".join(table.text() for table in tables), flush=True)
    command = shown_command()
    head = f"`{command}`\n\n" if command else ""
    write_text(out / f"{name}.md", head + "\n".join(table.markdown() for table in tables))
    write_text(out / f"{name}.json", json.dumps({"command": command, **data}, indent=1) + "\n")
    written = [f"{name}.md", f"{name}.json"]
    if figure is not None:
        write_atomically(out / f"{name}.png", lambda path: figure.savefig(path, format="png", dpi=110))
        written.append(f"{name}.png")
    print(f"\nwritten to {out}: {', '.join(written)}", flush=True)


def shown_command() -> str:
    """The command line as a reader would type it, or "" if no experiment was started as a command."""
    program = Path(sys.argv[0])
    if program.parent.name != "experiments":
        return ""
    return " ".join(["python -m", f"experiments.{program.stem}", *sys.argv[1:]])


def new_figure(width: float, height: float):
    """An empty figure of this size in inches, without pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def remembered(path: Path, about: Mapping, compute: Callable[[], list]) -> list:
    """`compute()`, or the result of an earlier call in `path` if that was about the same."""
    about = json.loads(json.dumps(about))
    try:
        before = json.loads(path.read_text())
        if before["about"] == about:
            return before["results"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    results = compute()
    write_text(path, json.dumps({"about": about, "results": results}, indent=1) + "\n")
    return results


# ---- runs ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row of a table: one run.

    Attributes:
      name: of its folder.
      overrides: dotted fields of the config and their values.
      cells: the row's descriptive cells.
      paper: the paper's figures, percent.
    """

    name: str
    overrides: Mapping[str, object]
    cells: Sequence
    paper: Sequence[float | None]


def changed(config: ConfigDict, overrides: Mapping[str, object]) -> ConfigDict:
    """A copy of the config with dotted fields set.

    Raises:
      UserError: an unknown field, or a value of another type.
    """
    config = copy.deepcopy(config)
    for name, value in overrides.items():
        set_field(config, f"{name}={value}")
    return config


# Fields, and groups with a dot, that do not change what is trained.
_NO_TRAINING = ("name", "eval.", "log.", "checkpoint.", "search.", "data.dir", "data.cache_dir", "data.workers",
                "data.cache_decoded_mb")  # fmt: skip
_OF_WEIGHTS = ("model.preprocessing", "model.resize", "model.stride_on")  # `init_from` may decide these


def difference(config: ConfigDict, workdir: Path) -> str:
    """A field in which the run in `workdir` was trained otherwise than `config` says, with both values; "" if none.

    Without a checkpoint there is none.
    """
    from deeplab_jax.runs.checkpoints import Checkpoints
    from deeplab_jax.runs.provenance import config_of

    checkpoints = Checkpoints(workdir, read_only=True)
    steps = checkpoints.steps()
    if not steps:
        return ""
    before = dict(fields(config_of(workdir, steps[-1], checkpoints.meta(steps[-1]))))
    piecewise = before["crf.train"] == config.crf.train == "off"  # the CRF is no part of such trainings
    left_out = (*_NO_TRAINING, *["crf."] * piecewise, *(_OF_WEIGHTS if config.init_from else ()))
    for name, value in fields(config):
        if not name.startswith(left_out) and name in before and before[name] != value:
            return f"config.{name}={before[name]} instead of {value}"
    return ""


def run(config: ConfigDict, workdir: Path) -> list[dict]:
    """Trains a config, continuing where an earlier call was stopped, and evaluates it.

    Returns:
      One dict per number of CRF iterations; see `deeplab_jax.evaluation.evaluate`.

    Raises:
      UserError: the workdir holds a run of another config, or the config cannot be run.
    """
    if other := difference(config, workdir):
        raise UserError(f"{workdir}: holds a run with {other}; give another --out, or the flags of that run")
    from deeplab_jax.evaluation.workdir import evaluate_workdir
    from deeplab_jax.training import loop

    print(f"--- {workdir}", flush=True)
    loop.train(config, workdir)
    print(evaluate_workdir(config, workdir), flush=True)
    return results_of(config, workdir) or []


def results_of(config: ConfigDict, workdir: Path) -> list[dict] | None:
    """The results that the evaluation of a workdir wrote; None if there are none, or of another training."""
    if other := difference(config, workdir):
        print(f"note: {workdir} holds a run with {other}, so its results are not shown", flush=True)
        return None
    path = workdir / "eval" / f"{config.eval.split}.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def run_variants(config: ConfigDict, variants: Sequence[Variant], out: Path, rows: Sequence[str]) -> list[list | None]:
    """Runs the requested rows; returns each row's results, None for rows that have not been run.

    Raises:
      UserError: `rows` names a row that the table does not have, or a run cannot be made.
    """
    chosen = chosen_rows(rows, len(variants))
    found = []
    for number, variant in enumerate(variants):
        own = changed(config, variant.overrides)
        found.append(run(own, out / variant.name) if number in chosen else results_of(own, out / variant.name))
    return found


def chosen_rows(rows: Sequence[str], count: int) -> set[int]:
    """Indices of the rows that `--rows` names.

    >>> chosen_rows(["1", "3"], 4), chosen_rows(["none"], 4)
    ({0, 2}, set())
    """
    if list(rows) == ["all"]:
        return set(range(count))
    if list(rows) in ([], ["none"], [""]):
        return set()
    try:
        chosen = {int(row) - 1 for row in rows}
    except ValueError:
        chosen = {-1}
    if not chosen <= set(range(count)):
        raise UserError(f"--rows={','.join(rows)}: give numbers from 1 to {count}, all or none")
    return chosen


def at_iterations(results: Sequence[Mapping] | None, which: int) -> Mapping | None:
    """The entry with the fewest (0) or most (-1) CRF iterations; None if there is none.

    The fewest must be 0, which is the network without the CRF.
    """
    if not results:
        return None
    entry = sorted(results, key=lambda r: r["crf_iterations"])[which]
    return entry if (entry["crf_iterations"] == 0) == (which == 0) else None


def mean_iou(entry: Mapping | None) -> float | None:
    """An entry's mean IoU in percent."""
    return percent(entry["mean_iou"]) if entry else None


def write_variants(
    out: Path,
    name: str,
    title: str,
    heads: Sequence[str],
    measures: Mapping[str, int],
    variants: Sequence[Variant],
    found: Sequence[list | None],
    data: str,
    notes: Sequence[str] = (),
) -> None:
    """Writes a table of runs, the paper's figures beside ours, and its plot.

    Args:
      out, name: see `write`.
      title: of the table.
      heads: of the descriptive columns, as many as each variant's `cells`.
      measures: the paper's measures, and the corresponding entry of ours: 0 = before the CRF, -1 = after it.
      variants: the rows.
      found: their results, None for rows that have not been run.
      data: name of the data set on which ours were measured.
      notes: lines below the table.
    """
    ours = {head: [mean_iou(at_iterations(r, which)) for r in found] for head, which in measures.items()}
    rows = [
        (*v.cells, *(c for n, head in enumerate(measures) for c in (v.paper[n], ours[head][i])))
        for i, v in enumerate(variants)
    ]
    columns = [*heads, *(c for head in measures for c in (f"paper, VOC: {head}", f"ours, {data}: {head}"))]
    figure = new_figure(1.1 * len(variants) + 2.6, 3.8)
    axes = figure.add_subplot()
    names = [v.name.replace("_", " ") for v in variants]
    for n, head in enumerate(measures):
        for values, style, whose in (
            ([v.paper[n] for v in variants], "o--", "paper, VOC"),
            (ours[head], "s-", f"ours, {data}"),
        ):
            if any(v is not None for v in values):
                shown = [math.nan if v is None else v for v in values]
                axes.plot(range(len(names)), shown, style, label=f"{whose}: {head}")
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right", fontsize=8)
    axes.set_ylabel("mean IoU [%]")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    write(out, name, [Table(title, columns, rows, notes)], {"rows": names, "results": list(found)}, figure)
