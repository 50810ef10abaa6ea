"""Segments photographs, folders of them, and videos.

  python -m deeplab_jax.predict --model camvid --out DIR PATH...       a model that the package ships
  python -m deeplab_jax.predict --workdir W --out DIR PATH...
  python -m deeplab_jax.predict --artifact A --out DIR PATH...
  python -m deeplab_jax.predict --config FILE --init_from WEIGHTS.safetensors --out DIR PATH...

Writes DIR/<path below PATH>.png (palette PNG of class ids), _overlay.png, with --probabilities _probs.npy ([H, W, C]
float16), and for a video .mp4. Results that would share a name keep their suffix (a.jpg.png) or folder. Existing
results are skipped on a rerun; a bad file is reported, the rest are processed, and the exit status is 1. With
--distributed (automatic under SLURM and Open MPI) several processes share the files (docs/scaling.md).
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli, crf_flags, model_flags, process_flags, size_flags
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("workdir", None, "folder of a training run")
    model_flags.define()
    flags.DEFINE_string("artifact", None, "folder that deeplab_jax.export wrote")
    flags.DEFINE_string("config", None, "config of the network, with --init_from")
    flags.DEFINE_string("init_from", None, "converted weights (.safetensors)")
    flags.DEFINE_string("out", None, "folder for the results")
    flags.DEFINE_integer(
        "crf_iterations", None, "mean-field iterations, 0 = no CRF; default: the model's", lower_bound=0
    )
    flags.DEFINE_bool("probabilities", False, "also write probabilities")
    flags.DEFINE_bool("verbose", False, "also report how many programs the sizes of the photographs needed")
    flags.DEFINE_bool("overwrite", False, "recompute existing results, and replace other files of their names")
    process_flags.define_for_shares()
    flags.DEFINE_integer("batch_size", 1, "photographs of one size that go through the network together", lower_bound=1)
    size_flags.define(least=4096, older="max_pixels")
    crf_flags.define(preset="the model's")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    if model_flags.listed(FLAGS):
        return 0
    if not FLAGS.out:
        raise UserError("--out is missing; name the folder for the results")
    if not argv:
        raise UserError("no photograph given; name files or folders after the flags")
    out = Path(FLAGS.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out}: is a file; name a folder")
    from deeplab_jax.inference.photographs import PredictOptions, predict

    job = process_flags.job(FLAGS)
    options = PredictOptions(
        out,
        FLAGS.crf_iterations,
        FLAGS.probabilities,
        FLAGS.overwrite,
        size_flags.refuse_above(FLAGS),
        FLAGS.verbose,
    )
    with job.meeting(out / ".processes"):
        segment = open_model()
        return int(predict(segment, argv, options, lambda line: print(line, flush=True), job) > 0)


def open_model():
    """Opens the model that the flags name, on all local devices: model, workdir, artifact, or config with weights."""
    import jax

    from deeplab_jax.inference.load import load, load_weights

    given = [name for name in ("model", "workdir", "artifact", "init_from") if FLAGS[name].value]
    if len(given) != 1 or (FLAGS.init_from and not FLAGS.config):
        raise UserError(
            "give one of --model NAME (--model lists them), --workdir W, --artifact A, or --config FILE with "
            "--init_from WEIGHTS"
        )
    if not FLAGS.init_from:
        why = f"--{given[0]} has a config of its own; leave it out, or use this command's flags (see --help)"
        cli.refuse_overrides(why)
        if FLAGS.config:
            raise UserError(f"--config={FLAGS.config}: {why}")
    if FLAGS.artifact:
        fixed = [*crf_flags.NAMES, "batch_size", "cut_above"]
        changed = [name for name in fixed if FLAGS[name].present]
        if changed:
            raise UserError(f"--{changed[0]}: is fixed in an exported artifact; give its --workdir instead")
        artifact = load(FLAGS.artifact, crf_iterations=FLAGS.crf_iterations)
        return artifact.use_devices(jax.local_devices())
    options = {"cut_above": FLAGS.cut_above, "batch_size": FLAGS.batch_size, "crf_iterations": FLAGS.crf_iterations}
    options["devices"] = jax.local_devices()
    if FLAGS.workdir or FLAGS.model:
        segment = load(FLAGS.workdir or model_flags.source(FLAGS), **options)
    else:
        segment = load_weights(cli.config_from_flags(FLAGS.config), FLAGS.init_from, **options)
    setting = crf_flags.setting(FLAGS, FLAGS.crf_iterations, segment.crf)
    return segment.use_crf(setting, keep_compatibility=not FLAGS.preset)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
