"""Reads `.npz` archives of a state dict, `np.savez(FILE, **arrays)`: no pickle, and nothing larger than the file."""

import math
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights.source import Source
from deeplab_jax.weights.torch import from_state_dict, refuse_integers

_LARGEST = 16  # times the file's size: weights hardly compress
_DAMAGED = (
    OSError, ValueError, TypeError, KeyError, EOFError, SyntaxError, OverflowError, RecursionError, NotImplementedError,
    RuntimeError, zipfile.BadZipFile, zlib.error, struct.error,
)  # fmt: skip


def read(path: Path, leave_out: str = "") -> Source:
    """Reads arrays with PyTorch's names (`layer1.0.conv1.weight`, OIHW) from an archive.

    Raises:
      UserError: damaged, pickled, larger than the file can hold, or with no known layer.
    """
    found = arrays(path)
    floats = {k: v for k, v in found.items() if np.issubdtype(v.dtype, np.floating)}
    refuse_integers(path, [name for name in found if name not in floats])
    return from_state_dict(path, floats, leave_out)


def arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an archive by name.

    Raises:
      UserError: damaged, pickled, or larger than the file can hold.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            claimed = sum(info.file_size for info in members)
            if claimed > _LARGEST * path.stat().st_size + 2**20:
                raise ValueError(f"it claims {claimed / 2**30:.1f} GiB")
            return {info.filename.removesuffix(".npy"): _array(archive, info) for info in members}
    except _DAMAGED as e:
        raise UserError(f"{path}: is not an archive of plain arrays, or is damaged ({e}); save it again") from e


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    """One member: its header first, so that no more is allocated than the member holds."""
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
