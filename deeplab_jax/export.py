"""Writes a trained network with its CRF as one folder of programs that need only jax.

  python -m deeplab_jax.export --workdir W --out DIR --sizes 321x321,513x513

One StableHLO program per size (HEIGHTxWIDTH), for CPU, CUDA and TPU; weights, labels, palette, CRF parameters and
the filter are beside them. docs/export.md shows how to run it in ten lines; `deeplab_jax.load(DIR)` and
`deeplab_jax.predict --artifact DIR` run it too.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli, model_flags
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS
PLATFORMS = ("cpu", "cuda", "tpu")


def define_flags() -> None:
    """Defines the command's flags; not on import, as several commands have flags of one name."""
    flags.DEFINE_string("workdir", None, "folder of a training run")
    model_flags.define()
    flags.DEFINE_string("out", None, "folder for the artifact")
    sizes = "sizes of the programs, HEIGHTxWIDTH, enlarged as photographs are padded"
    flags.DEFINE_list("sizes", ["321x321", "513x513"], sizes)
    flags.DEFINE_list("platforms", list(PLATFORMS), "platforms on which the programs run")
    flags.DEFINE_integer("step", None, "step of the checkpoint; default: the best, or the newest")
    flags.DEFINE_string("preset", None, "CRF parameters: a preset's name or file; default: the model's")
    flags.DEFINE_bool("saved_model", False, "also a TensorFlow SavedModel, in DIR/saved_model")


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit status."""
    if argv:
        raise UserError(f"{argv[0]}: not understood; all arguments are flags (see --help)")
    if model_flags.listed(FLAGS):
        return 0
    if not FLAGS.out:
        raise UserError("--out is missing; name the folder for the artifact")
    source = model_flags.source(FLAGS)
    sizes = [parse_size(text) for text in FLAGS.sizes]
    if not sizes:
        raise UserError("--sizes is empty; give one or more sizes, such as --sizes=321x321,513x513")
    unknown = sorted(set(FLAGS.platforms) - set(PLATFORMS))
    if unknown or not FLAGS.platforms:
        raise UserError(f"--platforms={','.join(FLAGS.platforms)}: choose from {', '.join(PLATFORMS)}")
    from deeplab_jax.imaging.listing import check_outputs, files_under
    from deeplab_jax.inference.artifact import Artifact
    from deeplab_jax.inference.export_artifact import write_artifact
    from deeplab_jax.inference.load import load

    check_outputs([FLAGS.out, *files_under(FLAGS.out)], [source, *([FLAGS.preset] if FLAGS.preset else [])])
    segment = load(source, step=FLAGS.step, crf=FLAGS.preset)
    if isinstance(segment, Artifact):
        raise UserError(f"{source}: is already an exported artifact; name the training run that it was exported from")
    manifest = write_artifact(
        segment.segmenter,
        FLAGS.out,
        sizes,
        platforms=FLAGS.platforms,
        source={"identity": segment.identity, "workdir": Path(source).name},
        saved_model=FLAGS.saved_model,
    )
    for entry in manifest["programs"]:
        height, width = entry["size"]
        print(f"{Path(FLAGS.out) / entry['file']}  {height}x{width}, filter {entry['bilateral']}")
    bytes_written = sum(p.stat().st_size for p in Path(FLAGS.out).rglob("*") if p.is_file())
    print(f"{FLAGS.out}: {bytes_written / 1e6:.1f} MB for {', '.join(manifest['platforms'])}")
    return 0


def parse_size(text: str) -> tuple[int, int]:
    """Reads HEIGHTxWIDTH, or one number for both.

    >>> parse_size("321x513"), parse_size("513")
    ((321, 513), (513, 513))

    Raises:
      UserError: it is neither, or outside 9 to 4097.
    """
    parts = text.strip().lower().split("x")
    if len(parts) in (1, 2) and all(p.isdecimal() and 9 <= int(p) <= 4097 for p in parts):
        return int(parts[0]), int(parts[-1])
    raise UserError(f"--sizes: '{text}' is not a size; write HEIGHTxWIDTH, each from 9 to 4097, such as 321x513")


if __name__ == "__main__":
    define_flags()
    cli.run(main, huge_pages=False)
