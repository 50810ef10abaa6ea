"""The report of a run: everything in a workdir that a person wants to see, as one HTML file."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from deeplab_jax.console import say
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, write_text
from deeplab_jax.imaging import files, listing
from deeplab_jax.imaging.overlay import overlay
from deeplab_jax.pages.charts import line_chart, thinned
from deeplab_jax.runs import schema
from deeplab_jax.runs.record import inspect_record
from deeplab_jax.version import __version__

_OWN = ("config.json", "config_history.json", "run.json", "best.json", "metrics.jsonl")  # a run's
_LARGEST = 640  # pixels along the longer side of a picture in the page


def build_report(workdir: str | Path) -> str:
    """The page as HTML text, with styles, script, charts and pictures inside it.

    Only files inside the workdir are read, whatever paths its files name. Missing parts (curves, evaluations) are left
    out of the page, and so are damaged ones, which are reported on stderr.

    Args:
      workdir: a folder that `main` wrote.

    Raises:
      UserError: it is not a workdir.
    """
    workdir = Path(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir}: is not a training workdir (no config.json); give --workdir")
    config = _readable(workdir / "config.json", _config) or {}
    runs = _readable(workdir / "run.json", schema.run_entries) or []
    record = inspect_record(workdir / "metrics.jsonl")
    if record.problem:
        _without(workdir / "metrics.jsonl", record.problem)
    evaluations = [_evaluation(path) for path in _evaluations(workdir / "eval")]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deeplab_jax.pages", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = _percent
    return environment.get_template("report.html").render(
        name=str(config.get("name") or workdir.name),
        workdir=workdir.name,
        version=__version__,
        run=_run(runs[-1]) if runs else {},
        groups=_groups(config),
        curves=_curves(record.rows),
        evaluations=[e for e in evaluations if e],
    )


def write_report(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report, by default to `<workdir>/report.html`; returns its path.

    Raises:
      UserError: like `build_report`, or the page would replace a file of the run.
    """
    workdir = Path(workdir)
    out = Path(out) if out else workdir / "report.html"
    own = [workdir / name for name in _OWN]  # even if they do not exist yet
    listing.check_outputs([out], [*own, *listing.files_under(workdir, leave_out=".html")])  # earlier pages are replaced
    write_text(out, build_report(workdir))
    return out


