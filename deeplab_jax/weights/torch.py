"""Reads PyTorch checkpoints: ResNet-50/101 and VGG-16 of torchvision and timm, and the ports of DeepLab v2.

A `.pth` is a pickle, and a pickle can run any code: it is read only by PyTorch's restricted loader, which accepts
tensors and plain containers and refuses the rest. `.safetensors` does not need PyTorch.
"""

import io
import pickletools
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import kinds, names
from deeplab_jax.weights.source import Source, dense_to_hwio, oihw_to_hwio

_EPSILON = 1e-5  # torch.nn.BatchNorm2d's default, which all of these networks use
_SAFE_SINCE = (2, 6)  # before that, the restricted loader could be made to run code (CVE-2025-32434)
_LARGEST = 16  # times the file's size: float16 becomes float32, and copies for other scales share their values
_PICKLES = 5  # in a file of PyTorch's former format
_LEAVES = {"weight", "bias", "running_mean", "running_var"}

# Names under which training scripts store the network, the likeliest first
_NETWORK = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "weights")


def read(path: Path, leave_out: str = "") -> Source:
    """The network of a `.pth`; other state dicts in it are named among what is left out.

    Raises:
      UserError: as `read_pth` and `from_state_dict`.
    """
    tensors, others = read_pth(path)
    source = from_state_dict(path, tensors, leave_out)
    source.left_out |= dict.fromkeys(others, "another state dict than the network's")
    return source


def read_pth(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The floating-point tensors of a `.pth`, through PyTorch's restricted loader, and the names of other state dicts.

    Raises:
      UserError: PyTorch is missing or too old, or the file is damaged or holds objects other than tensors.
    """
    try:
        import torch
    except ImportError as e:
        raise UserError(
            f"{path}: reading it requires PyTorch (pip install torch); a .safetensors of the same weights does not"
        ) from e
    check_version(path, torch.__version__)
    _check_members(path)
    _check_calls(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged pickle can fail in any way
        raise UserError(f"{path}: {_why_refused(e)}") from e
    network, others = state_dict_of(loaded, path)
    found = {
        str(name): tensor
        for name, tensor in network.items()
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
    }
    refuse_integers(path, (str(n) for n, t in network.items() if isinstance(t, torch.Tensor) and str(n) not in found))
    claimed = sum(tensor.numel() for tensor in found.values()) * 4
    if claimed > _LARGEST * path.stat().st_size + 2**20:
        raise UserError(f"{path}: claims {claimed / 2**30:.1f} GiB of weights, which the file does not hold; refused")
    try:
        return {name: tensor.detach().float().numpy() for name, tensor in found.items()}, others
    except (RuntimeError, TypeError) as e:
        raise UserError(
            f"{path}: holds tensors that are not plain arrays (sparse, quantized or without values); save dense ones"
        ) from e


def refuse_integers(path: Path, whole: Iterable[str]) -> None:
    """Raises UserError if a weight is among the tensors of whole numbers; counts of batches may be."""
    quantized = next((name for name in whole if name.rpartition(".")[2] in _LEAVES), None)
    if quantized is not None:
        raise UserError(f"{path}: '{quantized}' holds whole numbers, no weights; convert a copy in float32")


def is_torch(path: Path) -> bool:
    """Whether a file looks like one of `torch.save`: a zip, or a pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _check_members(path: Path) -> None:
    """Raises UserError for a zip that holds more than its size allows: PyTorch stores members, and inflates others."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            claimed = sum(info.file_size for info in archive.infolist())
    except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
        raise UserError(f"{path}: {_why_refused(e)}") from e
    if claimed > _LARGEST * path.stat().st_size + 2**20:
        raise UserError(f"{path}: claims {claimed / 2**30:.1f} GiB of weights, which the file does not hold; refused")


def _check_calls(path: Path) -> None:
    """Raises UserError for a pickle that makes a `bytearray`, which PyTorch allows and which can have any size."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                members = [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
        else:
            members = [path.read_bytes()]
    except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path}: {_why_refused(e)}") from e
    if any(map(_makes_bytearray, members)):
        raise UserError(f"{path}: holds more than tensors (bytearray), and is not unpickled; save its weights alone")


def _makes_bytearray(data: bytes) -> bool:
    """Whether one of the pickles at the beginning of the data names it; in the former format tensors follow them."""
    stream = io.BytesIO(data)
    for _ in range(_PICKLES):
        try:
            for _, argument, _ in pickletools.genops(stream):
                if isinstance(argument, str) and argument.split()[-1:] == ["bytearray"]:
                    return True
        except ValueError:  # no pickle, or a damaged one, of which PyTorch says so
            return False
    return False


