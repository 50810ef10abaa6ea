"""Reads Keras' VGG-16 and ResNet-50/101: legacy `.h5`, Keras 3 `.weights.h5`, and `.keras`, a zip that contains one.

Keras' ResNets have biases on their convolutions and another epsilon in batch norm; both are moved into the stored
statistics, so that the network's result is the same.
"""

import io
import re
import zipfile
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names
from deeplab_jax.weights.kinds import KERAS
from deeplab_jax.weights.source import Source, dense_to_hwio

_EPSILON = 1.001e-5  # keras.applications.resnet
_FIRST_EPSILON = 1e-3  # the first Keras ResNet-50, with Caffe's layer names and Keras' default epsilon
_LARGEST = 16  # times the file's size: weights hardly compress
_KERAS_MEMBER = "model.weights.h5"


def read(path: Path, leave_out: str = "") -> Source:
    """Reads a network's weights; nothing outside the file is opened, and nothing larger than the file allocated.

    Raises:
      UserError: not HDF5, damaged, in neither of the two layouts, or with links to other files.
    """
    import h5py

    source = Source(str(path), "a Keras weights file", settings=dict(KERAS), leave_out=leave_out)
    try:
        with h5py.File(_member(path) if path.suffix.lower() == ".keras" else path, "r") as file:
            reader = _Reader(_LARGEST * path.stat().st_size + 2**20)
            if "layers" in list(file):
                layers = _keras3_layers(reader, reader.child(file, "layers"))
            else:
                layers = _legacy_layers(reader, file)
            for name, arrays in layers:
                _add_layer(source, name, arrays)
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: is not a Keras weights file, or is damaged ({e}); download it again") from e
    return source.finish()


def _member(path: Path) -> io.BytesIO:
    """The weights within a `.keras`."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(_KERAS_MEMBER)
        if info.file_size > _LARGEST * path.stat().st_size + 2**20:
            raise ValueError(f"it claims {info.file_size / 2**30:.1f} GiB")
        return io.BytesIO(archive.read(info))


class _Reader:
    """Opens members of a file and reads arrays, within it and up to a number of bytes."""

    def __init__(self, limit: int):
        self._left = limit

    def child(self, group, name: str):
        """The member at `name`, which may have slashes; raises KeyError if it is missing, ValueError for a link.

        A link is not followed at all: it can name any file, and opening a pipe without a writer would wait forever.
        """
        import h5py

        for part in name.strip("/").split("/"):
            if not isinstance(group, h5py.Group):
                raise ValueError(f"'{name}' is not inside a group")
            if group.id.links.get_info(part.encode()).type != h5py.h5l.TYPE_HARD:
                raise ValueError(f"'{part}' is a link, which is not followed")
            group = group[part]
        return group

    def array(self, group, name: str) -> np.ndarray:
        """The array at `name`; raises ValueError if it is outside the file or claims more than the file holds."""
        dataset = self.child(group, name)
        if dataset.external or dataset.is_virtual:
            raise ValueError(f"'{name}' is in another file, which is not opened")
        size = int(np.prod(dataset.shape, dtype=object))
        if dataset.chunks:  # inflated whole, however little of them is used
            size = max(size, int(np.prod(dataset.chunks, dtype=object)))
        self._left -= size * dataset.dtype.itemsize
        if self._left < 0:
            raise ValueError(f"'{name}' of shape {dataset.shape} claims more than the file holds")
        return dataset[()]


def _legacy_layers(reader: _Reader, file) -> list[tuple[str, list[np.ndarray]]]:
    """One group per layer, its attribute `weight_names` in Keras' order; whole models keep them in `model_weights`."""
    root = reader.child(file, "model_weights") if "model_weights" in list(file) else file
    layers = []
    for name in root:
        group = reader.child(root, name)
        weights = group.attrs.get("weight_names", ())
        order = [w.decode() if isinstance(w, bytes) else str(w) for w in weights]
        if order:
            layers.append((name, [reader.array(group, w) for w in order]))
    return layers


def _number_at_end(name: str) -> int:
    """7 for conv2d_7; 0 for conv2d."""
    found = re.search(r"_(\d+)$", name)
    return int(found[1]) if found else 0


def _keras3_layers(reader: _Reader, root) -> list[tuple[str, list[np.ndarray]]]:
    """`layers/conv2d_7/vars/{0,1}`; the layer's own name is an attribute, or follows from the order."""
    layers = {name: reader.child(root, name) for name in root}
    groups = {name: reader.child(layer, "vars") for name, layer in layers.items() if "vars" in list(layer)}
    groups = {name: group for name, group in groups.items() if len(group)}
    kinds: dict[str, list[str]] = {"conv2d": [], "batch_normalization": [], "dense": []}
    for name in sorted(groups, key=_number_at_end):
        kind = re.sub(r"_\d+$", "", name)
        if kind in kinds:
            kinds[kind].append(name)
    convs, norms = names.keras_order(len(kinds["conv2d"]))
    ordered = {
        **dict(zip(kinds["conv2d"], convs)),
        **dict(zip(kinds["batch_normalization"], norms)),
        **dict(zip(kinds["dense"], ["fc1", "fc2", "predictions"] if not norms else ["predictions"])),
    }
    nested = [name for name in layers if name not in groups and _holds_arrays(layers[name])]
    found: list[tuple[str, list[np.ndarray]]] = [(name, []) for name in nested]
    for name, group in groups.items():
        own = group.attrs.get("name")
        own = own.decode() if isinstance(own, bytes) else own
        arrays = [reader.array(group, str(i)) for i in range(len(group))]
        found.append((own or ordered.get(name, name), arrays))
    return found


def _holds_arrays(group) -> bool:
    """Whether there are arrays anywhere below, as in a model inside the model."""
    import h5py

    return bool(group.visititems(lambda name, member: True if isinstance(member, h5py.Dataset) else None))


def _add_layer(source: Source, name: str, arrays: list[np.ndarray]) -> None:
    """Keras stores [kernel, bias] of a convolution or dense layer, [gamma, beta, mean, variance] of a batch norm.

    Models inside the model have no arrays here: their layers are not known.
    """
    ours = names.from_keras(name)
    if not arrays or ours is None or (source.leave_out and re.search(source.leave_out, name)):
        source.leave(name, "the ImageNet classifier" if names.is_imagenet_classifier(name) else None)
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