def _evaluations(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.json") if not p.stem.endswith("_images"))


def _evaluation(path: Path) -> dict | None:
    """The template's data from one `<split>.json`, or None if it is damaged."""
    results = _readable(path, schema.results)
    if results is None:
        return None
    counts = [r["crf_iterations"] for r in results]
    names = [f"CRF ×{n}" if n else "network alone" for n in counts]
    images = _readable(path.with_name(f"{path.stem}_images.json"), schema.pictures) or {"pictures": [], "images": []}
    pictures = [p for p in (_picture(path.parent, entry, images) for entry in images["pictures"]) if p]
    classes = [
        {"name": name, "values": values, "gain": _difference(values[-1], values[0])}
        for name in results[0]["per_class_iou"]
        for values in [[r["per_class_iou"][name] for r in results]]
    ]
    confusion = path.with_name(f"{path.stem}_confusion.png")
    return {
        "split": path.stem,
        "images": results[0]["images"],
        "heads": names,
        "ends": _ends(counts),
        "summary": [
            (words, [r.get(key) for r in results])
            for key, words in (
                ("mean_iou", "mean IoU"),
                ("pixel_accuracy", "pixel accuracy"),
                ("mean_accuracy", "mean accuracy"),
                ("frequency_weighted_iou", "frequency-weighted IoU"),
            )
        ],
        "classes": classes,
        "trimaps": _trimaps(results, names),
        "confusion": _confusion(confusion),
        "strip": next((p["strip"] for p in pictures if len(p["strip"]) > 2), []),
        "kinds": [
            (words, [p for p in pictures if p["kind"] == kind])
            for kind, words in (("best", "best images"), ("worst", "worst images"), ("sample", "spread over the set"))
            if any(p["kind"] == kind for p in pictures)
        ],
    }


def _confusion(path: Path) -> str:
    if not path.is_file() or not _inside(path.parent, path.name):
        return ""
    try:
        return _png(files.read_photograph(path))
    except UserError as e:
        _without(path, str(e).removeprefix(f"{path}: "))
        return ""


def _inside(folder: Path, name: str) -> Path | None:
    """The file that a result names, or None if it is not a file within the folder, after following links."""
    path = folder / name
    try:
        within = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        within = False
    if not within:
        say(f"warning: {folder}: names the picture {name[:200]!r}, which is not in it; it is left out")
        return None
    return path if path.is_file() else None


def _picture(folder: Path, entry: dict, images: dict) -> dict | None:
    """One photograph with its truth and its labels without and with CRF, or None if files are missing or damaged."""
    counts = sorted(entry["labels"], key=int)
    names = entry["photo"], entry["truth"], *(entry["labels"][n] for n in counts)
    paths = [path for name in names if (path := _inside(folder, name))]
    if len(paths) < len(names):
        return None
    try:
        palette = files.read_palette(paths[1])
        photo, truth, *labels = files.read_photograph(paths[0]), *(files.read_label(p) for p in paths[1:])
    except UserError as e:
        say(f"warning: {e}; the page omits this picture")
        return None
    if any(one.shape != photo.shape[:2] for one in (truth, *labels)):
        say(f"warning: {paths[0]}: differs in size from its labels; the page omits this picture")
        return None
    step = max(1, math.ceil(max(photo.shape[:2]) / _LARGEST))
    photo, truth, *labels = (a[::step, ::step] for a in (photo, truth, *labels))
    shown = [overlay(photo, one, palette, (), legend=False) for one in labels]
    about = images["images"][entry["index"]] if entry["index"] < len(images["images"]) else {}
    numbers = images.get("crf_iterations", [])  # in the order of the scores; older files may not ascend
    scores = dict(zip(numbers, about.get("mean_iou") or []))
    lowest, highest = int(counts[0]), int(counts[-1])
    return {
        "kind": entry["kind"],
        "name": about.get("name", ""),
        "before": scores.get(lowest),
        "after": scores.get(highest),
        "photo": _jpeg(photo),
        "truth": _jpeg(overlay(photo, truth, palette, (), legend=False)),
        "off": _jpeg(shown[0]),
        "on": _jpeg(shown[-1]),
        "compared": len(labels) > 1,
        "ends": _ends((lowest, highest)),
        "strip": [(n, _png(palette[one])) for n, one in zip(counts, labels)] if entry["kind"] == "sample" else [],
    }


def _ends(counts: Sequence[int]) -> tuple[str, str]:
    """The labels for the fewest and the most iterations of the CRF.

    >>> _ends((0, 10)), _ends((5, 10))
    (('off', 'on'), ('×5', '×10'))
    """
    return ("off" if not min(counts) else f"×{min(counts)}"), ("on" if not min(counts) else f"×{max(counts)}")


def _trimaps(results: Sequence[dict], names: Sequence[str]) -> list[str]:
    charts = []
    for key, words in (("pixel_accuracy", "pixel accuracy [%]"), ("mean_iou", "mean IoU [%]")):
        series = {
            name: [(int(w), 100 * _float(v[key])) for w, v in sorted(r["trimap"].items(), key=lambda e: int(e[0]))]
            for name, r in zip(names, results)
        }
        charts.append(line_chart(series, "width of the band around boundaries [pixels]", words, marks=True))
    return [c for c in charts if c]


def _curves(rows: Sequence[dict]) -> list[tuple[str, str]]:
    """A chart for each scalar of the record; losses together, gradient norm and learning rate by themselves."""
    series: dict[str, list] = {}
    for row in rows:
        for name, value in row.items():
            if name != "step" and isinstance(value, int | float):
                series.setdefault(name, []).append((row["step"], value))
    charts: dict[str, dict[str, list]] = {}
    for name in sorted(series):
        group = name.split("/")[0] + "/loss" if name.split("/")[-1].startswith("loss") else name
        charts.setdefault(group, {})[name.split("/")[-1].replace("_", " ")] = thinned(series[name])
    order = sorted(charts, key=lambda g: (not g.endswith("/loss"), not g.startswith("select"), g))
    return [(group, line_chart(charts[group], "step", group.split("/")[-1].replace("_", " "))) for group in order]


def _groups(config: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """The config's fields by group, as text."""
    top = [(k, _text(v)) for k, v in config.items() if not isinstance(v, dict)]
    groups = [(k, [(f, _text(v)) for f, v in value.items()]) for k, value in config.items() if isinstance(value, dict)]
    return [("run", top), *groups]


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _config(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError("holds no config")
    return value


def _run(entry: dict) -> dict:
    """The fields of an entry of run.json that the template shows, as text."""
    shown: dict[str, object] = {name: str(entry.get(name, "")) for name in ("time", "deeplab_jax", "commit", "python")}
    command, devices, packages = (entry.get(name) for name in ("command", "devices", "packages"))
    shown["command"] = [str(word) for word in command] if isinstance(command, list) else []
    shown["devices"] = [str(device) for device in devices] if isinstance(devices, list) else []
    shown["packages"] = {str(k): str(v) for k, v in packages.items()} if isinstance(packages, dict) else {}
    return entry | shown


def _readable(path: Path, check: Callable):
    """The result of `check` for a JSON file; None if there is none, or if it is damaged, which is reported."""
    try:
        return check(read_json(path))
    except FileNotFoundError:
        return None
    except ValueError as e:
        _without(path, str(e))
        return None


def _without(path: Path, problem: str) -> None:
    say(f"warning: {path}: {problem}; the page omits it")


def _jpeg(image: np.ndarray) -> str:
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def _png(image: np.ndarray) -> str:
    return "data:image/png;base64," + base64.b64encode(files.encode_png(image, compress_level=9)).decode()


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _percent(value: float | None, sign: bool = False) -> str:
    return "–" if value is None else f"{100 * value:{'+' if sign else ''}.1f}"
