"""How close the CRF's plain call is to the sum over all pairs, compared with pydensecrf2.

    python -m experiments.crf_accuracy --data DIR --quick

DIR holds `camvid/val`, `voc_sample/VOCdevkit/VOC2012/JPEGImages` or `densecrf_examples`; whichever exist are used, or
else the photographs in DIR itself. Scores: clusters of colors as labels, sampled at stride 8, upsampled and disturbed;
wrong near edges, as a network's are. The reference is `exact`, all pairs up to 8,000 pixels, above that with a cutoff
of 1e-3. --quick uses one photograph of each folder at 96 x 72 and 160 x 120. --traced measures the lattice of programs
compiled for one size.

Columns: labels that the CRF changes, wrong labels and mean |dQ| of ours and of pydensecrf2, in percent. Writes
crf_accuracy.json and crf_accuracy.md to --out, and the table to stdout. A command that was interrupted continues where
it stopped; one that was finished measures again.
"""

import functools
import itertools
import json
import pathlib
import re
import statistics
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from PIL import Image

from deeplab_jax import cli
from deeplab_jax.console import Meter, say
from deeplab_jax.crf import PRESETS, CRFParams, mean_field
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_text
from experiments.crf_cases import peer, scores

FLAGS = flags.FLAGS

SHOWN = ("photograph", "size", "params", "normalization")
KEYS = (*SHOWN, "traced")
UNFINISHED = "crf_accuracy_unfinished.json"
FOLDERS = ("camvid/val", "voc_sample/VOCdevkit/VOC2012/JPEGImages", "densecrf_examples")
SETTINGS = {name: preset.params for name, preset in PRESETS.items()} | {
    "pydensecrf_readme": CRFParams(10.0, 80.0, 13.0, 3.0, 3.0),
    "(5, 10, 13)": CRFParams(5.0, 10.0, 13.0, 3.0, 3.0),
    "(5, 20, 5)": CRFParams(5.0, 20.0, 5.0, 3.0, 3.0),
    "(5, 160, 20)": CRFParams(5.0, 160.0, 20.0, 3.0, 3.0),
}


def main(argv: Sequence[str]) -> None:
    del argv
    unknown = set(FLAGS.params) - set(SETTINGS)
    if unknown:
        raise UserError(f"--params names {sorted(unknown)}; choose from {', '.join(SETTINGS)}")
    photographs = find_photographs(pathlib.Path(FLAGS.data), 1 if FLAGS.quick else FLAGS.each)
    sizes = ["96x72", "160x120"] if FLAGS.quick else FLAGS.sizes
    out = pathlib.Path(FLAGS.out)
    rows = measure(photographs, sizes, FLAGS.params or list(SETTINGS), FLAGS.normalizations, FLAGS.traced, out)
    text = "\n".join([*HEAD, *map(line, rows), "", *by_setting(rows), "", summary(rows)]) + "\n"
    write_text(out / "crf_accuracy.json", json.dumps(rows, indent=2))
    write_text(out / "crf_accuracy.md", text)
    (out / UNFINISHED).unlink()
    print(text)


