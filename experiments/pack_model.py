"""Packs a training run as a model that the package ships, and measures the packed model.

python -m experiments.pack_model --workdir runs/camvid --out deeplab_jax/box/camvid [--preset PRESET.json]
python -m experiments.pack_model --out deeplab_jax/box/camvid --measure CAMVID

Kernels are rounded to half precision; the second command evaluates the rounded weights, as `predict --model` uses them,
on the data set in CAMVID and writes the figures into the model's card.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from absl import flags

from deeplab_jax import cli
from deeplab_jax.config import fields, load_config, recorded_config
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_text
from deeplab_jax.weights import box
from deeplab_jax.weights.initial import settings_of

FLAGS = flags.FLAGS
MEASURED = "measured.json"
# Fields about file locations on the training machine, not about the training.
PLACES = ("data.dir", "data.cache_dir", "data.images", "data.masks", "data.classes", "init_from")

CARD = """# Street scenes in 11 classes, by a small atrous ResNet with ASPP and a fully connected CRF

- Classes: {classes}.
- Input: photographs from a car's or a pedestrian's height, by day, 0.1 to 0.5 megapixels best; averaged: {views}.
- Weights: {parameters:,} parameters, kernels in half precision, {megabytes:.1f} MB.
- Data: the training split of CamVid (Brostow, Fauqueur and Cipolla 2009), {images} photographs, 480 x 360 pixels,
  labels of 11 classes. CamVid is for non-commercial research; so are these weights.
- Recipe{trained}:

```sh
{command}
python -m experiments.pack_model --workdir {run} --out deeplab_jax/box/{name}{preset}
```

- CRF: {crf}.

{measured}

## What it is not good for

