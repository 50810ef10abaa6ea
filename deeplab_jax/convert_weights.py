"""Converts published weights to a file that --config.init_from takes.

python -m deeplab_jax.convert_weights SRC --config FILE --out DST.safetensors

SRC is a .caffemodel, a .pth or .safetensors of torchvision, timm or deeplab-pytorch, a Keras .h5 or .weights.h5, or a
workdir of a run. The preprocessing that goes with the weights, and where the ResNet's stride sits, are recorded in DST
and applied when it is used.
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", None, "Config of the network that the weights are for.")
    flags.DEFINE_string("out", None, "The file to write, NAME.safetensors.")
    flags.DEFINE_integer("seed", 0, "Draws the filters that are kept where fc6 and fc7 are slimmed.")
    flags.DEFINE_enum(
        "preprocessing",
        None,
        ["caffe_bgr", "torch_rgb"],
        "Overrides what the kind of file says about its preprocessing.",
    )
    flags.DEFINE_enum(
        "stride_on", None, ["1x1", "3x3"], "Overrides what the kind of file says about the stride of ResNet's blocks."
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise UserError(f"convert_weights takes one file or workdir, not {len(argv)}; see --help")
    if not FLAGS.out:
        raise UserError("--out is missing; give a file to write, such as --out=weights.safetensors")
    from deeplab_jax.imaging import listing
    from deeplab_jax.weights import conversion, files, initial

    listing.check_outputs([FLAGS.out], argv)
    config = cli.config_from_flags(FLAGS.config)
    src = Path(argv[0])
    source = initial.read_workdir(src)[0] if src.is_dir() else files.read(src)
    overrides = {"preprocessing": FLAGS.preprocessing, "stride_on": FLAGS.stride_on}
    report = conversion.convert(source, config.model, FLAGS.out, FLAGS.seed, overrides)
    print(report)
    print(f"written: {FLAGS.out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
