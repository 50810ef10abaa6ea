"""A network with its CRF as a folder of compiled programs, and the way back from it.

manifest.json        what the rest of the folder is, with the SHA-256 of each file
program_HxW.stablehlo  (weights, image, size, iterations) -> marginals, one for each size, from `jax.export`
weights.npz          the arrays that all programs take
"""

import hashlib
import json
import os
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from PIL import Image

from deeplab_jax import crf
from deeplab_jax.crf.params import FIELDS
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.adjustable import exact_radius, mean_field_any
from deeplab_jax.evaluation.inference import Segmentation, Segmenter, network_scores
from deeplab_jax.evaluation.tiling import STRIDE, padded_size
from deeplab_jax.imaging.files import MAX_PIXELS, read_photograph
from deeplab_jax.version import __version__

FORMAT = "deeplab_jax artifact 1"
PLATFORMS = ("cpu", "cuda", "tpu")
MANIFEST, WEIGHTS = "manifest.json", "weights.npz"

_PREPROCESSING = (
    "inside the programs: image is RGB uint8 [H, W, 3], not normalized; a photograph smaller than [H, W] lies at the "
    "top left and is continued by its border pixels, a larger one is scaled down first; size is int32 [2], the height "
    "and width of the part that is photograph"
)


# ---- writing -----------------------------------------------------------------------------------------------------


def write_artifact(
    segmenter: Segmenter,
    out: str | os.PathLike,
    sizes: Sequence[tuple[int, int]],
    *,
    platforms: Sequence[str] = PLATFORMS,
    source: dict | None = None,
    saved_model: bool = False,
) -> dict:
    """Writes a segmenter as an artifact; the folder appears whole or not at all.

    Args:
      segmenter: network and CRF; test-time scales and mirroring are kept, tiles are not.
      out: the folder; an artifact that is there is replaced.
      sizes: (H, W) of the programs, each enlarged to 8 k + 1 (or what the network's `size_extra` is).
      platforms: of "cpu", "cuda", "tpu".
      source: JSON values on where the weights come from, kept in the manifest.
      saved_model: also a TensorFlow SavedModel, in `saved_model/`.

    Returns:
      The manifest.

    Raises:
      UserError: the folder holds something else or cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / MANIFEST).is_file())):
        raise UserError(f"{out}: exists and is not an exported artifact; name a new folder with --out")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.absolute().parent) as temporary:
            whole = Path(temporary) / "artifact"
            whole.mkdir()
            manifest = _write_files(segmenter, whole, sizes, platforms, source or {}, saved_model)
            if out.exists():
                os.replace(out, Path(temporary) / "replaced")
            os.replace(whole, out)
    except OSError as e:
        raise UserError(f"{out}: cannot be written ({e.strerror or e}); choose another --out") from e
    return manifest


def _write_files(segmenter: Segmenter, folder: Path, sizes, platforms, source: dict, saved_model: bool) -> dict:
    weights = flat_weights(segmenter)
    np.savez(folder / WEIGHTS, **weights)
    programs = []
    for height, width in sorted({tuple(padded_size(n, STRIDE, segmenter.size_extra) for n in size) for size in sizes}):
        bilateral = crf.choose_bilateral(segmenter.bilateral, height, width, "cpu")
        exported = jax.export.export(jax.jit(program(segmenter, bilateral)), platforms=tuple(platforms))(
            {name: jax.ShapeDtypeStruct(w.shape, w.dtype) for name, w in weights.items()},
            jax.ShapeDtypeStruct((height, width, 3), jnp.uint8),
            jax.ShapeDtypeStruct((2,), jnp.int32),
            jax.ShapeDtypeStruct((), jnp.int32),
        )
        file = f"program_{height}x{width}.stablehlo"
        (folder / file).write_bytes(exported.serialize())
        programs.append({"size": [height, width], "file": file, "bilateral": bilateral})
    if saved_model:
        from deeplab_jax.evaluation.saved_model import write_saved_model

        write_saved_model(segmenter, folder / "saved_model", [p["size"] for p in programs], weights)
    params = {name: np.asarray(getattr(segmenter.crf_params, name), np.float64).tolist() for name in FIELDS}
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "programs": programs,
        "weights": WEIGHTS,
        "arguments": {
            "weights": "the arrays of the weights file, by name",
            "image": "uint8 [H, W, 3], RGB",
            "size": "int32 [2], height and width of the photograph within it",
            "iterations": "int32 [], of the CRF; 0 = network alone",
        },
        "result": "marginals, float32 [H, W, classes]; outside the photograph without meaning",
        "preprocessing": _PREPROCESSING,
        "platforms": list(platforms),
        "labels": list(segmenter.class_names),
        "palette": np.asarray(segmenter.palette).tolist(),
        "crf": {
            **params,
            "iterations": segmenter.crf_iterations,
            "normalization": segmenter.normalization,
            "compatibility": "Potts" if segmenter.compatibility is None else "learned, inside the programs",
        },
        "scales": list(segmenter.scales),
        "mirror": segmenter.mirror,
        "source": source,
        "versions": {"deeplab_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sha256": {name: _digest(folder / name) for name in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


def flat_weights(segmenter: Segmenter) -> dict[str, np.ndarray]:
    """The network's variables as {"params/backbone/conv1/kernel": array, ...}."""
    from flax.traverse_util import flatten_dict

    return {name: np.asarray(leaf) for name, leaf in flatten_dict(segmenter.variables, sep="/").items()}


