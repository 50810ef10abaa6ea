"""The report of a run: everything in a workdir that a person wants to see, as one HTML file."""

import base64
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_text
from deeplab_jax.imaging import files
from deeplab_jax.imaging.overlay import overlay
from deeplab_jax.pages.charts import line_chart, thinned
from deeplab_jax.version import __version__

_LARGEST = 640  # pixels along the longer side of a picture in the page


def build_report(workdir: str | Path) -> str:
    """The page as HTML text, with styles, script, charts and pictures inside it.

    Args:
      workdir: a folder that `main` wrote; what is not there yet (curves, evaluations) is left out of the page.

    Raises:
      UserError: it is not a workdir, or a file in it cannot be read.
    """
    workdir = Path(workdir)
    config = _read_json(workdir / "config.json", "is not a training workdir (no config.json); give --workdir")
    runs = _read_json(workdir / "run.json") if (workdir / "run.json").is_file() else []
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("deeplab_jax.pages", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["percent"] = _percent
    return environment.get_template("report.html").render(
        name=config.get("name") or workdir.name,
        workdir=workdir.name,
        version=__version__,
        run=runs[-1] if runs else {},
        groups=_groups(config),
        curves=_curves(_rows(workdir / "metrics.jsonl")),
        evaluations=[_evaluation(path) for path in _evaluations(workdir / "eval")],
    )


def write_report(workdir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the report, by default to `<workdir>/report.html`; returns its path."""
    out = Path(out) if out else Path(workdir) / "report.html"
    write_text(out, build_report(workdir))
    return out


def _evaluations(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("*.json") if not p.stem.endswith("_images"))


def _evaluation(path: Path) -> dict:
    """What the template shows of one `<split>.json`."""
    results = _read_json(path)
    if not isinstance(results, list) or not results or not all("mean_iou" in r for r in results):
        raise UserError(f"{path}: is not a result of an evaluation; remove it or evaluate again")
    results = sorted(results, key=lambda r: r["crf_iterations"])
    counts = [r["crf_iterations"] for r in results]
    names = [f"CRF ×{n}" if n else "network alone" for n in counts]
    about = path.with_name(f"{path.stem}_images.json")
    images = _read_json(about) if about.is_file() else {"pictures": [], "images": []}
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
        "confusion": _png(np.asarray(Image.open(confusion).convert("RGB"))) if confusion.is_file() else "",
        "strip": next((p["strip"] for p in pictures if len(p["strip"]) > 2), []),
        "kinds": [
            (words, [p for p in pictures if p["kind"] == kind])
            for kind, words in (("best", "best images"), ("worst", "worst images"), ("sample", "spread over the set"))
            if any(p["kind"] == kind for p in pictures)
        ],
    }


def _picture(folder: Path, entry: dict, images: dict) -> dict | None:
    """One photograph with its truth and its labels without and with CRF, or None if its files are gone."""
    counts = sorted(entry["labels"], key=int)
    paths = [folder / entry["photo"], folder / entry["truth"], *(folder / entry["labels"][n] for n in counts)]
    if not all(p.is_file() for p in paths):
        return None
    palette = files.read_palette(paths[1])
    photo, truth, *labels = (_opened(p) for p in paths)
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
    """What the fewest and the most iterations of the CRF are called.

    >>> _ends((0, 10)), _ends((5, 10))
    (('off', 'on'), ('×5', '×10'))
    """
    return ("off" if not min(counts) else f"×{min(counts)}"), ("on" if not min(counts) else f"×{max(counts)}")


def _opened(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


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


def _rows(path: Path) -> list[dict]:
    """The rows of the record; the last may be cut short while a run is going on."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
        except ValueError:
            break
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _groups(config: dict) -> list[tuple[str, list[tuple[str, str]]]]:
    """The config's fields by group, as text."""
    top = [(k, _text(v)) for k, v in config.items() if not isinstance(v, dict)]
    groups = [(k, [(f, _text(v)) for f, v in value.items()]) for k, value in config.items() if isinstance(value, dict)]
    return [("run", top), *groups]


def _text(value) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    return "" if value is None else str(value)


def _read_json(path: Path, missing: str = "is missing"):
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as e:
        raise UserError(f"{path.parent}: {missing}") from e
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot be read as JSON; let the run write it again") from e


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
