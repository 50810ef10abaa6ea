"""The same programs as a TensorFlow SavedModel, through `jax.experimental.jax2tf`.

Apart from `runs/reporting.py` the only place where TensorFlow is imported, and only for a SavedModel.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deeplab_jax import crf
from deeplab_jax.errors import UserError
from deeplab_jax.inference.program import program
from deeplab_jax.inference.segmenter import Segmenter


def write_saved_model(
    segmenter: Segmenter, folder: Path, sizes: Sequence[Sequence[int]], weights: dict[str, np.ndarray]
) -> None:
    """Writes a SavedModel with one signature `segment_HxW` (image, size, iterations) -> marginals for each size.

    Raises:
      UserError: TensorFlow or jax2tf is missing, or their versions are incompatible.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        import tensorflow as tf
        from jax.experimental import jax2tf
    except ImportError as e:
        raise UserError(
            f"--saved_model: needs TensorFlow and jax's jax2tf, and '{e.name}' is missing; pip install tensorflow-cpu, "
            "or leave the flag out"
        ) from e
    tf.get_logger().setLevel("ERROR")
    module = tf.Module()
    module.weights = {name.replace("/", "."): tf.Variable(value, trainable=False) for name, value in weights.items()}
    signatures = {}
    try:
        for height, width in sizes:
            bilateral = crf.choose_bilateral(segmenter.setting.options["bilateral"], height, width, "cpu")
            convert = jax2tf.convert(program(segmenter, bilateral), with_gradient=False)
            signature = [
                tf.TensorSpec((height, width, 3), tf.uint8, "image"),
                tf.TensorSpec((2,), tf.int32, "size"),
                tf.TensorSpec((), tf.int32, "iterations"),
            ]

            def segment(image, size, iterations, convert=convert):
                values = {name.replace(".", "/"): value for name, value in module.weights.items()}
                return {"marginals": convert(values, image, size, iterations)}

            function = tf.function(segment, input_signature=signature, autograph=False)
            signatures[f"segment_{height}x{width}"] = function.get_concrete_function()
        tf.saved_model.save(module, str(folder), signatures=signatures)
    except Exception as e:  # jax2tf and TensorFlow raise many exceptions if their versions are incompatible
        reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
        raise UserError(
            f"--saved_model: the installed TensorFlow {tf.__version__} cannot hold these programs ({reason[:200]}); "
            "leave the flag out"
        ) from e