def program(segmenter: Segmenter, bilateral: str):
    """The function that is exported: (weights, image, size, iterations) -> marginals [H, W, C] float32."""
    from flax.traverse_util import unflatten_dict

    def marginals(weights: dict, image: jax.Array, size: jax.Array, iterations: jax.Array) -> jax.Array:
        (log_probs,) = network_scores(
            segmenter.model,
            unflatten_dict(weights, sep="/"),
            image[None],
            size[None],
            scales=segmenter.scales,
            mirror=segmenter.mirror,
            swaps=segmenter.mirror_swaps if segmenter.mirror else (),
            extra=segmenter.size_extra,
        )
        y, x = jnp.arange(image.shape[0])[:, None], jnp.arange(image.shape[1])
        return mean_field_any(
            -log_probs,
            image,
            segmenter.crf_params,
            iterations,
            (y < size[0]) & (x < size[1]),
            segmenter.compatibility,
            bilateral=bilateral,
            normalization=segmenter.normalization,
            radius=exact_radius(segmenter.crf_params),
        )

    return marginals


# ---- reading -----------------------------------------------------------------------------------------------------


class Artifact:
    """An exported network with its CRF: `artifact(photograph)`, as `deeplab_jax.load` gives it for a workdir.

    A photograph goes through the smallest program that holds it; one that is larger than all is scaled down to fit the
    one that keeps most of it, and its marginals are scaled up again.

    Attributes:
      class_names: C names.
      palette: uint8 [256, 3].
      crf_iterations: what is used where no number is given.
      max_pixels: files with more pixels are refused.
      batch_size, workers: how many photographs `predict` hands over at once, and from how many threads.
      manifest: what manifest.json says.
    """

    batch_size = workers = 1

    def __init__(self, folder: Path, manifest: dict):
        self.manifest = manifest
        self.class_names = tuple(manifest["labels"])
        self.palette = np.asarray(manifest["palette"], np.uint8)
        self.crf_iterations = int(manifest["crf"]["iterations"])
        self.max_pixels = MAX_PIXELS
        self._folder = folder
        self._programs = {tuple(p["size"]): p for p in manifest["programs"]}
        self._calls: dict[tuple[int, int], Any] = {}
        self._lock = threading.Lock()
        with np.load(folder / manifest["weights"], allow_pickle=False) as weights:
            self._weights = {name: jax.device_put(weights[name]) for name in weights.files}

    @property
    def identity(self) -> list:
        """JSON values that tell this model and its settings from others."""
        return [self.manifest["sha256"], self.crf_iterations]

    def __call__(self, photograph: str | os.PathLike | np.ndarray, iterations: int | None = None) -> Segmentation:
        """Segments a photograph, a file or RGB uint8 [H, W, 3]; see `deeplab_jax.segment.Segment`."""
        ((labels, marginals),) = self.many([self._image(photograph)], iterations, marginals=True)
        return Segmentation(labels, marginals, self.class_names, self.palette)

    def many(
        self, images: Sequence[np.ndarray], iterations: int | None = None, marginals: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Segments photographs, uint8 [H, W, 3] each; (labels uint8, marginals if asked for, else None) for each."""
        iterations = self.crf_iterations if iterations is None else iterations
        return [self._one(self._image(image), iterations, marginals) for image in images]

    def remark(self, size: tuple[int, ...]) -> str:
        """What to say about how a photograph of size (H, W) is segmented; "" where it is as it is."""
        _, (height, width) = fit((size[0], size[1]), list(self._programs))
        return "" if (height, width) == tuple(size[:2]) else f"  (at {width}x{height}, as the artifact's sizes allow)"

    def _one(self, image: np.ndarray, iterations: int, marginals: bool) -> tuple[np.ndarray, np.ndarray | None]:
        size, fitted = fit(image.shape[:2], list(self._programs))
        scaled = image
        if fitted != image.shape[:2]:
            scaled = np.asarray(Image.fromarray(image).resize(fitted[::-1], Image.Resampling.BICUBIC))
        padding = [(0, size[0] - fitted[0]), (0, size[1] - fitted[1]), (0, 0)]
        padded = np.pad(scaled, padding, mode="edge")
        q = self._call(size)(self._weights, padded, np.int32(fitted), np.int32(iterations))
        q = np.asarray(q)[: fitted[0], : fitted[1]]
        if fitted == image.shape[:2]:
            return q.argmax(-1).astype(np.uint8), q if marginals else None
        return _enlarge(q, image.shape[:2], marginals)

    def _call(self, size: tuple[int, int]):
        with self._lock:
            if size not in self._calls:
                exported = jax.export.deserialize(bytearray((self._folder / self._programs[size]["file"]).read_bytes()))
                here = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
                if here not in exported.platforms:
                    raise UserError(
                        f"{self._folder}: was exported for {', '.join(exported.platforms)}, not for {here}; export it "
                        "again for this platform"
                    )
                self._calls[size] = jax.jit(exported.call)
            return self._calls[size]

    def _image(self, photograph: str | os.PathLike | np.ndarray) -> np.ndarray:
        if isinstance(photograph, str | os.PathLike):
            return read_photograph(photograph, max_pixels=self.max_pixels)
        image = np.asarray(photograph)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(
                f"photograph: is {image.dtype} {list(image.shape)}; give a file, or RGB as uint8 [H, W, 3] in 0..255"
            )
        return image


def load_artifact(path: str | os.PathLike) -> Artifact:
    """Opens a folder that `write_artifact` wrote.

    Raises:
      UserError: it is not an artifact, or a file in it is not what was written.
    """
    folder = Path(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{folder}: is of format '{manifest['format']}', this version reads '{FORMAT}'")
        digests = dict(manifest["sha256"])
        needed = [manifest["weights"], *(p["file"] for p in manifest["programs"])]
    except FileNotFoundError as e:
        raise UserError(f"{folder}: is neither a training workdir nor an exported artifact (no {MANIFEST})") from e
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise UserError(f"{folder / MANIFEST}: cannot be read as an artifact's; export it again") from e
    for name in needed:
        if Path(name).name != name or not (folder / name).is_file() or _digest(folder / name) != digests.get(name):
            raise UserError(f"{folder / name}: is missing or not what was exported; export it again")
    try:
        return Artifact(folder, manifest)
    except (ValueError, KeyError, TypeError, zipfile.BadZipFile) as e:
        raise UserError(f"{folder}: cannot be read as an artifact; export it again") from e


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
    """Marginals [h, w, C] at a photograph's size, class by class, so that only what is asked for is held.

    Returns:
      labels uint8 [H, W], and marginals float16 [H, W, C] if asked for.
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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
