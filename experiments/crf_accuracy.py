"""How close the CRF's plain call is to the sum over all pairs, compared with pydensecrf2.

    PYTHONPATH=. python experiments/crf_accuracy.py --data DIR --quick

DIR holds `camvid/val`, `voc_sample/VOCdevkit/VOC2012/JPEGImages` or `densecrf_examples`; whichever exist are used.
Scores: clusters of colours as labels, sampled at stride 8, upsampled and disturbed; wrong near edges, as a network's
are. The reference is `exact`, all pairs up to 8,000 pixels, above that with a cutoff of 1e-3. --quick uses one
photograph of each folder at 96 x 72 and 160 x 120. --traced measures the lattice of programs compiled for one size.

Columns: labels that the CRF changes, wrong labels and mean |dQ| of ours and of pydensecrf2, in percent. Writes
crf_accuracy.json and crf_accuracy.md to --out, and the table to stdout.
"""

import functools
import json
import pathlib
import statistics
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from absl import flags
from PIL import Image

from deeplab_jax import cli
from deeplab_jax.crf import PRESETS, CRFParams, mean_field
from deeplab_jax.errors import UserError
from experiments.crf_cases import peer, scores

FLAGS = flags.FLAGS
flags.DEFINE_string("data", None, "folder with photographs", required=True)
flags.DEFINE_string("out", "runs/crf_accuracy", "folder for the results")
flags.DEFINE_list("sizes", ["96x72", "160x120", "250x188", "own"], "width x height, or own")
flags.DEFINE_list("normalizations", ["symmetric", "after"], "normalizations")
flags.DEFINE_list("params", [], "names of the settings to run; default all")
flags.DEFINE_integer("each", 3, "photographs of each folder")
flags.DEFINE_bool("traced", False, "the lattice of programs for one size, as inside a jit, not the plain call's")
flags.DEFINE_bool("quick", False, "one photograph of each folder, two small sizes")

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
    photographs = list(_photographs(pathlib.Path(FLAGS.data), 1 if FLAGS.quick else FLAGS.each))
    if not photographs:
        raise UserError(f"--data {FLAGS.data} holds none of {', '.join(FOLDERS)}")
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    sizes = ["96x72", "160x120"] if FLAGS.quick else FLAGS.sizes
    rows = []
    for size in sizes:
        for path in photographs:
            image = _sized(path, size)
            unary = scores(image)
            for name in FLAGS.params or SETTINGS:
                for normalization in FLAGS.normalizations:
                    row = {"photograph": path.stem, "size": f"{image.shape[1]}x{image.shape[0]}", "params": name}
                    rows.append(row | {"normalization": normalization, **compare(unary, image, name, normalization)})
                    print(line(rows[-1]), flush=True)
                    (out / "crf_accuracy.json").write_text(json.dumps(rows, indent=2))
    text = "\n".join([*HEAD, *map(line, rows), "", summary(rows)]) + "\n"
    (out / "crf_accuracy.md").write_text(text)
    print(text)


HEAD = (
    "| photograph | size | params | normalization | changed | ours wrong | theirs | ours dQ | theirs |",
    "|---|---|---|---|---|---|---|---|---|",
)


def compare(unary: np.ndarray, image: np.ndarray, name: str, normalization: str) -> dict[str, float]:
    """Percent of labels changed by the CRF, and wrong labels and mean |dQ| of ours and of pydensecrf2, in percent."""
    params = SETTINGS[name]
    cutoff = None if unary.shape[0] * unary.shape[1] <= 8000 else 1e-3
    exact = np.asarray(
        mean_field(unary, image, params, 10, bilateral="exact", normalization=normalization, cutoff=cutoff)
    )
    run = functools.partial(mean_field, params=params, iterations=10, normalization=normalization)
    if FLAGS.traced:
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
    ratio = statistics.median(r["ours"] / max(r["theirs"], 1e-3) for r in both)
    return f"{len(both)} rows: pydensecrf2 closer by more than 0.02 points in {len(behind)}; median ratio {ratio:.2f}"


def line(row: dict) -> str:
    values = (row.get(k, float("nan")) for k in ("changed", "ours", "theirs", "ours_dq", "theirs_dq"))
    return "| " + " | ".join([*(row[k] for k in KEYS), *(f"{v:.3f}" for v in values)]) + " |"


KEYS = ("photograph", "size", "params", "normalization")


def _photographs(data: pathlib.Path, each: int) -> Iterator[pathlib.Path]:
    for folder in FOLDERS:
        found = sorted(p for p in (data / folder).glob("*") if p.suffix in (".jpg", ".png") and "anno" not in p.name)
        yield from found[:each]


def _sized(path: pathlib.Path, size: str) -> np.ndarray:
    image = Image.open(path).convert("RGB")
    if size != "own":
        image = image.resize(tuple(int(n) for n in size.split("x")), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _wrong(q: np.ndarray, exact: np.ndarray) -> float:
    return 100 * float((q.argmax(-1) != exact.argmax(-1)).mean())


def _dq(q: np.ndarray, exact: np.ndarray) -> float:
    return 100 * float(np.abs(q - exact).mean())


if __name__ == "__main__":
    cli.run(main)
