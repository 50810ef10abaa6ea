"""Which reader takes which file, and our own form: safetensors with the network's names.

A converted file holds `backbone/<layer>/kernel`, `head/<layer>/bias`, ... for the parameters and
`batch_stats/backbone/<layer>/mean`, `var` for batch norm's statistics; kernels are HWIO. Its metadata says which
preprocessing and stride placement the weights need, and where they come from.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.version import __version__
from deeplab_jax.weights import caffe, keras, torch
from deeplab_jax.weights.source import Source

FORMAT = "deeplab_jax"
SETTINGS = ("preprocessing", "stride_on")  # config.model fields that belong to the weights

_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar")
_KERAS_SUFFIXES = (".h5", ".hdf5")


def read(path: str | os.PathLike) -> Source:
    """Reads any supported weights file by its suffix.

    Raises:
      UserError: no such file, another kind of file, or a damaged one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a .caffemodel, .pth, .safetensors or .h5 file, or a workdir")
    suffix = path.suffix.lower()
    if suffix == ".caffemodel":
        return caffe.read(path)
    if suffix == ".safetensors":
        return read_safetensors(path)
    if suffix in _TORCH_SUFFIXES:
        return torch.from_state_dict(path, torch.read_pth(path))
    if suffix in _KERAS_SUFFIXES:
        return keras.read(path)
    raise UserError(f"{path}: '{suffix}' is no known kind of weights; known: .caffemodel, .pth, .pt, .safetensors, .h5")


def read_safetensors(path: Path) -> Source:
    """A file of our own, or a PyTorch state dict saved as safetensors.

    Raises:
      UserError: damaged, or with no known layer.
    """
    arrays, metadata = _load_safetensors(path)
    if metadata.get("format") != FORMAT:
        return torch.from_state_dict(path, arrays)
    source = Source(str(path), "converted weights", ours=True, metadata=metadata)
    source.settings = {k: metadata[k] for k in SETTINGS if k in metadata}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition("/")
        source.add(layer, leaf, array)
    return source


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file of our own, without its arrays.

    Raises:
      UserError: damaged, or not written by `convert_weights`.
    """
    _, metadata = _load_safetensors(path, arrays=False)
    if metadata.get("format") != FORMAT:
        raise UserError(f"{path}: was not written by convert_weights; run deeplab_jax.convert_weights on it first")
    return metadata


def _load_safetensors(path: Path, arrays: bool = True) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import ml_dtypes  # noqa: F401  comes with JAX, and registers bfloat16 with NumPy
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            return {name: file.get_tensor(name) for name in file.keys() if arrays}, metadata  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, TypeError) as e:
        raise UserError(f"{path}: is no safetensors file, or a damaged one ({e}); download or convert it again") from e


def write(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a file of our own, whole or not at all.

    Args:
      path: ends in `.safetensors`.
      arrays: full name -> array, stored as float32.
      metadata: strings; format and version are added.

    Raises:
      UserError: another suffix, or the folder cannot be written to.
    """
    from safetensors.numpy import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: converted weights are safetensors; give a name that ends in .safetensors")
    notes = {"format": FORMAT, "version": __version__, **metadata}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            ready = {k: np.ascontiguousarray(v, np.float32) for k, v in arrays.items()}
            save_file(ready, temporary, metadata=notes)
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except OSError as e:
        raise UserError(f"{path}: cannot be written ({e.strerror}); choose another place with --out") from e


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