Anything on which somebody's safety depends. It has seen a few drives through one English town, most of them by day: at
night, in rain or snow, indoors, from above, and where streets look otherwise, it is wrong often and with confidence.
Poles and signs are missed more often than found. Every pixel gets one of the 11 classes, whatever is there.
"""


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("workdir", None, "the run to pack; without it, --out is only measured")
    flags.DEFINE_string("out", None, "the model's folder, such as deeplab_jax/box/camvid")
    flags.DEFINE_string(
        "preset", None, "CRF: a preset's name or file; default: the run's searched one, else its config's"
    )
    flags.DEFINE_integer("step", None, "step of the checkpoint; default: the best, or the newest")
    flags.DEFINE_list("scales", None, "test-time scales instead of the run's, such as 0.75,1,1.25")
    flags.DEFINE_bool("mirror", None, "average with the mirrored photograph; default: as in the run")
    flags.DEFINE_string("trained", "", "how long and on what, for the card: '1 h 40 min on two shared CPU cores'")
    flags.DEFINE_string("measure", None, "the data set's folder: evaluate the packed model on --split")
    flags.DEFINE_string("split", "val", "split that --measure evaluates")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    if argv or not FLAGS.out:
        raise UserError("give --out DIR, and --workdir W or --measure DATA")
    out = Path(FLAGS.out)
    if FLAGS.workdir:
        scales = FLAGS.scales and tuple(map(float, FLAGS.scales))
        size = pack(FLAGS.workdir, out, FLAGS.preset, FLAGS.step, scales, FLAGS.mirror, FLAGS.trained)
        print(f"{out}: {size / 1e6:.2f} MB of weights")
    if FLAGS.measure:
        print(measure(out, FLAGS.measure, FLAGS.split))
    return 0


def pack(
    workdir: str | Path,
    out: Path,
    preset: str | None = None,
    step: int | None = None,
    scales: tuple[float, ...] | None = None,
    mirror: bool | None = None,
    trained: str = "",
) -> int:
    """Writes the model of a run and its card; returns the bytes of its weights.

    Raises:
      UserError: there is no such run, or its weights are too large for a shipped model.
    """
    from deeplab_jax.inference.load import load
    from deeplab_jax.runs.checkpoints import load_workdir

    segment = load(workdir, step=step, crf=preset)
    config, variables, meta = load_workdir(workdir, step)
    known = dict(fields(config))
    with config.unlocked():
        for place in (p for p in PLACES if known.get(p)):
            group, _, field = place.rpartition(".")
            (config[group] if group else config)[field] = ""
        config.eval.limit = 0  # the run may have used only a few photographs; the card's figures are of all
        config.eval.scales = config.eval.scales if scales is None else scales
        config.eval.mirror = config.eval.mirror if mirror is None else mirror
    chosen = replace(segment.crf, source=_source(workdir, preset), bilateral=None)  # the config has the filter
    digest = segment.identity[0][-1]
    values = json.loads(json.dumps(config.to_dict()))
    size = box.write(
        out, values, variables, tuple(meta["class_names"]), meta["palette"], chosen, settings_of(config.model), digest
    )
    (out / MEASURED).unlink(missing_ok=True)
    about = {"run": Path(workdir).name, "step": meta["step"], "images": _images(workdir), "trained": trained,
             "preset": Path(preset).name if preset else ""}  # fmt: skip
    write_text(out / "recipe.json", json.dumps(about, indent=1) + "\n")
    write_card(out)
    return size


def measure(out: Path, data: str, split: str) -> str:
    """Evaluates a packed model on a split of its data set, writes the figures into its card, returns the table."""
    from deeplab_jax.data import open_dataset
    from deeplab_jax.evaluation.evaluate import evaluate, format_results
    from deeplab_jax.inference.load import load_box

    config = recorded_config(box.read(out).config)
    segment = load_box(out)
    config.data.dir = str(data)
    config.eval.crf_iterations = (0, segment.crf_iterations)
    results = evaluate(segment.segmenter, open_dataset(config.data, split, seed=config.seed), config, split=split)
    kept = [
        {k: r[k] for k in ("crf_iterations", "mean_iou", "pixel_accuracy", "per_class_iou", "images")} for r in results
    ]
    write_text(out / MEASURED, json.dumps({"split": split, "results": kept}, indent=1) + "\n")
    write_card(out)
    return format_results(results)


def write_card(out: Path) -> None:
    """Writes card.md from the contents of the folder."""
    boxed = box.read(out)
    config = recorded_config(boxed.config)
    about = json.loads((out / "recipe.json").read_text())
    views = " and ".join(
        [f"scale{'s' * (len(config.eval.scales) > 1)} {', '.join(f'{s:g}' for s in config.eval.scales)}"]
        + ["mirror images"] * config.eval.mirror
    )
    preset = boxed.preset
    values = [
        f"{name} {np.round(getattr(preset.params, name), 3).tolist()}" for name in preset.params.__dataclass_fields__
    ]
    text = CARD.format(
        classes=", ".join(boxed.class_names),
        views=views,
        parameters=sum(np.size(leaf) for leaf in _leaves(boxed.variables["params"])),
        megabytes=(out / box.WEIGHTS).stat().st_size / 1e6,
        images=about["images"] or "",
        trained=f", {about['trained']}, {about['step']} steps" if about["trained"] else f", {about['step']} steps",
        command=_command(config, f"runs/{about['run']}"),
        run=f"runs/{about['run']}",
        name=out.name,
        preset=f" --preset deeplab_jax/box/{out.name}/crf_preset.json" if about["preset"] else "",
        crf=f"{preset.iterations} iterations, {', '.join(values)} ({preset.source})",
        measured=_figures(out),
    )
    write_text(out / box.CARD, text)


def _command(config, run: str) -> str:
    """The command that trains this config in `run`: configs/camvid.py, with the differences as flags."""
    shipped = dict(fields(load_config("camvid")))
    changed = [
        shlex.quote(f"--config.{name}={_as_flag(value)}")
        for name, value in fields(config)
        if name in shipped and value != shipped[name] and name not in (*PLACES, "name")
    ]
    return " \\\n    ".join(
        [f"python -m deeplab_jax.main --config configs/camvid.py --config.data.dir=CAMVID --workdir {run}", *changed]
    )


def _as_flag(value: object) -> str:
    """A field's value as a flag has it: numbers and names of a tuple separated by commas."""
    if not isinstance(value, tuple) or any(isinstance(part, tuple) for part in value):
        return str(value)
    return ",".join(map(str, value)) + "," * (len(value) == 1)


def _figures(out: Path) -> str:
    try:
        found = json.loads((out / MEASURED).read_text())
    except OSError:
        return "Not measured yet."
    results = found["results"]
    heads = ["network" if not r["crf_iterations"] else f"with CRF, {r['crf_iterations']} iterations" for r in results]
    rows = [("mean IoU", [r["mean_iou"] for r in results])]
    rows += [(name, [r["per_class_iou"][name] for r in results]) for name in results[0]["per_class_iou"]]
    lines = [
        f"Measured on split `{found['split']}`, {results[0]['images']} photographs, after rounding, percent IoU:",
        "",
        f"| | {' | '.join(heads)} |",
        f"|---|{'---|' * len(heads)}",
    ]
    lines += [
        f"| {name} | {' | '.join('' if v is None else f'{100 * v:.1f}' for v in cells)} |" for name, cells in rows
    ]
    return "\n".join(lines)


def _leaves(tree) -> list:
    return [leaf for value in tree.values() for leaf in (_leaves(value) if isinstance(value, dict) else [value])]


def _source(workdir: str | Path, preset: str | None) -> str:
    from deeplab_jax.crf.setting import read_preset

    for file in (preset, Path(workdir) / box.PRESET):
        if file and str(file).endswith(".json") and Path(file).is_file():
            return read_preset(file).source
    return preset or "the run's config"


def _images(workdir: str | Path) -> int:
    try:
        return int(json.loads((Path(workdir) / "run.json").read_text())[-1]["train_images"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main)