def _why_refused(error: Exception) -> str:
    """Why a file is not loaded, in place of PyTorch's words: they are for terminals, and advise loading it unsafely."""
    found = re.search(r"Unsupported global: GLOBAL ([\w.]{1,80})\s", str(error))
    if found:
        return (
            f"holds more than tensors ({found[1]}), and is not unpickled, since that can run any code; save its "
            "weights alone with torch.save(network.state_dict(), ...)"
        )
    return "is damaged, or holds more than tensors, and is not unpickled; download or save it again"


def check_version(path: Path, version: str) -> None:
    """Raises UserError for a PyTorch whose restricted loader is not safe."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found or tuple(map(int, found.groups())) < _SAFE_SINCE:
        raise UserError(
            f"{path}: is not opened with PyTorch {version}, whose restricted loader can be made to run code "
            "(CVE-2025-32434); install PyTorch 2.6 or newer, or use a .safetensors of the same weights"
        )


def state_dict_of(loaded: object, path: Path) -> tuple[Mapping, list[str]]:
    """The network's state dict within a training script's checkpoint, and the names of the others in it.

    Raises:
      UserError: there is none, or there are several candidates for the network.
    """
    found = dict(_state_dicts(loaded))
    if not found:
        raise UserError(f"{path}: holds no state dict; save one with torch.save(network.state_dict(), ...)")

    def rank(where: tuple[str, ...]) -> tuple[int, int]:
        return min((_NETWORK.index(k) for k in where if k in _NETWORK), default=len(_NETWORK)), len(where)

    best = min(map(rank, found))
    first = [where for where in found if rank(where) == best]
    if len(first) > 1:
        named = ", ".join("/".join(where) for where in first[:4])
        raise UserError(f"{path}: holds several networks ({named}); save the state dict of only one")
    return found[first[0]], ["/".join(where) for where in found if where != first[0]]


def _state_dicts(
    value: object, where: tuple[str, ...] = (), seen: set[int] | None = None
) -> Iterator[tuple[tuple[str, ...], Mapping]]:
    """(its place, a mapping with a network's names), each once; an optimizer's names are numbers."""
    seen = set() if seen is None else seen
    if not isinstance(value, Mapping) or len(where) > 4 or id(value) in seen:
        return
    seen.add(id(value))
    if any(isinstance(k, str) and k.rpartition(".")[2] in _LEAVES and hasattr(v, "dtype") for k, v in value.items()):
        yield where, value
        return
    for key, inner in value.items():
        if isinstance(key, str):
            yield from _state_dicts(inner, (*where, key), seen)


def from_state_dict(path: Path, tensors: Mapping[str, np.ndarray], leave_out: str = "") -> Source:
    """Converts a state dict of any known kind to the released names.

    Args:
      path: the file, for messages.
      tensors: foreign name -> array; kernels are OIHW.
      leave_out: see `Source`.

    Raises:
      UserError: no known layer, or layers that are neither used nor known to be unnecessary.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    for name, array in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf != "num_batches_tracked":
            layers.setdefault(layer, {})[leaf] = array
    for layer in [layer for layer, leaves in layers.items() if _LEAVES.isdisjoint(leaves)]:  # loose: pixel_mean
        leaves = layers.pop(layer)
        layers |= {f"{layer}.{leaf}" if layer else leaf: {leaf: array} for leaf, array in leaves.items()}
    shapes = {layer: {leaf: array.shape for leaf, array in leaves.items()} for layer, leaves in layers.items()}
    kind = kinds.recognise(str(path), shapes)
    source = Source(str(path), kind.name, settings=dict(kind.settings), open=kind.open, leave_out=leave_out)
    for layer, leaves in layers.items():
        stripped = names.stripped(layer)
        reason = kind.needless(stripped)
        ours = None if reason else kind.rename(stripped)
        if ours is None or not set(leaves) <= _LEAVES or (leave_out and re.search(leave_out, layer)):
            source.leave(layer, reason)
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
        if weight.ndim == 1:
            raise UserError(
                f"{source.path}: layer '{layer}' is a normalization without stored statistics, such as GroupNorm; "
                "these networks have batch norm with running_mean and running_var"
            )
        kernel = dense_to_hwio(weight, ours, "chw") if weight.ndim == 2 else oihw_to_hwio(weight)
        source.add(ours, "kernel", kernel)
        if "bias" in leaves:
            source.add(ours, "bias", leaves["bias"])
    except (ValueError, KeyError) as e:
        raise UserError(f"{source.path}: layer '{layer}' is damaged ({e}); download the file again") from e
