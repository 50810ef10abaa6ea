"""The output of a parameter search: a table and a heat map."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deeplab_jax.files import write_atomically, write_text
from deeplab_jax.search.grid import Candidate, Result, Row

_COLUMNS = ("w1", "s_alpha", "s_beta", "w2", "s_gamma", "normalization", "thin", "images", "mean IoU", "in trimap", "")
_NAMES = {
    "mean_iou": "mean IoU",
    "trimap": "mean IoU in the trimap",
    "both": "mean IoU, half of it in the trimap",
}
_SHOWN = Candidate._fields[:-1]  # the thin classes are the same in all rows


def table(rows: Sequence[Row], notes: Mapping[Candidate | None, str], limit: int | None = None) -> str:
    """The rows as text, aligned; percent. `notes` names settings ("network alone", ...), which are always shown."""
    shown = [row for n, row in enumerate(rows) if limit is None or n < limit or row.setting in notes]
    lines: list[tuple[str, ...]] = [_COLUMNS]
    for row in shown:
        values = [_cell(value) for value in _shown(row.setting, "-")]
        scores = [f"{100 * row.scores[kind]:.2f}" for kind in ("mean_iou", "trimap")]
        lines.append((*values, str(row.images), *scores, notes.get(row.setting, "")))
    widths = [max(len(line[i]) for line in lines) for i in range(len(_COLUMNS))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths)).rstrip() for line in lines)


def _shown(setting: Candidate | None, nothing: str) -> tuple:
    return setting[: len(_SHOWN)] if setting else (nothing,) * len(_SHOWN)


def _cell(value: float | str | tuple[float, ...]) -> str:
    """A number, a name, or the smallest and largest of weights per class."""
    if isinstance(value, tuple):
        return f"{min(value):.2g}..{max(value):.2g}"
    return value if isinstance(value, str) else f"{value:g}"


def write(folder: Path, result: Result, objective: str, notes: Mapping[Candidate | None, str]) -> None:
    """Writes `table.txt`, `table.csv` (all rows) and `heatmap.png` into `folder`.

    Raises:
      UserError: the folder cannot be written to.
    """
    write_text(folder / "table.txt", table(result.rows, notes) + "\n")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_SHOWN, "images", "mean_iou", "trimap", "note"])
    for row in result.rows:
        numbers = (row.images, row.scores["mean_iou"], row.scores["trimap"])
        writer.writerow([*_shown(row.setting, ""), *numbers, notes.get(row.setting, "")])
    write_text(folder / "table.csv", text.getvalue())
    figure = heatmap(result, objective)
    write_atomically(folder / "heatmap.png", lambda path: figure.savefig(path, format="png"))


def heatmap(result: Result, objective: str):
    """A figure with a row of maps per pass: sigma_alpha across, sigma_beta up, one map per w1.

    Each cell is the best over the other axes, on the images of the pass's first round, which measured every setting.
    The best cell of a pass has a frame.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = max(len(set(axes["bilateral_weight"])) for axes, _ in result.grids)
    figure = Figure(figsize=(2.6 * columns + 1.6, 2.9 * len(result.grids) + 0.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    plots = figure.subplots(len(result.grids), columns, squeeze=False)
    for line, (axes, scores) in zip(plots, result.grids):
        weights, across, up = (
            sorted(set(axes[n])) for n in ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std")
        )
        cube = np.full((len(weights), len(up), len(across)), -np.inf)
        for setting, value in scores.items():
            at = (
                weights.index(setting.bilateral_weight),
                up.index(setting.bilateral_rgb_std),
                across.index(setting.bilateral_xy_std),
            )
            cube[at] = max(cube[at], 100 * value)
        best = np.unravel_index(cube.argmax(), cube.shape)
        limits = {"vmin": cube.min(), "vmax": max(cube.max(), cube.min() + 1e-3)}
        for n, plot in enumerate(line):
            if n >= len(weights):
                plot.set_axis_off()
                continue
            shown = plot.imshow(cube[n], origin="lower", aspect="auto", cmap="viridis", **limits)
            plot.set_xticks(range(len(across)), [f"{v:g}" for v in across], fontsize=7)
            plot.set_yticks(range(len(up)), [f"{v:g}" for v in up], fontsize=7)
            plot.set_title(f"w1 = {weights[n]:g}", fontsize=9)
            plot.set_xlabel("sigma_alpha [pixels]", fontsize=8)
            if n == 0:
                plot.set_ylabel("sigma_beta [0..255]", fontsize=8)
            middle = (limits["vmin"] + limits["vmax"]) / 2
            if len(across) * len(up) <= 40:
                for y, x in np.ndindex(*cube[n].shape):
                    ink = "white" if cube[n, y, x] < middle else "black"
                    plot.text(x, y, f"{cube[n, y, x]:.1f}", ha="center", va="center", fontsize=6, color=ink)
            if n == best[0]:
                plot.plot(best[2], best[1], "s", markersize=16, markeredgecolor="red", markerfacecolor="none")
        figure.colorbar(shown, ax=list(line), label=f"{_NAMES[objective]} [%]", fraction=0.03)
    return figure
