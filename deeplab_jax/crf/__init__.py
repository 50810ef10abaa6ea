"""The fully connected CRF: mean-field inference that is compiled, differentiable and batched, on CPU, GPU and TPU."""

from deeplab_jax.crf.energy import energy, kl_free_energy
from deeplab_jax.crf.kernels import choose_bilateral
from deeplab_jax.crf.layer import MeanFieldCRF, learned
from deeplab_jax.crf.mean_field import mean_field, mean_field_features
from deeplab_jax.crf.params import NORMALIZATIONS, CRFParams
from deeplab_jax.crf.setting import (
    PRESETS,
    Preset,
    Setting,
    preset_named,
    read_preset,
    setting_from_config,
    write_preset,
)
from deeplab_jax.crf.unary import unary_from_labels, unary_from_logits, unary_from_probabilities

__all__ = [
    "NORMALIZATIONS",
    "PRESETS",
    "CRFParams",
    "MeanFieldCRF",
    "Preset",
    "Setting",
    "choose_bilateral",
    "energy",
    "kl_free_energy",
    "learned",
    "mean_field",
    "mean_field_features",
    "preset_named",
    "read_preset",
    "setting_from_config",
    "unary_from_labels",
    "unary_from_logits",
    "unary_from_probabilities",
    "write_preset",
]
