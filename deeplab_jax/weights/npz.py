"""Reads `.npz` archives of a state dict, `np.savez(FILE, **arrays)`: no pickle, and nothing larger than the file."""

import math
import zipfile
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights.source import Source
from deeplab_jax.weights.torch import from_state_dict

_LARGEST = 16  # times the file's size: weights hardly compress


def read(path: Path, leave_out: str = "") -> Source:
    """Reads PyTorch's names (`layer1.0.conv1.weight`, OIHW) from an archive of arrays.

    Raises:
      UserError: damaged, pickled, larger than the file can hold, or with no known layer.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            claimed = sum(info.file_size for info in members)
            if claimed > _LARGEST * path.stat().st_size + 2**20:
                raise ValueError(f"it claims {claimed / 2**30:.1f} GiB")
            arrays = {info.filename.removesuffix(".npy"): _array(archive, info) for info in members}
    except (OSError, ValueError, KeyError, EOFError, SyntaxError, NotImplementedError, zipfile.BadZipFile) as e:
        raise UserError(f"{path}: is no archive of plain arrays, or a damaged one ({e}); save it again") from e
    return from_state_dict(path, {k: v for k, v in arrays.items() if np.issubdtype(v.dtype, np.floating)}, leave_out)


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One member: its header first, so that nothing is allocated that the member does not hold."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"'{info.filename}' has the unknown format {version}")
        shape, fortran, dtype = read(file)
        if dtype.hasobject:
            raise ValueError(f"'{info.filename}' is a pickle, which is not opened")
        if math.prod(shape) * dtype.itemsize != info.file_size - file.tell():
            raise ValueError(f"'{info.filename}' does not hold the shape {shape} that it claims")
        values = np.frombuffer(file.read(), dtype)
    return values.reshape(shape, order="F" if fortran else "C")
