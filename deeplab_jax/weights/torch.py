"""Reads PyTorch checkpoints: torchvision and timm ResNet-50/101 and VGG-16, kazuto1011/deeplab-pytorch.

A `.pth` is a pickle, and a pickle can run anything: it is read by PyTorch's restricted loader alone, which knows
tensors and plain containers and refuses the rest. `.safetensors` needs no PyTorch.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names
from deeplab_jax.weights.source import CAFFE, TORCH, Source, dense_to_hwio, oihw_to_hwio

_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default, which all of these networks keep


def read_pth(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a `.pth`, through PyTorch's restricted loader.

    Raises:
      UserError: PyTorch is missing, or the file is damaged or holds other objects than tensors.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path}: reading it takes PyTorch (pip install torch); a .safetensors of the same weights does not"
        ) from e
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle can fail in any way
        first = (str(e).strip() or type(e).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: is damaged, or holds more than tensors, and is not unpickled ({first})") from e
    tensors = {}
    for name, tensor in _state_dict(loaded, path).items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            tensors[str(name)] = tensor.detach().float().numpy()
    return tensors


def _state_dict(loaded: object, path: Path) -> Mapping:
    """Training scripts keep the state dict inside another one."""
    for _ in range(3):
        if not isinstance(loaded, Mapping):
            break
        inner = next((k for k in ("state_dict", "model_state_dict", "model", "net") if k in loaded), None)
        if inner is None:
            return loaded
        loaded = loaded[inner]
    raise UserError(f"{path}: holds no state dict; save one with torch.save(network.state_dict(), ...)")


def from_state_dict(path: Path, tensors: Mapping[str, np.ndarray]) -> Source:
    """Brings a state dict to the released names, whichever of the three conventions it follows.

    Raises:
      UserError: a VGG with batch normalization, or no known layer.
    """
    by_layer: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        layer, _, leaf = name.rpartition(".")
        by_layer.setdefault(layer, {})[leaf] = array
    if any(re.search(r"layer2\.block1\.reduce", layer) for layer in by_layer):
        source = Source(str(path), "a deeplab-pytorch checkpoint", settings=dict(CAFFE))
        rename = names.from_deeplab_pytorch
    else:
        source = Source(str(path), "a torchvision or timm checkpoint", settings=dict(TORCH))
        rename = names.from_torch
    if any(re.search(r"features\.\d+$", layer) and "running_mean" in leaves for layer, leaves in by_layer.items()):
        raise UserError(f"{path}: is a VGG-16 with batch normalization (vgg16_bn); DeepLab's is the one without")
    for layer, leaves in by_layer.items():
        ours = rename(layer)
        if ours is None:
            imagenet = names.is_imagenet_classifier(layer)
            source.left_out[layer] = "the ImageNet classifier" if imagenet else "no layer of DeepLab's networks"
        else:
            _add_layer(source, layer, ours, leaves)
    return source.finish()


def _add_layer(source: Source, layer: str, ours: str, leaves: dict[str, np.ndarray]) -> None:
    weight = leaves.get("weight")
    try:
        if "running_mean" in leaves:
            source.add_batch_norm(
                ours, leaves["running_mean"], leaves["running_var"], _EPSILON, weight, leaves.get("bias")
            )
            return
        if weight is None:
            raise ValueError("it has no weight")
        kernel = dense_to_hwio(weight, ours, "chw") if weight.ndim == 2 else oihw_to_hwio(weight)
        source.add(ours, "kernel", kernel)
        if "bias" in leaves:
            source.add(ours, "bias", leaves["bias"])
    except (ValueError, KeyError) as e:
        raise UserError(f"{source.path}: layer '{layer}' is damaged ({e}); download the file again") from e
