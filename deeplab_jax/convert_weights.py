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

_CONFIG = flags.DEFINE_string("config", None, "Config of the network that the weights are for.")
_OUT = flags.DEFINE_string("out", None, "The file to write, NAME.safetensors.")
_SEED = flags.DEFINE_integer("seed", 0, "Draws the filters that are kept where fc6 and fc7 are slimmed.")
_PREPROCESSING = flags.DEFINE_enum(
    "preprocessing", None, ["caffe_bgr", "torch_rgb"], "Overrides what the kind of file says about its preprocessing."
)
_STRIDE_ON = flags.DEFINE_enum(
    "stride_on", None, ["1x1", "3x3"], "Overrides what the kind of file says about the stride of ResNet's blocks."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) != 1:
        raise UserError(f"convert_weights takes one file or workdir, not {len(argv)}; see --help")
    if not _OUT.value:
        raise UserError("--out is missing; give a file to write, such as --out=weights.safetensors")
    from deeplab_jax.weights import conversion, files, initial

    config = cli.config_from_flags(_CONFIG.value)
    src = Path(argv[0])
    source = initial.read_workdir(src)[0] if src.is_dir() else files.read(src)
    overrides = {"preprocessing": _PREPROCESSING.value, "stride_on": _STRIDE_ON.value}
    report = conversion.convert(source, config.model, _OUT.value, _SEED.value, overrides)
    print(report)
    print(f"written: {_OUT.value}")


if __name__ == "__main__":
    cli.run(main)
