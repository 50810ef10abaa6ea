"""Converts published weights to a file for --config.init_from.

python -m deeplab_jax.convert_weights SRC --config FILE --out DST.safetensors
python -m deeplab_jax.convert_weights --describe SRC

SRC is a .caffemodel, a .pth, .safetensors or .npz of torchvision, timm, deeplab-pytorch or another port of DeepLab v2,
a Keras .h5, .weights.h5 or .keras, or a workdir of a run. The preprocessing that belongs to the weights, the place of
the ResNet's stride and the resize convention are recorded in DST and applied when it is used. Layers of the file that
are neither used nor known to be unnecessary are an error. With --describe the command only describes SRC.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", None, "Config of the network for the weights.")
    flags.DEFINE_string("out", None, "The file to write, NAME.safetensors.")
    flags.DEFINE_boolean("describe", False, "Describe the file and stop; needs neither --config nor --out.")
    flags.DEFINE_string("leave_out", "", "Regular expression for names of layers in the file to leave out.")
    flags.DEFINE_integer("seed", 0, "Seed for the filters that are kept if fc6 and fc7 are slimmed.")
    flags.DEFINE_enum(
        "preprocessing",
        None,
        ["caffe_bgr", "torch_rgb"],
        "Overrides the preprocessing implied by the kind of file.",
    )
    flags.DEFINE_enum(
        "stride_on", None, ["1x1", "3x3"], "Overrides the place of ResNet's strides implied by the kind of file."
    )
    flags.DEFINE_enum(
        "resize",
        None,
        ["corners", "half_pixel"],
        "Overrides the resizing implied by the kind of file: corners (Caffe) or half_pixel (align_corners=False).",
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command with the file as its only argument."""
    if len(argv) != 1:
        raise UserError(f"convert_weights needs one file or workdir, not {len(argv)}; see --help")
    if not FLAGS.out and not FLAGS.describe:
        raise UserError("--out is missing; give a file to write, such as --out=weights.safetensors")
    from deeplab_jax.imaging import listing
    from deeplab_jax.weights import contents, conversion, files, initial

    if FLAGS.out:
        listing.check_outputs([FLAGS.out], [*argv, *listing.files_under(argv[0], leave_out=".safetensors")])
    src = Path(argv[0])
    if FLAGS.describe:
        print("\n".join(contents.describe(_read(src, files, initial))))
        return
    config = cli.config_from_flags(FLAGS.config)
    source = _read(src, files, initial)
    overrides = {"preprocessing": FLAGS.preprocessing, "stride_on": FLAGS.stride_on, "resize": FLAGS.resize}
    report = conversion.convert(source, config.model, FLAGS.out, FLAGS.seed, overrides)
    print(report)
    print(f"written: {FLAGS.out}")


def _read(src: Path, files, initial):
    return initial.read_workdir(src, FLAGS.leave_out)[0] if src.is_dir() else files.read(src, FLAGS.leave_out)


if __name__ == "__main__":
    define_flags()
    cli.run(main, huge_pages=False)
