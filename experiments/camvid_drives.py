"""CamVid on a drive that training never saw: leave one drive out, mean over the three.

  python -m experiments.camvid_drives --config.data.dir=PATH/camvid
  python -m experiments.camvid_drives --config.data.dir=PATH/camvid --screen --idea decay \
      --config.optimizer.weight_decay=1e-3

CamVid's validation photographs share a drive with its training photographs, so results on them look too good. Here the
training photographs of one drive (0001TP, 0006R0, 0016E5, by file name) are measured, and the network and the CRF's
parameters come from the other two; three times. --screen uses a third of the schedule and the first seed, to screen
ideas: give each a name with --idea and its changes as --config.field=value. All ideas in --out are in the table. A
stopped command continues where it was. Neither the validation nor the test photographs are used.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from deeplab_jax import cli
from deeplab_jax.data.builders.base import read_names
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_json, write_text
from experiments import common

FLAGS = flags.FLAGS

DRIVES = ("0001TP", "0006R0", "0016E5")
SCREEN = 3  # a screened idea gets this fraction of the schedule
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
            link = folder / f"{split}{kind}"
            if not link.exists():
                link.symlink_to((raw / f"train{kind}").resolve(), target_is_directory=True)
    write_text(folder / "train.txt", "".join(f"{n}\n" for n in kept))
    write_text(folder / "val.txt", "".join(f"{n}\n" for n in left_out))
    return folder


def screened(config: ConfigDict) -> ConfigDict:
    """A copy with a third of the schedule; fields counted in steps shrink with it."""
    shorter = {name: value // SCREEN for name, value in (
        ("num_steps", config.num_steps),
        ("eval.every", config.eval.every),
        ("checkpoint.every", config.checkpoint.every),
        ("optimizer.step_size", config.optimizer.step_size),
        ("optimizer.warmup_steps", config.optimizer.warmup_steps),
    )}  # fmt: skip
    shorter["checkpoint.every"] = max(1, shorter["checkpoint.every"])
    return common.changed(config, shorter)


def experiment(config: ConfigDict, out: Path, idea: str, *, drives: Sequence[str], seeds: Sequence[int]) -> list[dict]:
    """Trains and measures each missing drive and seed of an idea, in `out/idea`.

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
        for drive in drives:
            data = without_drive(raw, drive, drives, out / "drives" / drive)
            overrides = {"seed": seed, "data.dir": str(data), "eval.split": "val"}
            own = common.changed(config, overrides)
            results = common.run(own, out / idea / f"{drive}_{seed}")
            found.append({"drive": drive, "seed": seed, "results": results})
    return found


def figures(found: Sequence[Mapping]) -> dict[str, dict[str, float]]:
    """Percent by drive, and their mean as "mean": `network`, `crf`, `trimap` with the CRF; means over seeds.

    Args:
      found: the result of `experiment`.
    """
    by_drive: dict[str, dict[str, float]] = {}
    for drive in dict.fromkeys(entry["drive"] for entry in found):
        ends = [[common.at_iterations(e["results"], which) for which in (0, -1)] for e in found if e["drive"] == drive]
        by_drive[drive] = {
            "network": 100 * statistics.fmean(first["mean_iou"] for first, _ in ends),
            "crf": 100 * statistics.fmean(last["mean_iou"] for _, last in ends),
            "trimap": 100 * statistics.fmean(last["trimap"][TRIMAP]["mean_iou"] for _, last in ends),
        }
    names = ("network", "crf", "trimap")
    by_drive["mean"] = {name: statistics.fmean(v[name] for v in by_drive.values()) for name in names}
    return by_drive


def table(ideas: Mapping[str, Mapping]) -> common.Table:
    """A line per idea and drive, and each idea's mean.

    Args:
      ideas: by name, the record that `main` writes: `found`, `steps` and `changes`.
    """
    rows = []
    for name, idea in ideas.items():
        seeds = len({entry["seed"] for entry in idea["found"]})
        for drive, v in figures(idea["found"]).items():
            rows.append(
                (name, drive, idea["steps"], seeds, v["network"], v["crf"], v["crf"] - v["network"], v["trimap"])
            )
    notes = [f"{name}: {idea['changes']}" for name, idea in ideas.items() if idea["changes"]]
    columns = ("idea", "drive left out", "steps", "seeds", "network", "with CRF", "gain", f"{TRIMAP} px with CRF")
    return common.Table("CamVid, mean IoU in percent on a drive left out of training", columns, rows, notes)


def main(argv: Sequence[str]) -> None:
    config, out = common.load_config(), Path(FLAGS.out)
    del argv
    if int(TRIMAP) not in config.eval.trimap_widths:
        config = common.changed(config, {"eval.trimap_widths": (*config.eval.trimap_widths, int(TRIMAP))})
    seeds = [int(seed) for seed in FLAGS.seeds]
    folder = out / "screened" if FLAGS.screen else out
    if FLAGS.screen:
        config, seeds = screened(config), seeds[:1]
    found = experiment(config, folder, FLAGS.idea, drives=FLAGS.drives, seeds=seeds)
    changes = " ".join(part for part in common.shown_command().split() if part.startswith("--config."))
    write_json(folder / FLAGS.idea / "found.json", {"found": found, "steps": config.num_steps, "changes": changes})
    ideas = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/found.json"))}
    common.write(folder, "camvid_drives", [table(ideas)], {"ideas": ideas})


if __name__ == "__main__":
    common.define_flags("camvid", "camvid_drives")
    flags.DEFINE_list("drives", list(DRIVES), "beginnings of the photographs' names, one drive each")
    flags.DEFINE_list("seeds", ["0", "1", "2"], "one network per drive and seed")
    flags.DEFINE_string("idea", "shipped", "name of the idea")
    flags.DEFINE_bool("screen", False, "a third of the schedule, the first seed")
    cli.run(main)
