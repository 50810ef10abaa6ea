"""The CRF as a Flax module with learnable parameters."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.crf import filters
from deeplab_jax.crf.mean_field import mean_field
from deeplab_jax.crf.params import WEIGHT_FIELDS, CRFParams
from deeplab_jax.crf.setting import setting_from_config

LEARNABLE = ("weights", "compatibility", "stds")
STDS = ("bilateral_xy_std", "bilateral_rgb_std", "gaussian_xy_std")


class MeanFieldCRF(nn.Module):
    """`mean_field` with learnable kernel weights, label compatibility and kernel widths.

    Parameters, those that `learn` names: `bilateral_weight` and `gaussian_weight` ([] or, with `per_class_weights`,
    [C]); `compatibility` [C, C], from Potts' penalty 1 - I; `log_bilateral_xy_std`, `log_bilateral_rgb_std` and
    `log_gaussian_xy_std` ([], or as many numbers as `crf` has), natural logarithms, widths in pixels of the photograph
    whatever the stride.

    Attributes:
      num_classes: C.
      crf: the parameters to start from, in pixels of the photograph.
      iterations: T.
      normalization: as in `mean_field`.
      bilateral: as in `mean_field`; where widths are learned "auto" means "exact", and the lattice, which has no
        gradient for widths, is refused.
      learn: any of "weights", "compatibility", "stds".
      per_class_weights: one weight per kernel and class instead of one per kernel.
      stride: the image is the photograph sampled at this stride; position widths are divided by it.

    >>> layer = MeanFieldCRF(num_classes=2, iterations=1)
    >>> unary, image = np.zeros((4, 5, 2), np.float32), np.full((4, 5, 3), 128.0)
    >>> variables = layer.init(jax.random.key(0), unary, image)
    >>> sorted(variables["params"])
    ['bilateral_weight', 'compatibility', 'gaussian_weight']
    """

    num_classes: int
    crf: CRFParams = CRFParams()
    iterations: int = 5
    normalization: str = "after"
    bilateral: str = "auto"
    learn: tuple[str, ...] = ("weights", "compatibility")
    per_class_weights: bool = False
    stride: float = 1

    @classmethod
    def from_config(cls, config: Any, num_classes: int, **overrides: Any) -> "MeanFieldCRF":
        """The module that `config.crf` describes for training: its `train_iterations`, `stride`, `learn` and so on."""
        setting = setting_from_config(config)
        fields = {
            "crf": setting.params,
            **setting.options,
            "iterations": config.train_iterations,
            "learn": tuple(config.learn),
            "per_class_weights": config.per_class_weights,
            "stride": config.stride,
        }
        return cls(num_classes, **(fields | overrides))

    @nn.compact
    def __call__(
        self,
        unary: jax.Array,
        image: jax.Array,
        mask: jax.Array | None = None,
        *,
        return_log: bool = False,
        **options: Any,
    ) -> jax.Array:
        """Marginals [..., H, W, C]; arguments as in `mean_field`, which receives further `options`.

        Raises:
          ValueError: as `filter_for` and `mean_field` do, or the unary has another number of classes.
        """
        bilateral = filter_for(self.learn, self.bilateral)
        if np.ndim(unary) and np.shape(unary)[-1] != self.num_classes:
            raise ValueError(f"unary has {np.shape(unary)[-1]} classes, the CRF num_classes={self.num_classes}")
        fields = {}
        if "weights" in self.learn:
            for name in WEIGHT_FIELDS:
                fields[name] = self.param(name, self._weight, getattr(self.crf, name))
        if "stds" in self.learn:
            for name in STDS:
                start = lambda _, std: jnp.log(jnp.asarray(std, jnp.float32))  # noqa: E731
                fields[name] = jnp.exp(self.param(f"log_{name}", start, getattr(self.crf, name)))
        compatibility = None
        if "compatibility" in self.learn:
            compatibility = self.param("compatibility", lambda _: 1 - jnp.eye(self.num_classes, dtype=jnp.float32))
        return mean_field(
            unary,
            image,
            dataclasses.replace(self.crf, **fields).at_stride(self.stride),
            self.iterations,
            bilateral=bilateral,
            normalization=self.normalization,
            compatibility=compatibility,
            mask=mask,
            return_log=return_log,
            **options,
        )

    def _weight(self, _: jax.Array, start: Any) -> jax.Array:
        shape = np.shape(start) or ((self.num_classes,) if self.per_class_weights else ())
        return jnp.broadcast_to(jnp.asarray(start, jnp.float32), shape)


def filter_for(learn: Sequence[str], bilateral: str) -> str:
    """The filter of a `MeanFieldCRF` with these attributes: where widths are learned, "auto" is "exact".

    Raises:
      ValueError: `learn` is text or has an unknown name, or widths are to be learned with a filter that has no gradient
        for them.
    """
    if isinstance(learn, str):
        raise ValueError(f"learn={learn!r} must be a tuple of names, as in ({learn!r},)")
    unknown = set(learn) - set(LEARNABLE)
    if unknown:
        raise ValueError(f"learn={learn!r} holds {unknown.pop()!r}; choose from {', '.join(LEARNABLE)}")
    if "stds" not in learn:
        return bilateral
    bilateral = "exact" if bilateral == "auto" else bilateral
    filters.check_name(bilateral)
    if not filters.FILTERS[bilateral].width_gradient:
        raise ValueError(f'learn has "stds", for which bilateral="{bilateral}" has no gradient; use "exact"')
    return bilateral


def learned(variables: dict[str, Any], start: CRFParams) -> tuple[CRFParams, jax.Array | None]:
    """The parameters and the compatibility (None = Potts) of a trained `MeanFieldCRF`, for `mean_field`.

    Args:
      variables: the module's own parameters, `{"params": {...}}` or the inner dictionary.
      start: the parameters that it was created with, used for those that were not learned.

    >>> params, compatibility = learned({"bilateral_weight": 3.5}, CRFParams())
    >>> params.bilateral_weight, params.gaussian_weight, compatibility
    (3.5, 3.0, None)
    """
    values = variables.get("params", variables)
    fields = {name: values[name] for name in WEIGHT_FIELDS if name in values}
    fields |= {name: jnp.exp(values[f"log_{name}"]) for name in STDS if f"log_{name}" in values}
    return dataclasses.replace(start, **fields), values.get("compatibility")
