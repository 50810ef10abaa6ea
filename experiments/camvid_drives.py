"""CamVid on a drive that training never saw: leave one drive out, mean over the three.

  python -m experiments.camvid_drives --config.data.dir=PATH/camvid
  python -m experiments.camvid_drives --config.data.dir=PATH/camvid --screen=3 --idea decay \
      --config.optimizer.weight_decay=1e-3

CamVid's validation photographs share a drive with its training photographs, so results on them look too good. Here the
training photographs of one drive (0001TP, 0006R0, 0016E5, by file name) are measured, and the network and the CRF's
parameters come from the other two; three times. --screen=3 uses a third of the schedule and the first seed, to screen
ideas: give each a name with --idea and its changes as --config.field=value. --left_out does some of the drives, so that
several machines or cores can share the work. All ideas in --out are in the table. A stopped command continues where it
was. --config.crf.iterations=0 --config.search.images=0 --config.eval.crf_iterations=0, measure the network alone.
Neither the validation nor the test photographs are used.
"""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from absl import flags
from filelock import FileLock
from ml_collections import ConfigDict

from deeplab_jax import cli
from deeplab_jax.data.builders.base import read_names
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_json, write_text
from experiments import common

FLAGS = flags.FLAGS

DRIVES = ("0001TP", "0006R0", "0016E5")
TRIMAP = "3"


def without_drive(raw: Path, drive: str, drives: Sequence[str], folder: Path) -> Path:
    """A CamVid folder of links in which `drive`'s training photographs are the validation split.

    Args:
      raw: SegNet's CamVid folder; only its training photographs are used.
      drive: the beginning of its photographs' names.
      drives: all of them; photographs of none of these are left out.
      folder: created here.

    Returns:
      `folder`, for `config.data.dir`.

    Raises:
      UserError: there is no list of training photographs, or none belongs to the drive or to another one.
    """
    listed = raw / "train.txt"
    if not listed.is_file():
        raise UserError(f"{listed}: no such file; config.data.dir must name SegNet's CamVid folder")
    names = [Path(line.split()[0]).stem for line in read_names(listed)]
    kept = [n for n in names if n.startswith(tuple(drives)) and not n.startswith(drive)]
    left_out = [n for n in names if n.startswith(drive)]
    for what, found in ((f"of drive {drive}", left_out), (f"of a drive other than {drive}", kept)):
        if not found:
            raise UserError(f"{listed}: names no photograph {what}; check --drives")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        for kind in ("", "annot"):
            link, target = folder / f"{split}{kind}", (raw / f"train{kind}").resolve()
            if link.is_symlink() and Path(os.readlink(link)) != target:  # the data are elsewhere now
                link.unlink()
            if not link.is_symlink():
                link.symlink_to(target, target_is_directory=True)
    write_text(folder / "train.txt", "".join(f"{n}\n" for n in kept))
    write_text(folder / "val.txt", "".join(f"{n}\n" for n in left_out))
    return folder


def screened(config: ConfigDict, divisor: int) -> ConfigDict:
    """A copy with a part of the schedule, such as a third; fields counted in steps shrink with it."""
    shorter = {name: value // divisor for name, value in (
        ("num_steps", config.num_steps),
        ("eval.every", config.eval.every),
        ("checkpoint.every", config.checkpoint.every),
        ("optimizer.step_size", config.optimizer.step_size),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps),
    )}  # fmt: skip
    shorter["checkpoint.every"] = max(1, shorter["checkpoint.every"])
    return common.changed(config, shorter)


def experiment(
    config: ConfigDict, out: Path, idea: str, *, drives: Sequence[str], left_out: Sequence[str], seeds: Sequence[int]
) -> list[dict]:
    """Trains and measures each missing drive and seed of an idea, in `out/idea`.

    Args:
      config: with the idea's changes.
      out: the folder of all ideas.
      idea: its name.
      drives: all drives.
      left_out: which of them to leave out, one after another.
      seeds: one network each.

    Returns:
      One dict per drive and seed: `drive`, `seed`, `results`, see `deeplab_jax.evaluation.evaluate`.

    Raises:
      UserError: the data are not CamVid's, or a drive has no photographs.
    """
    if config.data.name != "camvid" or not config.data.dir:
        raise UserError("--config.data.dir is not set to SegNet's CamVid folder, whose drives are left out one by one")
    raw = Path(config.data.dir).expanduser()
    found = []
    for seed in seeds:
        for drive in left_out:
            data = without_drive(raw, drive, drives, out / "drives" / drive)
            overrides = {"seed": seed, "data.dir": str(data), "eval.split": "val"}
            own = common.changed(config, overrides)
            results = common.run(own, out / idea / f"{drive}_{seed}")
            found.append({"drive": drive, "seed": seed, "results": results})
    return found


