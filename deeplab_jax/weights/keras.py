"""Reads Keras' VGG-16 and ResNet-50/101: legacy `.h5` and Keras 3 `.weights.h5`.

Keras' ResNets have biases on their convolutions and another epsilon in batch norm; both go into the stored
statistics, so that the network computes the same.
"""

import re
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names
from deeplab_jax.weights.source import CAFFE, Source, dense_to_hwio

_EPSILON = 1.001e-5  # keras.applications.resnet
_FIRST_EPSILON = 1e-3  # the first Keras ResNet-50, with Caffe's layer names and Keras' default epsilon


def read(path: Path) -> Source:
    """Reads a network's weights.

    Raises:
      UserError: not HDF5, damaged, or laid out in neither of the two ways.
    """
    import h5py

    source = Source(str(path), "a Keras weights file", settings=dict(CAFFE))
    try:
        with h5py.File(path, "r") as file:
            layers = _keras3_layers(file["layers"]) if "layers" in file else _legacy_layers(file)
            for name, arrays in layers:
                _add_layer(source, name, arrays)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: is no Keras weights file, or a damaged one ({e}); download it again") from e
    return source.finish()


def _legacy_layers(file) -> list[tuple[str, list[np.ndarray]]]:
    """One group per layer, its attribute `weight_names` in Keras' order; whole models keep them in `model_weights`."""
    root = file.get("model_weights", file)
    layers = []
    for name, group in root.items():
        weights = group.attrs.get("weight_names", ())
        order = [w.decode() if isinstance(w, bytes) else str(w) for w in weights]
        if order:
            layers.append((name, [group[w][()] for w in order]))
    return layers


def _keras3_layers(root) -> list[tuple[str, list[np.ndarray]]]:
    """`layers/conv2d_7/vars/{0,1}`; the layer's own name is an attribute, or else follows from the order."""
    groups = {name: group["vars"] for name, group in root.items() if "vars" in group and len(group["vars"])}
    kinds = {"conv2d": [], "batch_normalization": [], "dense": []}
    for name in sorted(groups, key=lambda n: int(re.search(r"(?:_(\d+))?$", n)[1] or 0)):
        kind = re.sub(r"_\d+$", "", name)
        if kind in kinds:
            kinds[kind].append(name)
    convs, norms = names.keras_order(len(kinds["conv2d"]))
    ordered = {
        **dict(zip(kinds["conv2d"], convs)),
        **dict(zip(kinds["batch_normalization"], norms)),
        **dict(zip(kinds["dense"], ["fc1", "fc2", "predictions"] if not norms else ["predictions"])),
    }
    layers = []
    for name, group in groups.items():
        own = group.attrs.get("name")
        own = own.decode() if isinstance(own, bytes) else own
        layers.append((own or ordered.get(name, name), [group[str(i)][()] for i in range(len(group))]))
    return layers


def _add_layer(source: Source, name: str, arrays: list[np.ndarray]) -> None:
    """Keras keeps [kernel, bias] of a convolution or dense layer, [gamma, beta, mean, variance] of a batch norm."""
    ours = names.from_keras(name)
    if ours is None:
        imagenet = names.is_imagenet_classifier(name)
        source.left_out[name] = "the ImageNet classifier" if imagenet else "no layer of DeepLab's networks"
    elif len(arrays) == 4:
        scale, bias, mean, var = arrays
        epsilon = _FIRST_EPSILON if ours == name else _EPSILON
        source.add_batch_norm(ours, mean, var, epsilon, scale, bias)
    elif len(arrays) in (1, 2) and arrays[0].ndim in (2, 4):
        kernel = arrays[0]
        source.add(ours, "kernel", dense_to_hwio(kernel, ours, "hwc") if kernel.ndim == 2 else kernel)
        if len(arrays) == 2:
            source.add(ours, "bias", arrays[1])
    else:
        raise ValueError(f"layer '{name}' has {len(arrays)} arrays")
