"""Describes the network that a config builds, without allocating it: sizes, parameters, receptive field, FLOPs.

    python -m deeplab_jax.describe --config configs/voc_aspp_l.py [--json] [--memory]

The sizes are those of the config's crop, at scale 1; FLOPs are for one image.
"""

import json
from collections.abc import Sequence
from typing import Any

from absl import flags

from deeplab_jax import cli, startup
from deeplab_jax.errors import UserError

FLAGS = flags.FLAGS


def classes_of(config: Any) -> int:
    """Number of classes of a config's data set.

    Raises:
      UserError: the data set has to be read for that, and cannot be.
    """
    name = config.data.name
    from deeplab_jax.imaging.classes import KNOWN

    if name in KNOWN:  # a network can be described where the data are not
        return len(KNOWN[name].names)
    from deeplab_jax.data import open_dataset

    return open_dataset(config.data, config.data.train_split, config.seed).num_classes


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", None, "config file or shipped name; --config.field=value changes a field")
    flags.DEFINE_bool("json", False, "print JSON instead of the table")
    flags.DEFINE_bool("memory", False, "compile a training step for the compiler's account of its memory; minutes")
    flags.DEFINE_integer("num_classes", 0, "classes; 0 = as many as the config's data set has", lower_bound=0)


def main(argv: Sequence[str]) -> None:
    """The command; see the module's docstring."""
    if argv:
        raise UserError(f"describe takes no arguments but flags; '{argv[0]}' is left over")
    config = cli.config_from_flags(FLAGS.config)
    from deeplab_jax.models.summary import describe, kept_for_backward, table, training_memory

    num_classes = FLAGS.num_classes or classes_of(config)
    description = describe(config, num_classes)
    images = max(1, config.batch_size // config.optimizer.accumulate)
    description["training_step"] = {"images": images} | kept_for_backward(config, num_classes, images)
    if FLAGS.memory:
        description["training_step"]["compiled"] = training_memory(config, num_classes, images)
    print(json.dumps(description) if FLAGS.json else table(description))


if __name__ == "__main__":
    startup.collect_rarely()
    define_flags()
    cli.run(main, huge_pages=False)