def figures(found: Sequence[Mapping]) -> dict[str, dict[str, float | None]]:
    """Percent by drive, and their mean as "mean": `network`, `crf`, `trimap` of the last; means over seeds.

    Args:
      found: the result of `experiment`. Without a CRF, `crf` is None and `trimap` the network's.
    """
    by_drive: dict[str, dict[str, float | None]] = {}
    for drive in dict.fromkeys(entry["drive"] for entry in found):
        ends = [[common.at_iterations(e["results"], which) for which in (0, -1)] for e in found if e["drive"] == drive]
        refined = all(last for _, last in ends)
        by_drive[drive] = {
            "network": _percent(first["mean_iou"] for first, _ in ends),
            "crf": _percent(last["mean_iou"] for _, last in ends) if refined else None,
            "trimap": _percent((last or first)["trimap"][TRIMAP]["mean_iou"] for first, last in ends),
        }
    columns = {name: [v[name] for v in by_drive.values()] for name in ("network", "crf", "trimap")}
    by_drive["mean"] = {name: None if None in values else statistics.fmean(values) for name, values in columns.items()}
    return by_drive


def _percent(shares: Iterable[float]) -> float:
    return 100 * statistics.fmean(shares)


def table(ideas: Mapping[str, Mapping]) -> common.Table:
    """A line per idea and drive, and each idea's mean.

    Args:
      ideas: by name, the record that `main` writes: `found`, `steps` and `changes`.
    """
    rows = []
    for name, idea in ideas.items():
        seeds = len({entry["seed"] for entry in idea["found"]})
        for drive, v in figures(idea["found"]).items():
            gain = None if v["crf"] is None else v["crf"] - v["network"]
            rows.append((name, drive, idea["steps"], seeds, v["network"], v["crf"], gain, v["trimap"]))
    notes = [f"{name}: {idea['changes']}" for name, idea in ideas.items() if idea["changes"]]
    columns = ("idea", "drive left out", "steps", "seeds", "network", "with CRF", "gain", f"{TRIMAP} px")
    return common.Table("CamVid, mean IoU in percent on a drive left out of training", columns, rows, notes)


def main(argv: Sequence[str]) -> None:
    config, out = common.load_config(), Path(FLAGS.out)
    del argv
    if int(TRIMAP) not in config.eval.trimap_widths:
        config = common.changed(config, {"eval.trimap_widths": (*config.eval.trimap_widths, int(TRIMAP))})
    if 0 not in config.eval.crf_iterations:
        raise UserError("config.eval.crf_iterations: must have a 0, the network alone, with which the CRF is compared")
    seeds = [int(seed) for seed in FLAGS.seeds]
    folder = out / f"screened_{FLAGS.screen}" if FLAGS.screen > 1 else out
    if FLAGS.screen > 1:
        config, seeds = screened(config, FLAGS.screen), seeds[:1]
    unknown = sorted(set(FLAGS.left_out) - set(FLAGS.drives))
    if unknown:
        raise UserError(f"--left_out={','.join(unknown)}: not among --drives={','.join(FLAGS.drives)}")
    left_out = FLAGS.left_out or FLAGS.drives
    found = experiment(config, folder, FLAGS.idea, drives=FLAGS.drives, left_out=left_out, seeds=seeds)
    changes = " ".join(part for part in common.shown_command().split() if part.startswith("--config."))
    record = {"steps": config.num_steps, "changes": changes}
    kept = folder / FLAGS.idea / "found.json"
    with FileLock(folder / "found.lock"):  # several commands may do some of the drives each
        before = json.loads(kept.read_text()) if kept.is_file() else {"found": []}
        if record == {name: before.get(name) for name in record}:
            done = [(entry["drive"], entry["seed"]) for entry in found]
            found += [entry for entry in before["found"] if (entry["drive"], entry["seed"]) not in done]
        write_json(kept, {"found": sorted(found, key=lambda entry: (entry["seed"], entry["drive"])), **record})
        ideas = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/found.json"))}
        common.write(folder, "camvid_drives", [table(ideas)], {"ideas": ideas})


if __name__ == "__main__":
    common.define_flags("camvid", "camvid_drives")
    flags.DEFINE_list("drives", list(DRIVES), "beginnings of the photographs' names, one drive each")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "one network per drive and seed")
    flags.DEFINE_string("idea", "shipped", "name of the idea")
    flags.DEFINE_list("left_out", [], "the drives to leave out, one after another; default: all")
    flags.DEFINE_integer("screen", 1, "divide the schedule by this and use the first seed; 1 = in full", lower_bound=1)
    cli.run(main)
