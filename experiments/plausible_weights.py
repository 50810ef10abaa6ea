"""Random weights with matching batch-norm statistics: a substitute for published ones if only speed, memory or the
path through the program matters.

python -m experiments.plausible_weights --config voc_aspp_l --out random.safetensors
python -m deeplab_jax.main --config voc_aspp_l --config.init_from=random.safetensors ...
"""

import copy
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from flax.traverse_util import flatten_dict

from deeplab_jax import cli
from deeplab_jax.models import create_model, initial
from deeplab_jax.models.layers import BATCH_NORM_MOMENTUM
from deeplab_jax.weights import transfer
from deeplab_jax.weights.files import write
from deeplab_jax.weights.initial import settings_of

FLAGS = flags.FLAGS
BRANCH = 0.2
SIDE = 97  # of the noise image from which the statistics are taken


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("config", "voc_aspp_l", "a config file or the name of a shipped config")
    flags.DEFINE_string("out", "random.safetensors", "the file to write")
    flags.DEFINE_integer("classes", 21, "number of classes")


def main(argv: Sequence[str]) -> None:
    """Writes the weights; prints their number."""
    del argv
    config = cli.config_from_flags(FLAGS.config)
    variables = plausible_variables(config.model, FLAGS.classes)
    arrays = {transfer.full_name(path): np.asarray(v) for path, v in flatten_dict(variables).items()}
    write(FLAGS.out, arrays, {"source": "random numbers", **settings_of(config.model)})
    print(f"{FLAGS.out}: {sum(v.size for v in arrays.values()):,} numbers")


def plausible_variables(model_config, num_classes: int, seed: int = 0) -> dict:
    """Random variables whose batch-norm statistics are those of an image of smoothed noise.

    Each layer then gives values of mean 0 and deviation 1 before its affine, and a residual branch adds little to its
    block's input, as in a trained network: nothing vanishes or overflows, the loss begins near that of
    chance, and no product is slow because of denormals.

    Args:
      model_config: `config.model`.
      num_classes: number of classes.
      seed: of the numbers.

    Returns:
      {"params": ..., "batch_stats": ...} (no "batch_stats" for VGG).
    """
    training = copy.deepcopy(model_config)
    training.update(batch_norm="trained", scales=(1.0,))
    model = create_model(training, num_classes)
    coarse = np.random.default_rng(seed).integers(0, 256, (1, SIDE // 4 + 1, SIDE // 4 + 1, 3))
    image = coarse.repeat(4, 1).repeat(4, 2)[:, :SIDE, :SIDE].astype(np.float32)

    variables = _with_small_branches(initial.draw(model, initial.plan(model), seed))

    @jax.jit
    def statistics(variables, key):
        _, new = model.apply(variables, image, train=True, rngs={"dropout": key}, mutable=["batch_stats"])
        # One step of a running average from (0, 1), inverted, gives the image's own statistics.
        return jax.tree.map(
            lambda new, old: (new - BATCH_NORM_MOMENTUM * old) / (1 - BATCH_NORM_MOMENTUM),
            new.get("batch_stats", {}),
            variables.get("batch_stats", {}),
        )

    stats = jax.tree.map(np.asarray, statistics(variables, jax.random.key(seed)))
    return {"params": variables["params"]} | ({"batch_stats": stats} if stats else {})


def _with_small_branches(variables: dict) -> dict:
    """The variables with the last batch norm of each bottleneck's branch scaled by `BRANCH`."""

    def scaled(path: tuple, leaf: np.ndarray) -> np.ndarray:
        names = [str(key.key) for key in path]
        return leaf * np.float32(BRANCH) if names[-1] == "scale" and names[-2].endswith("branch2c") else leaf

    return jax.tree_util.tree_map_with_path(scaled, variables)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
