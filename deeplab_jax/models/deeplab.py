"""The whole network: preprocessing, trunk, head, input scales, and the mean-field CRF where it is part of training."""

import contextlib
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.crf import MeanFieldCRF
from deeplab_jax.models.architecture import Architecture
from deeplab_jax.models.backbones import architecture_of, backbone_of
from deeplab_jax.models.canvas import kept_out, scaled, within
from deeplab_jax.models.layers import fold_keys, resize_bilinear
from deeplab_jax.models.multiscale import fuse_scales

# The released mean, RGB order, for images in 0..255; torchvision's mean and deviation are for images in 0..1.
CAFFE_MEAN_RGB = (122.675, 116.669, 104.008)
TORCH_MEAN_RGB = (0.485, 0.456, 0.406)
TORCH_STD_RGB = (0.229, 0.224, 0.225)
# Over all channels: where photographs of average light lie, and where "own_rgb" brings all others.
OWN_MEAN, OWN_DEVIATION = 115.0, 58.0


class DeepLab(nn.Module):
    """Scores of a photograph, and its CRF marginals if the CRF is part of the model.

    Variables: {"params": {"backbone", "head", "crf"}, "batch_stats": {"backbone", "head"}}; layers carry the released
    Caffe names, conv kernels are HWIO.

    Attributes:
      architecture: the network's description.
      num_classes: number of score channels.
      crf: the end-to-end CRF, on the image sampled at its `stride`, or None.
      axis_name: mapped axis over which trained batch norm is synchronized.

    >>> from deeplab_jax.config import load_config
    >>> model = create_model(load_config("voc_aspp_l").model, num_classes=21)
    >>> images = jax.ShapeDtypeStruct((1, 65, 65, 3), jnp.uint8)
    >>> scores, _ = jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x)[0], images)
    >>> scores.shape
    (1, 9, 9, 21)
    """

    architecture: Architecture
    num_classes: int
    crf: MeanFieldCRF | None = None
    axis_name: str | None = None

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        train: bool = False,
        valid: jax.Array | None = None,
        dropout_keys: jax.Array | None = None,
        light: jax.Array | None = None,
        canvas: jax.Array | None = None,
    ) -> tuple[jax.Array, dict[str, Any]]:
        """Runs the network.

        Args:
          images: [B, H, W, 3] RGB 0..255, any type.
          train: dropout on, trained batch norm on the batch's statistics.
          valid: [B, H, W] bool, False where the image is padding; the network then sees the mean color.
          dropout_keys: [B] keys, one for each example; without them the "dropout" generator is used.
          light: [B, 2], see `preprocess`. In training, photographs have had `OWN_MEAN` and `OWN_DEVIATION` before the
            random changes (`data.augment.even_light`).
          canvas: [B, 2] int32, the size to which each image would be padded alone; the scores within are then those
            of the image alone, whatever the size of the batch. None = that of the batch.

        Returns:
          Scores [B, h, w, num_classes] float32 at the output stride, or at stride 4 with a `fine_branch`; and a dict:
          with several scales "scales", the score map of each (see `multiscale.fuse_scales`); with a CRF "marginals" and
          "log_marginals" [B, h', w', num_classes] on the image sampled at `crf.stride`.
        """
        a = self.architecture
        backbone = backbone_of(a)
        trunk, head = backbone.trunk(a, self.axis_name), backbone.head(a, self.num_classes, self.axis_name)
        if train:
            light = jnp.asarray([[OWN_MEAN, OWN_DEVIATION]])
        train = train and not a.freeze_network  # stored statistics, no dropout: the same scores as in testing

        def network(x: jax.Array, scale: int) -> jax.Array:
            size, whole = x.shape[1:3], images.shape[1:3]
            own = scaled(canvas, whole, size, a.size_extra)
            with kept_out(own, size, a.size_extra):
                features = trunk(x, train and not a.freeze_trunk)
                if a.freeze_trunk:
                    features = lax.stop_gradient(features)  # the backward pass ends here
                features = {name: within(f, own, size, a.size_extra) for name, f in features.items()}
                return head(features, train, fold_keys(dropout_keys, scale)).astype(jnp.float32)

        prepared = preprocess(images, a.preprocessing, valid, light)
        with matmul_precision(a.matmul_precision):
            logits, maps = fuse_scales(network, prepared, a.scales, a.size_extra, a.resize)
        if a.freeze_network:
            logits = lax.stop_gradient(logits)
        out: dict[str, Any] = {"scales": maps} if maps else {}
        if self.crf is not None:
            out |= self._marginals(logits, images, valid)
        return logits, out

    def _marginals(self, logits: jax.Array, images: jax.Array, valid: jax.Array | None) -> dict[str, jax.Array]:
        assert self.crf is not None  # the caller checks
        s = int(self.crf.stride)
        sampled = images[:, ::s, ::s]
        mask = None if valid is None else valid[:, ::s, ::s]
        unary = -jax.nn.log_softmax(resize_bilinear(logits, sampled.shape[1:3], self.architecture.resize))
        log_marginals = self.crf(unary, sampled, mask=mask, return_log=True)
        return {"marginals": jnp.exp(log_marginals), "log_marginals": log_marginals}


