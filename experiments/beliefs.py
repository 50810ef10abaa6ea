"""v1 Figure 2: the score map and the belief map of one class after each mean-field iteration.

  python -m experiments.beliefs --config shapes --config.num_steps=200
  python -m experiments.beliefs --config camvid --workdir runs/camvid --photograph street.png --class_name car

The belief is the marginal q of the class, the softmax's output; the score is its logarithm, the softmax's input up
to a constant per pixel. Without --workdir the config is trained first; without --photograph an image of its
evaluation split is used, and the class is the one that the CRF changes most. The paper prints maps without numbers: its
column stays empty.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError
from experiments import common

FLAGS = flags.FLAGS

LOWEST_SCORE = -10.0  # of the score maps' colors: a belief of 0.00005


def choose_class(frames: np.ndarray, names: Sequence[str], wanted: str = "") -> int:
    """The id of the class `wanted`, by default the one whose marginals change most from the first to the last map.

    Args:
      frames: [T + 1, H, W, C] marginals.
      names: C names.
      wanted: one of them, or "".

    Raises:
      UserError: there is no such class.
    """
    if not wanted:
        return int(np.abs(frames[-1] - frames[0]).sum((0, 1)).argmax())
    if wanted not in names:
        raise UserError(f"--class_name={wanted}: must be one of {', '.join(names)}")
    return list(names).index(wanted)


def figures_of(beliefs: np.ndarray, chosen: int) -> list[tuple]:
    """The changes over the iterations, one row each.

    Args:
      beliefs: [T + 1, H, W, C] marginals.
      chosen: id of the class shown.

    Returns:
      (iteration, the paper's value: None, mean entropy in nats, mean |q - q before| times 100, percent of labels that
      differ from the network's, percent of the image labelled as the class).
    """
    rows = []
    first = beliefs[0].argmax(-1)
    for n, q in enumerate(beliefs):
        labels = q.argmax(-1)
        entropy = abs(float((q * np.log(np.maximum(q, 1e-12))).sum(-1).mean()))
        change = 100 * float(np.abs(q - beliefs[n - 1]).mean()) if n else None
        differ, covered = (100 * float(found.mean()) for found in (labels != first, labels == chosen))
        rows.append((str(n), None, f"{entropy:.4f}", change, differ, covered))
    return rows


def picture(image: np.ndarray, beliefs: np.ndarray, iterations: Sequence[int], name: str) -> np.ndarray:
    """The photograph, with scores and below them beliefs of one class at some iterations.

    Args:
      image: [H, W, 3] uint8 RGB.
      beliefs: [T + 1, H, W] marginals of the class.
      iterations: those shown.
      name: the name of the class.

    Returns:
      [h, w, 3] uint8.
    """
    from deeplab_jax.imaging.overlay import heat, side_by_side, stack

    titles = ["network" if n == 0 else f"{n} iteration{'s' if n > 1 else ''}" for n in iterations]
    scores = [heat(1 - np.log(np.maximum(beliefs[n], 1e-30)) / LOWEST_SCORE) for n in iterations]
    maps = [heat(beliefs[n]) for n in iterations]
    empty = np.full_like(image, 250)
    return stack(
        [
            side_by_side([image, *scores], [f"score of '{name}'", *titles]),
            side_by_side([empty, *maps], [f"belief in '{name}'", *titles]),
        ]
    )


def main(argv: Sequence[str]) -> None:
    del argv
    from deeplab_jax.data import open_dataset
    from deeplab_jax.imaging.files import read_photograph, write_png
    from deeplab_jax.inference.from_config import create_segmenter
    from deeplab_jax.runs.checkpoints import load_workdir
    from experiments.runs import own_preset, trained

    config, out = common.load_config(), Path(FLAGS.out)
    workdir = Path(FLAGS.workdir) if FLAGS.workdir else trained(config, out / "run")
    own, variables, meta = load_workdir(workdir)
    preset = FLAGS.preset or own_preset(workdir)
    if preset:
        own.crf.preset = preset
        variables["params"].pop("crf", None)
    segmenter = create_segmenter(own, variables, meta["class_names"], np.asarray(meta["palette"], np.uint8))
    if FLAGS.photograph:
        image, where = read_photograph(FLAGS.photograph), FLAGS.photograph
    else:
        dataset = open_dataset(config.data, config.eval.split, config.seed)
        if FLAGS.image >= len(dataset):
            raise UserError(f"--image={FLAGS.image}: split '{config.eval.split}' has {len(dataset)} images")
        example = dataset[FLAGS.image]
        image, where = example.image, example.name
    shown = sorted({0, *map(int, FLAGS.shown)})
    counts = range(max(shown) + 1)
    frames = np.stack(segmenter.refine(segmenter.scores([image])[0], image, counts))
    chosen = choose_class(frames, meta["class_names"], FLAGS.class_name)
    name = meta["class_names"][chosen]
    rows = figures_of(frames, chosen)
    columns = ("iteration", "paper", "mean entropy [nats]", "mean |change of q| [%]", "labels changed [%]",
               f"labelled '{name}' [%]")  # fmt: skip
    title = f"Mean field on '{where}' (v1 Figure 2)"
    table = common.Table(title, columns, rows)
    write_png(out / "beliefs.png", picture(image, frames[..., chosen], shown, name))
    data = {"image": where, "class": name, "rows": rows}
    common.write(out, "beliefs", [table], data)


if __name__ == "__main__":
    common.define_flags("shapes", "beliefs")
    flags.DEFINE_string("workdir", "", "a trained run; none: train the config first")
    flags.DEFINE_string(
        "preset", "", "CRF parameters: a published preset or a preset file; default: the run's own, searched or learned"
    )
    flags.DEFINE_string("photograph", "", "file; none: --image of the evaluation split")
    flags.DEFINE_integer("image", 0, "number of the image in the evaluation split", lower_bound=0)
    flags.DEFINE_string("class_name", "", "the class; none: the one that the CRF changes most")
    flags.DEFINE_list("shown", ["1", "2", "4", "10"], "iterations shown beside the network's maps")
    cli.run(main)
