"""Searches the CRF's parameters on held-out images, coarse to fine, as the papers did.

  python -m deeplab_jax.crf_search --config FILE --workdir W [--images 100] [--objective mean_iou|trimap]

The network's scores are computed once and kept in W/crf_search; a stopped search continues where it was. The images
are those held out by config.data.holdout, else the evaluation split. Writes W/crf_search/table.txt,
table.csv and heatmap.png, and W/crf_preset.json for
  main --config.crf.preset=W/crf_preset.json    predict --preset W/crf_preset.json    refine --preset W/crf_preset.json
Each parameter's coarse values can be given: --bilateral_xy_std 30,40,50. With --thin pole,sign the bilateral weight of
those classes is searched separately from the others'. With --distributed (automatic under SLURM and Open MPI) several
processes share the images (docs/scaling.md).
"""

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli, crf_flags, process_flags
from deeplab_jax.crf_flags import FIELDS, NORMALIZATIONS
from deeplab_jax.errors import UserError

OBJECTIVES, GRIDS = ("mean_iou", "trimap", "both"), ("v1", "v2")  # those of search.grid, without its imports

WRITTEN = ("table.txt", "table.csv", "heatmap.png", "groups.txt", "learned.json", "results.jsonl")  # in W/crf_search

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("config", None, "config file or shipped name: the data; the network is the workdir's")
    flags.DEFINE_string("workdir", None, "folder of the training run; results go there too")
    flags.DEFINE_integer("images", 100, "number of held-out images, spread over the list", lower_bound=1)
    flags.DEFINE_string("split", "", "split to use; default: holdout if config.data.holdout is set, else eval.split")
    flags.DEFINE_enum("objective", "mean_iou", OBJECTIVES, "what to maximize")
    flags.DEFINE_integer("trimap_width", 5, "pixels around the true boundaries that count as trimap", lower_bound=1)
    flags.DEFINE_enum("grid", "v2", GRIDS, "the paper whose coarse grid is searched")
    for name in FIELDS:
        flags.DEFINE_list(name, None, "coarse values, separated by commas; default: the grid's")
    flags.DEFINE_list(
        "thin", [], "names of thin classes, whose bilateral weight is searched as a multiple of the others'"
    )
    flags.DEFINE_list("thin_factor", ["1", "2", "3", "4"], "coarse values of that multiple")
    flags.DEFINE_list("normalization", None, "normalization of the kernels, or several to try; default: the config's")
    flags.DEFINE_integer(
        "passes", 2, "1 = coarse only; each further pass halves the steps around the best", lower_bound=1
    )
    flags.DEFINE_bool("exhaustive", False, "measure every setting on every image, not only the promising ones")
    flags.DEFINE_integer(
        "learn", 0, "then learn one weight per kernel and class in this many passes over the images", lower_bound=0
    )
    flags.DEFINE_integer("iterations", None, "mean-field iterations; default: config.crf.iterations", lower_bound=1)
    process_flags.define_for_shares()
    crf_flags.define_bilateral("filter; default: config.crf.bilateral")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    if argv:
        raise UserError(f"{argv[0]}: not understood; all arguments are flags (see --help)")
    if not FLAGS.workdir:
        raise UserError("--workdir is missing; name the folder of the training run")
    config = cli.config_from_flags(FLAGS.config)
    from deeplab_jax.search import grid as grids

    grid = dict(grids.GRIDS[FLAGS.grid])
    for name in FIELDS:
        given = FLAGS[name].value
        if given is not None:
            grid[name] = numbers(name, given)
    grid["thin_factor"] = numbers("thin_factor", FLAGS.thin_factor)
    grid["normalization"] = tuple(FLAGS.normalization or (config.crf.normalization,))
    for name in grid["normalization"]:
        if name not in NORMALIZATIONS:
            raise UserError(f"--normalization={name}: must be among {', '.join(NORMALIZATIONS)}")
    from deeplab_jax.config import files_named, find_config
    from deeplab_jax.imaging.listing import check_outputs
    from deeplab_jax.runs.lock import writing
    from deeplab_jax.search.workdir import search_workdir  # needs the extra [train]

    workdir = Path(FLAGS.workdir)
    found = workdir / "crf_preset.json"  # the search may start from an earlier one
    read = [path for path in files_named(config) if path.resolve() != found.resolve()]
    written = [workdir / "crf_search" / name for name in WRITTEN]
    check_outputs([found, *written], [*read, find_config(FLAGS.config)])
    trained = (Path(FLAGS.workdir) / "config.json").is_file()  # otherwise the search reports the error
    job = process_flags.job(FLAGS)
    with contextlib.ExitStack() as stack:
        if trained:
            stack.enter_context(job.meeting(workdir / "crf_search" / ".processes"))
            stack.enter_context(writing(FLAGS.workdir) if job.is_first else contextlib.nullcontext())
        preset, table = search_workdir(
            config,
            FLAGS.workdir,
            grid,
            images=FLAGS.images,
            split=FLAGS.split,
            objective=FLAGS.objective,
            trimap_width=FLAGS.trimap_width,
            passes=FLAGS.passes,
            exhaustive=FLAGS.exhaustive,
            thin=FLAGS.thin,
            learn=FLAGS.learn,
            iterations=FLAGS.iterations or max(config.crf.iterations, 1),
            bilateral=FLAGS.bilateral or config.crf.bilateral,
            say=lambda line: print(line, flush=True),
            job=job,
        )

        def sum_up(reports: Sequence[object]) -> int:
            print(f"\n{table}\n\nbest: {FLAGS.workdir}/crf_preset.json ({preset.source})")
            return 0

        return job.conclude({}, sum_up)


def numbers(name: str, texts: Sequence[str]) -> tuple[float, ...]:
    """The values of a flag, ascending.

    Raises:
      UserError: one is not a number, or a width or factor is not positive.
    """
    positive = name.endswith(("std", "factor"))
    try:
        values = sorted({float(text) for text in texts})
    except ValueError as e:
        raise UserError(f"--{name}={','.join(texts)}: needs numbers separated by commas") from e
    if not values or not all(map(math.isfinite, values)) or (positive and values[0] <= 0) or values[0] < 0:
        raise UserError(f"--{name}={','.join(texts)}: needs finite numbers, {'above' if positive else 'from'} 0")
    return tuple(values)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