def matmul_precision(name: str) -> contextlib.AbstractContextManager:
    """Products traced inside, and those of their gradients, have this precision; "default" changes nothing.

    For float32 products, "default" and "high" are one and three passes in bfloat16 on a TPU, TF32 on an NVIDIA GPU;
    "highest" is float32. A CPU always computes in float32.
    """
    return contextlib.nullcontext() if name == "default" else jax.default_matmul_precision(name)


def preprocess(
    images: jax.Array, kind: str, valid: jax.Array | None = None, light: jax.Array | None = None
) -> jax.Array:
    """The network's input.

    "caffe_bgr" is BGR minus the mean, "torch_rgb" (RGB / 255 - mean) / std. "own_rgb" is RGB minus the image's own mean
    over its own standard deviation, one number each for all of its pixels and channels: the same scene in other light
    looks the same, and colors keep their relation. It is clipped where 0 and 255 are in a photograph of `OWN_MEAN` and
    `OWN_DEVIATION`.

    Args:
      images: [B, H, W, 3] RGB 0..255.
      kind: one of these names.
      valid: [B, H, W] bool; the result is exactly 0, the mean color, where it is False.
      light: [B, 2], for "own_rgb" the mean and deviation of the photographs that the images are parts of; None = of
        the images themselves.

    Returns:
      [B, H, W, 3] float32.

    >>> import numpy as np
    >>> print(np.asarray(preprocess(jnp.full((1, 1, 1, 3), 255), "torch_rgb")).round(2))
    [[[[2.25 2.43 2.64]]]]
    """
    x = jnp.asarray(images, jnp.float32)
    if kind == "caffe_bgr":
        x = (x - jnp.asarray(CAFFE_MEAN_RGB))[..., ::-1]
    elif kind == "torch_rgb":
        x = (x / 255 - jnp.asarray(TORCH_MEAN_RGB)) / jnp.asarray(TORCH_STD_RGB)
    else:
        inside = None if valid is None else valid[..., None]
        mean = x.mean((1, 2, 3), keepdims=True, where=inside) if light is None else light[:, 0, None, None, None]
        x = x - mean
        if light is None:
            deviation = jnp.sqrt(jnp.square(x).mean((1, 2, 3), keepdims=True, where=inside))
        else:
            deviation = light[:, 1, None, None, None]
        x = x / jnp.maximum(deviation, 1.0)  # of a uniform image, nothing is left
        # As in training, where photographs are stored in 0..255 after the same change.
        x = jnp.clip(x, -OWN_MEAN / OWN_DEVIATION, (255 - OWN_MEAN) / OWN_DEVIATION)
    return x if valid is None else jnp.where(valid[..., None], x, 0.0)


def create_model(config: Any, num_classes: int, crf: Any = None) -> DeepLab:
    """Builds the network of a config.

    Args:
      config: `config.model` (its fields are read as attributes).
      num_classes: number of classes.
      crf: `config.crf`; with `crf.train == "end_to_end"` and iterations the mean-field CRF is part of the model.

    Returns:
      A Flax module; see `DeepLab.__call__`.

    Raises:
      ValueError: the config describes no network; the sentence names the field.

    >>> from deeplab_jax.config import load_config
    >>> model = create_model(load_config("voc_aspp_l").model, num_classes=21)
    >>> model.num_classes, model.architecture.backbone
    (21, 'resnet101')
    """
    architecture = architecture_of(config)
    if crf is None or crf.train != "end_to_end" or not crf.train_iterations:
        return DeepLab(architecture, num_classes)
    return DeepLab(architecture, num_classes, MeanFieldCRF.from_config(crf, num_classes))


def output_size(config: Any, size: Sequence[int]) -> tuple[int, int]:
    """Size (h, w) of the score map for an image of `size` (H, W), both in positions.

    >>> from deeplab_jax.config import load_config
    >>> output_size(load_config("voc_aspp_l").model, (321, 321))
    (41, 41)
    """
    a = architecture_of(config)
    length = backbone_of(a).score_length
    return length(a, size[0]), length(a, size[1])


def is_classifier(path: Sequence[str]) -> bool:
    """Whether a parameter (its path of names) belongs to the last classifier, whose learning rate is 10 or 20 times
    higher.

    >>> is_classifier(("params", "head", "fc1_voc12_c0", "kernel"))
    True
    >>> is_classifier(("params", "backbone", "conv1", "kernel"))
    False
    """
    names = _names(path)
    return names[:1] == ("head",) and any(name.startswith(("fc1", "fc8")) for name in names)


def is_frozen(path: Sequence[str], config: Any) -> bool:
    """Whether a parameter (its path of names) never changes in training under `config.model`.

    >>> from deeplab_jax.config import load_config
    >>> config = load_config("voc_aspp_l").model
    >>> is_frozen(("params", "backbone", "bn_conv1", "scale"), config)
    True
    """
    names = _names(path)
    if names[:1] == ("crf",):
        return False
    if getattr(config, "freeze_network", False):  # absent in the record of older runs
        return True
    if len(names) < 2:
        return False
    if config.batch_norm == "frozen" and names[1].startswith("bn"):
        return True
    return bool(config.freeze_trunk) and not (names[0] == "head" and (not config.msc or names[1] == "msc"))


def _names(path: Sequence[str]) -> tuple[str, ...]:
    return tuple(path[1:]) if path and path[0] == "params" else tuple(path)
