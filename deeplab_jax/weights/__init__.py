"""Reading and writing weights: Caffe, PyTorch and Keras files, converted safetensors, and runs' checkpoints."""

from deeplab_jax.weights.files import read, write
from deeplab_jax.weights.initial import load_initial, recorded_settings
from deeplab_jax.weights.transfer import Report

__all__ = ["Report", "load_initial", "read", "recorded_settings", "write"]
