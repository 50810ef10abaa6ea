"""Writes one HTML page about a run: config, curves, tables, pictures with the CRF off and on. Opens without a network.

python -m deeplab_jax.report --workdir W
"""

from collections.abc import Sequence

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("workdir", None, "folder of a training run")
    flags.DEFINE_string("out", None, "the page; default: WORKDIR/report.html")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    if argv:
        raise UserError(f"{argv[0]}: not understood; all arguments are flags (see --help)")
    if not FLAGS.workdir:
        raise UserError("--workdir is missing; give the folder of a training run")
    from deeplab_jax.pages.report import write_report

    print(write_report(FLAGS.workdir, FLAGS.out))
    return 0


if __name__ == "__main__":
    define_flags()
    cli.run(main, huge_pages=False)
