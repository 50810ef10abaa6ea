"""Choosing the reader of a file, and this package's format: safetensors with the network's names.

A converted file holds `backbone/<layer>/kernel`, `head/<layer>/bias`, ... for the parameters and
`batch_stats/backbone/<layer>/mean`, `var` for batch norm's statistics; kernels are HWIO. Its metadata holds the
preprocessing and stride placement that the weights need, and their origin.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.version import __version__
from deeplab_jax.weights import caffe, keras, npz, torch
from deeplab_jax.weights.source import Source

FORMAT = "deeplab_jax"
SETTINGS = ("preprocessing", "stride_on", "resize")  # config.model fields that belong to the weights

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
_KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
_REFUSED = {
    ".ckpt": "TensorFlow checkpoints are not read: the known TensorFlow ports pad strided layers and resize in another "
    "way, which no setting here reproduces; use the .caffemodel that they were made from",
    ".npy": "a .npy of several layers is a pickle, which can run any code and is not opened; save them with "
    "np.savez(NAME.npz, **layers) under PyTorch's names",
    ".pkl": "a pickle can run any code and is not opened; save the layers as .safetensors, or with torch.save",
}
_REFUSED |= dict.fromkeys((".index", ".meta", ".pb"), _REFUSED[".ckpt"])


def check_expression(leave_out: str) -> None:
    """Raises `UserError` if the names of layers to leave out are not a regular expression."""
    try:
        re.compile(leave_out)
    except re.error as e:
        raise UserError(f"--leave_out={leave_out}: is not a regular expression ({e})") from e


def read(path: str | os.PathLike, leave_out: str = "") -> Source:
    """Reads any supported weights file by its suffix.

    Args:
      path: the file.
      leave_out: a regular expression for names of layers to leave out.

    Raises:
      UserError: no such file, an unsupported kind of file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file"
        raise UserError(f"{path}: {what}; give a .caffemodel, .pth, .safetensors or .h5 file, or a workdir")
    check_expression(leave_out)
    suffix = path.suffix.lower()
    if suffix == ".caffemodel":
        return caffe.read(path, leave_out)
    if suffix == ".safetensors":
        return read_safetensors(path, leave_out)
    if suffix in _TORCH_SUFFIXES:
        return torch.read(path, leave_out)
    if suffix in _KERAS_SUFFIXES:
        return keras.read(path, leave_out)
    if suffix == ".npz":
        return npz.read(path, leave_out)
    if suffix == ".ckpt" and torch.is_torch(path):  # of PyTorch Lightning
        return torch.read(path, leave_out)
    if suffix in _REFUSED or ".ckpt" in path.name:
        raise UserError(f"{path}: {_REFUSED.get(suffix, _REFUSED['.ckpt'])}")
    raise UserError(
        f"{path}: '{suffix}' is not a known kind of weights; known: .caffemodel, .pth, .safetensors, .h5, .keras, .npz"
    )


def read_safetensors(path: Path, leave_out: str = "") -> Source:
    """A file of `convert_weights`, or a PyTorch state dict saved as safetensors.

    Raises:
      UserError: damaged, or with no known layer.
    """
    arrays, metadata = _load_safetensors(path)
    if metadata.get("format") != FORMAT:
        return torch.from_state_dict(path, arrays, leave_out)
    source = Source(str(path), "converted weights", ours=True, metadata=metadata, leave_out=leave_out)
    source.settings = {k: metadata[k] for k in SETTINGS if k in metadata}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition("/")
        source.add(layer, leaf, array)
    return source


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file of `convert_weights`, without its arrays.

    Raises:
      UserError: damaged, or not written by `convert_weights`.
    """
    _, metadata = _load_safetensors(path, arrays=False)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: was not written by convert_weights; run deeplab_jax.convert_weights on it first")
    return metadata


def _load_safetensors(path: Path, arrays: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import ml_dtypes  # noqa: F401  installed with JAX; registers bfloat16 with NumPy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata, names = file.metadata() or {}, list(file.keys())
            if not arrays:
                return {}, metadata
            kinds = {name: file.get_slice(name).get_dtype() for name in names}
            floats = {name for name, kind in kinds.items() if kind in _FLOATS}
            other = sorted({kind for kind in kinds.values() if kind.startswith(("F", "C")) and kind not in _FLOATS})
            if other:
                raise UserError(
                    f"{path}: holds numbers of the type {', '.join(other)}, too coarse or unusual for weights; convert "
                    "a copy in float32, float16 or bfloat16"
                )
            torch.refuse_integers(path, [name for name in names if name not in floats])
            return {name: file.get_tensor(name) for name in names if name in floats}, metadata
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise UserError(f"{path}: is not a safetensors file, or is damaged ({e}); download or convert it again") from e


def write(
    path: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str],
    half_kernels: bool = False,
) -> None:
    """Writes a safetensors file in this package's format, completely or not at all.

    Args:
      path: ends in `.safetensors`.
      arrays: full name -> array, stored as float32.
      metadata: strings; format and version are added.
      half_kernels: whether to store the kernels of convolutions as float16.

    Raises:
      UserError: another suffix, or the folder cannot be written to.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: converted weights are safetensors; give a name that ends in .safetensors")
    notes = {"format": FORMAT, "version": __version__, **metadata}
    kernels = {k for k, v in arrays.items() if half_kernels and np.ndim(v) == 4}
    ready = {k: np.ascontiguousarray(v, np.float16 if k in kernels else np.float32) for k, v in arrays.items()}

    def save(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors' own lets no one else read the file
        save_file(ready, temporary, metadata=notes)
        temporary.chmod(mode)

    write_atomically(path, save)