def measure(
    photographs: Sequence[pathlib.Path],
    sizes: Sequence[str],
    names: Sequence[str],
    normalizations: Sequence[str],
    traced: bool,
    out: pathlib.Path,
) -> list[dict]:
    """A row for each size, photograph, setting and normalization; those found in `out` are not measured again."""
    try:
        done = {tuple(row[k] for k in KEYS): row for row in json.loads((out / UNFINISHED).read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        done = {}
    rows = []
    meter = Meter(len(sizes) * len(photographs) * len(names) * len(normalizations))
    for size in sizes:
        for path in photographs:
            image = sized(path, size)
            unary = scores(image)
            for name, normalization in itertools.product(names, normalizations):
                about = (path.name, f"{image.shape[1]}x{image.shape[0]}", name, normalization, traced)
                if about in done:
                    meter.known(1)
                else:
                    found = compare(unary, image, name, normalization, traced)
                    done[about] = dict(zip(KEYS, about, strict=True)) | found
                    write_text(out / UNFINISHED, json.dumps(list(done.values())))
                    if meter.tick():
                        say(f"{meter.done} of {meter.total} rows, {meter.left}")
                rows.append(done[about])
    return rows


HEAD = (
    "| photograph | size | params | normalization | changed | ours wrong | theirs | ours dQ | theirs |",
    "|---|---|---|---|---|---|---|---|---|",
)


def compare(unary: np.ndarray, image: np.ndarray, name: str, normalization: str, traced: bool) -> dict[str, float]:
    """Percent of labels changed by the CRF, and wrong labels and mean |dQ| of ours and of pydensecrf2, in percent."""
    params = SETTINGS[name]
    cutoff = None if unary.shape[0] * unary.shape[1] <= 8000 else 1e-3
    exact = np.asarray(
        mean_field(unary, image, params, 10, bilateral="exact", normalization=normalization, cutoff=cutoff)
    )
    run = functools.partial(mean_field, params=params, iterations=10, normalization=normalization)
    if traced:
        run = jax.jit(functools.partial(run, bilateral="permutohedral"))
    ours = np.asarray(run(unary, image))
    row = {"changed": _wrong(-unary, exact), "ours": _wrong(ours, exact), "ours_dq": _dq(ours, exact)}
    theirs = peer(unary, image, params, normalization)
    return row if theirs is None else row | {"theirs": _wrong(theirs, exact), "theirs_dq": _dq(theirs, exact)}


def summary(rows: Sequence[dict]) -> str:
    """The number of rows in which pydensecrf2 is closer, and the median of ours over theirs."""
    both = [r for r in rows if "theirs" in r]
    if not both:
        return f"{len(rows)} rows, pydensecrf2 not installed"
    behind = [r for r in both if r["ours"] > r["theirs"] + 0.02]
    ratio = statistics.median(map(_ratio, both))
    return f"{len(both)} rows: pydensecrf2 closer by more than 0.02 points in {len(behind)}; median ratio {ratio:.2f}"


def line(row: dict) -> str:
    values = (row.get(k, float("nan")) for k in ("changed", "ours", "theirs", "ours_dq", "theirs_dq"))
    return "| " + " | ".join([*(row[k] for k in SHOWN), *(f"{v:.3f}" for v in values)]) + " |"


def by_setting(rows: Sequence[dict]) -> list[str]:
    """A table of medians over photographs and normalizations, ours / theirs, and the greatest ratio of a row."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    lines = ["| params | " + " | ".join(sizes) + " |", "|---" * (len(sizes) + 1) + "|"]
    for name in dict.fromkeys(row["params"] for row in rows):
        cells = []
        for size in sizes:
            some = [r for r in rows if (r["params"], r["size"]) == (name, size) and "theirs" in r]
            ours, theirs = (statistics.median(r[k] for r in some) if some else 0 for k in ("ours", "theirs"))
            worst = max((_ratio(r) for r in some), default=0)
            cells.append(f"{ours:.2f} / {theirs:.2f} ({worst:.2f})" if some else "")
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def _ratio(row: dict) -> float:
    return row["ours"] / max(row["theirs"], 1e-3)


def find_photographs(data: pathlib.Path, each: int) -> list[pathlib.Path]:
    """At most `each` photographs of each of the known folders in `data`, or else of `data` itself.

    Raises:
      UserError: there are none.
    """
    folders = [data / name for name in FOLDERS if (data / name).is_dir()] or [data]
    found = []
    for folder in folders:
        files = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".png") and "anno" not in p.name)
        found += files[:each]
    if not found:
        raise UserError(f"--data {data} holds no photographs (.jpg, .png), nor do {', '.join(FOLDERS)} in it")
    return found


def sized(path: pathlib.Path, size: str) -> np.ndarray:
    """The photograph, uint8 [H, W, 3], at a size such as "96x72", or at its "own".

    Raises:
      UserError: not a size, or not a photograph.
    """
    wanted = None if size == "own" else re.fullmatch(r"(\d+)x(\d+)", size)
    if size != "own" and not wanted:
        raise UserError(f"--sizes: {size!r} is not a size; write width x height, as in 160x120, or own")
    try:
        image = Image.open(path).convert("RGB")
    except OSError as e:
        raise UserError(f"{path}: cannot be read as a photograph ({e})") from e
    if wanted:
        image = image.resize((int(wanted[1]), int(wanted[2])), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _wrong(q: np.ndarray, exact: np.ndarray) -> float:
    return 100 * float((q.argmax(-1) != exact.argmax(-1)).mean())


def _dq(q: np.ndarray, exact: np.ndarray) -> float:
    return 100 * float(np.abs(q - exact).mean())


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "folder with photographs", required=True)
    flags.DEFINE_string("out", "runs/crf_accuracy", "folder for the results")
    flags.DEFINE_list("sizes", ["96x72", "160x120", "250x188", "own"], "width x height, or own")
    flags.DEFINE_list("normalizations", ["symmetric", "after"], "normalizations")
    flags.DEFINE_list("params", [], "names of the settings to run; default all")
    flags.DEFINE_integer("each", 3, "photographs of each folder")
    flags.DEFINE_bool("traced", False, "the lattice of programs for one size, as inside a jit, not the plain call's")
    flags.DEFINE_bool("quick", False, "one photograph of each folder, two small sizes")
    cli.run(main)
