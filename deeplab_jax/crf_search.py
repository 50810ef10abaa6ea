"""Searches the CRF's parameters on held-out images, coarse to fine, as the papers did.

  python -m deeplab_jax.crf_search --config FILE --workdir W [--images N] [--objective mean_iou|trimap|both]

The network's scores are computed once and kept in W/crf_search; a stopped search continues where it was. The images
are those held out by config.data.holdout or holdout_by, else the evaluation split. Writes W/crf_search/table.txt,
table.csv, heatmap.png and, with several groups, groups.txt, and W/crf_preset.json for
  main --config.crf.preset=W/crf_preset.json    predict --preset W/crf_preset.json    refine --preset W/crf_preset.json
The config's group `search` says what is searched, as after training; flags take precedence, such as each parameter's
coarse values: --bilateral_xy_std 30,40,50. With --thin pole,sign the bilateral weight of those classes is searched
separately from the others'. With --distributed (automatic under SLURM and Open MPI) several processes share the images
(docs/scaling.md).
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from deeplab_jax import cli, crf_flags, process_flags
from deeplab_jax.crf_flags import FIELDS, NORMALIZATIONS
from deeplab_jax.errors import UserError

if TYPE_CHECKING:
    from ml_collections import ConfigDict

OBJECTIVES, GRIDS = ("mean_iou", "trimap", "both"), ("v1", "v2")  # those of search.grid, without its imports

IMAGES = 100  # where neither the flag nor the config says how many
WRITTEN = ("table.txt", "table.csv", "heatmap.png", "groups.txt", "learned.json", "results.jsonl")  # in W/crf_search

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("config", None, "config file or shipped name: the data; the network is the workdir's")
    flags.DEFINE_string("workdir", None, "folder of the training run; results go there too")
    from_config = "default: config.search."
    flags.DEFINE_integer(
        "images",
        None,
        f"number of held-out images, spread over the list; {from_config}images, or {IMAGES}",
        lower_bound=1,
    )
    flags.DEFINE_string("split", "", "split to use; default: holdout if config.data holds images out, else eval.split")
    flags.DEFINE_enum("objective", None, OBJECTIVES, f"what to maximize; {from_config}objective")
    flags.DEFINE_integer("trimap_width", 5, "pixels around the true boundaries that count as trimap", lower_bound=1)
    flags.DEFINE_enum("grid", None, GRIDS, f"the paper whose coarse grid is searched; {from_config}grid's values")
    for name in FIELDS:
        flags.DEFINE_list(name, None, "coarse values, separated by commas; default: the grid's")
    flags.DEFINE_list(
        "thin",
        None,
        f"names of thin classes, whose bilateral weight is searched as a multiple of the others'; {from_config}thin",
    )
    flags.DEFINE_list("thin_factor", None, f"coarse values of that multiple; {from_config}grid.thin_factor")
    flags.DEFINE_list("normalization", None, "normalization of the kernels, or several to try; default: the config's")
    halved = "1 = coarse only; each further pass halves the steps around the best"
    flags.DEFINE_integer("passes", None, f"{halved}; {from_config}passes", lower_bound=1)
    flags.DEFINE_bool("exhaustive", False, "measure every setting on every image, not only the promising ones")
    learned = "then learn one weight per kernel and class in this many passes over the images"
    flags.DEFINE_integer("learn", None, f"{learned}; {from_config}learn", lower_bound=0)
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
    axes, wanted = axes_from_flags(config), config.search
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
            axes,
            images=FLAGS.images or wanted.images or IMAGES,
            split=FLAGS.split,
            objective=FLAGS.objective or wanted.objective,
            trimap_width=FLAGS.trimap_width,
            passes=FLAGS.passes or wanted.passes,
            exhaustive=FLAGS.exhaustive,
            thin=wanted.thin if FLAGS.thin is None else FLAGS.thin,
            learn=wanted.learn if FLAGS.learn is None else FLAGS.learn,
            iterations=FLAGS.iterations or max(config.crf.iterations, 1),
            bilateral=FLAGS.bilateral or config.crf.bilateral,
            say=lambda line: print(line, flush=True),
            job=job,
        )

        def sum_up(reports: Sequence[object]) -> int:
            print(f"\n{table}\n\nbest: {FLAGS.workdir}/crf_preset.json ({preset.source})")
            return 0

        return job.conclude({}, sum_up)


def axes_from_flags(config: "ConfigDict") -> dict[str, tuple]:
    """The coarse grid: `config.search.grid`, or that of --grid; flags of single parameters take precedence.

    Raises:
      UserError: a value cannot be searched.
    """
    from deeplab_jax.search import grid

    axes = {**grid.configured_axes(config.search), **(grid.GRIDS[FLAGS.grid] if FLAGS.grid else {})}
    for name in (*FIELDS, "thin_factor"):
        given = FLAGS[name].value
        if given is not None:
            axes[name] = grid.axis(name, given, f"--{name}")
    axes["normalization"] = tuple(FLAGS.normalization or (config.crf.normalization,))
    for name in axes["normalization"]:
        if name not in NORMALIZATIONS:
            raise UserError(f"--normalization={name}: must be among {', '.join(NORMALIZATIONS)}")
    return axes


if __name__ == "__main__":
    define_flags()
    cli.run(main)
