"""Reading an exported artifact: network and CRF as a folder of compiled programs.

manifest.json        describes the rest of the folder, with the SHA-256 of each file
program_HxW.stablehlo  (weights, image, size, iterations) -> marginals, one for each size, from `jax.export`
weights.npz          the arrays that all programs share
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, reason
from deeplab_jax.inference.base import Segmenting
from deeplab_jax.inference.finite import require_finite
from deeplab_jax.inference.manifest import MANIFEST, checked
from deeplab_jax.limits import REFUSE_ABOVE
from deeplab_jax.weights import npz

PLATFORMS = ("cpu", "cuda", "tpu")


class Artifact(Segmenting):
    """An exported network with its CRF: `artifact(photograph)`, as `deeplab_jax.load` returns it for a workdir.

    A photograph goes through the smallest program that it fits into; one that is larger than all is scaled down to fit
    the program that keeps most of it, and its marginals are scaled up again.

    Attributes:
      manifest: the contents of manifest.json.
    """

    def __init__(self, folder: Path, manifest: dict):
        self.manifest = manifest
        self.class_names = tuple(manifest["labels"])
        self.palette = np.asarray(manifest["palette"], np.uint8)
        self.crf_iterations = int(manifest["crf"]["iterations"])
        self.refuse_above = REFUSE_ABOVE
        self._folder = folder
        self._programs = {tuple(p["size"]): p for p in manifest["programs"]}
        self._calls: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()
        weights = npz.arrays(folder / manifest["weights"])
        self._weights = [{name: jax.device_put(a) for name, a in weights.items()}]  # one for each device
        self._next_device = 0

    def use_devices(self, devices: Sequence[jax.Device]) -> "Artifact":
        """Spreads photographs over these devices, with a copy of the weights on each; returns itself."""
        self._weights = [jax.device_put(self._weights[0], device) for device in devices]
        self.workers = len(devices)
        return self

    @property
    def identity(self) -> list:
        """JSON values that distinguish this model and its settings from others."""
        return [self.manifest["sha256"], self.crf_iterations]

    def many(
        self, images: Sequence[np.ndarray], iterations: int | None = None, marginals: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Segments photographs, uint8 [H, W, 3] each; (labels uint8, marginals if requested, else None) for each."""
        iterations = self._count(iterations)
        return [self._one(self._image(image), iterations, marginals) for image in images]

    def remark(self, size: tuple[int, ...]) -> str:
        """A remark on how a photograph of size (H, W) is segmented; "" if at its own size."""
        _, (height, width) = fit((size[0], size[1]), list(self._programs))
        return "" if (height, width) == tuple(size[:2]) else f"  (at {width}x{height}, as the artifact's sizes allow)"

    def _one(self, image: np.ndarray, iterations: int, marginals: bool) -> tuple[np.ndarray, np.ndarray | None]:
        size, fitted = fit(image.shape[:2], list(self._programs))
        scaled = image
        if fitted != image.shape[:2]:
            scaled = np.asarray(Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BICUBIC))
        padding = [(0, size[0] - fitted[0]), (0, size[1] - fitted[1]), (0, 0)]
        padded = np.pad(scaled, padding, mode="edge")
        call = self._call(size)
        with self._lock:
            self._next_device = (self._next_device + 1) % len(self._weights)
            weights = self._weights[self._next_device]
        try:
            q = call(weights, padded, np.asarray(fitted, np.int32), np.int32(iterations))
        except (ValueError, TypeError, KeyError, jax.errors.JaxRuntimeError) as e:
            raise UserError(f"{self._program(size)}: cannot be run ({reason(e)}); export it again") from e
        q = np.asarray(q)
        if q.shape != (*size, len(self.class_names)) or q.dtype != np.float32:
            raise UserError(f"{self._program(size)}: gives {q.dtype} {list(q.shape)}, not marginals; export it again")
        q = q[: fitted[0], : fitted[1]]
        require_finite(np.isfinite(q.min()))
        if fitted == image.shape[:2]:
            return q.argmax(-1).astype(np.uint8), q if marginals else None
        return _enlarge(q, image.shape[:2], marginals)

    def _program(self, size: tuple[int, int]) -> Path:
        return self._folder / self._programs[size]["file"]

    def _call(self, size: tuple[int, int]):
        with self._lock:
            if size not in self._calls:
                try:
                    exported = jax.export.deserialize(bytearray(self._program(size).read_bytes()))
                except Exception as e:  # whatever the format's readers raise for anything else
                    raise UserError(f"{self._program(size)}: is not a program ({reason(e)}); export it again") from e
                here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
                if here not in exported.platforms:
                    raise UserError(
                        f"{self._folder}: was exported for {', '.join(exported.platforms)}, not for {here}; export it "
                        "again for this platform"
                    )
                self._calls[size] = jax.jit(exported.call)
            return self._calls[size]


def load_artifact(path: str | os.PathLike) -> Artifact:
    """Opens a folder that `write_artifact` wrote.

    Raises:
      UserError: it is not an artifact, or one of its files has changed.
    """
    folder = Path(path)
    try:
        manifest = checked(read_json(folder / MANIFEST))
    except FileNotFoundError as e:
        raise UserError(f"{folder}: is neither a training workdir nor an exported artifact (no {MANIFEST})") from e
    except ValueError as e:
        raise UserError(f"{folder / MANIFEST}: {e}; export it again") from e
    for name in (manifest["weights"], *(p["file"] for p in manifest["programs"])):
        if not (folder / name).is_file() or digest_of_file(folder / name) != manifest["sha256"].get(name):
            raise UserError(f"{folder / name}: is missing or has changed since the export; export it again")
    return Artifact(folder, manifest)


def fit(size: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Chooses a program for a photograph; returns (the program's size, the photograph's size within it).

    >>> fit((300, 300), [(321, 321), (513, 513)]), fit((513, 1026), [(321, 321), (513, 513)])
    (((321, 321), (300, 300)), ((513, 513), (256, 513)))
    """
    height, width = size
    holding = [s for s in sizes if height <= s[0] and width <= s[1]]
    if holding:
        return min(holding, key=lambda s: s[0] * s[1]), (height, width)
    scale, best = max((min(s[0] / height, s[1] / width), s) for s in sizes)
    return best, (max(1, round(height * scale)), max(1, round(width * scale)))


def _enlarge(q: np.ndarray, size: tuple[int, ...], marginals: bool) -> tuple[np.ndarray, np.ndarray | None]:
    """Marginals [h, w, C] at a photograph's size, class by class, so that only the requested arrays are in memory.

    Returns:
      labels uint8 [H, W], and marginals float16 [H, W, C] if requested.
    """
    labels = np.zeros(size, np.uint8)
    best = np.full(size, -1, np.float32)
    kept = np.empty((*size, q.shape[-1]), np.float16) if marginals else None
    for label in range(q.shape[-1]):
        channel = Image.fromarray(np.ascontiguousarray(q[..., label]))
        large = np.asarray(channel.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        labels[large > best] = label
        np.maximum(best, large, out=best)
        if kept is not None:
            kept[..., label] = large
    return labels, kept


def digest_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
