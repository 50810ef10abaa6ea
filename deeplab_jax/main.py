"""Trains and evaluates: python -m deeplab_jax.main --config configs/voc_aspp_l.py --workdir runs/mine

Running the same command again continues where the last run stopped. Flags change fields of the config:
--config.batch_size=4 --config.crf.iterations=5. Results are printed as a table and written to
WORKDIR/eval/<split>.json. Ctrl-C and SIGTERM end after the step, with a checkpoint (docs/promises.md).
"""

from collections.abc import Sequence

from absl import flags

from deeplab_jax import cli, process_flags, startup

FLAGS = flags.FLAGS


WRITTEN = ("config.json", "config_history.json", "run.json", "best.json", "metrics.jsonl")  # in the workdir


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", None, "Config file, or the name of a shipped config (voc_aspp_l, camvid, ...).")
    flags.DEFINE_string("workdir", None, "Folder of the run; default runs/<config name>.")
    flags.DEFINE_enum("mode", "train_and_eval", ["train", "eval", "train_and_eval"], "What to do.")
    flags.DEFINE_bool("restart", False, "Begin at step 0 again; the workdir's contents are moved to its folder aside.")
    process_flags.define()


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    if argv:
        raise cli.UserError(f"{argv[0]}: not understood; all arguments are flags (see --help)")
    config = cli.config_from_flags(FLAGS.config)
    workdir = FLAGS.workdir or f"runs/{config.name}"
    print(f"workdir: {workdir}", flush=True)
    from deeplab_jax.config import files_named, find_config
    from deeplab_jax.imaging.listing import check_outputs
    from deeplab_jax.training.termination import interruptible

    check_outputs([f"{workdir}/{name}" for name in WRITTEN], [find_config(FLAGS.config), *files_named(config)])
    with interruptible(f"stopped; the same command continues from {workdir}'s newest checkpoint"):
        from deeplab_jax.runs import processes

        processes.initialize(FLAGS.distributed, FLAGS.coordinator, FLAGS.process_id, FLAGS.num_processes)
        if "train" in FLAGS.mode:
            from deeplab_jax.data import open_dataset
            from deeplab_jax.runs.lock import check_can_write
            from deeplab_jax.training import loop, setup

            # Before the data, which may have to be downloaded and prepared, which takes long.
            check_can_write(workdir)
            setup.check(config)
            if "eval" in FLAGS.mode:  # missing evaluation data are reported now, not after the training
                open_dataset(config.data, config.eval.split, seed=config.seed)
            loop.train(config, workdir, restart=FLAGS.restart)
        if "eval" in FLAGS.mode:
            from deeplab_jax.evaluation.workdir import evaluate_workdir

            print(evaluate_workdir(config, workdir))
        processes.leave()
    return 0


if __name__ == "__main__":
    startup.collect_rarely()
    define_flags()
    cli.run(main)
