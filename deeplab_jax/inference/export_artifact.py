"""Writing an artifact: one StableHLO program per size, their weights, and a manifest."""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from deeplab_jax import crf
from deeplab_jax.crf.params import FIELDS, MAX_ITERATIONS
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, reason, remedy
from deeplab_jax.inference.artifact import PLATFORMS, digest_of_file
from deeplab_jax.inference.manifest import FORMAT, MANIFEST, WEIGHTS
from deeplab_jax.inference.program import flat_weights, program
from deeplab_jax.inference.saved_model import write_saved_model
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.inference.tiling import padded_size
from deeplab_jax.target import tracing_for
from deeplab_jax.version import __version__

_PREPROCESSING = (
    "inside the programs: image is RGB uint8 [H, W, 3], not normalized; a photograph smaller than [H, W] lies at the "
    "top left and is continued by its border pixels, a larger one is scaled down first; size is int32 [2], the height "
    "and width of the part that is photograph"
)


def write_artifact(
    segmenter: Segmenter,
    out: str | os.PathLike,
    sizes: Sequence[tuple[int, int]],
    *,
    platforms: Sequence[str] = PLATFORMS,
    source: dict | None = None,
    saved_model: bool = False,
) -> dict:
    """Writes a segmenter as an artifact; the folder appears completely or not at all.

    Args:
      segmenter: network and CRF; test-time scales and mirroring are kept, tiles are not.
      out: the folder; an existing artifact is replaced.
      sizes: (H, W) of the programs, each enlarged to the size to which the segmenter pads such a photograph.
      platforms: of "cpu", "cuda", "tpu".
      source: JSON values on the origin of the weights, stored in the manifest.
      saved_model: also a TensorFlow SavedModel, in `saved_model/`.

    Returns:
      The manifest.

    Raises:
      UserError: the folder holds something else or cannot be written.
    """
    out = Path(out)
    if out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UserError(
            f"{out}: is the current folder or above it, and cannot be replaced; name a new folder with --out"
        )
    if out.exists() and not _may_be_replaced(out):
        raise UserError(
            f"{out}: exists and is not an exported artifact, or holds other files too; name a new folder with --out"
        )
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
        raise UserError(f"{out}: cannot be written ({reason(e)}); {remedy(e)}") from e
    return manifest


def _may_be_replaced(out: Path) -> bool:
    """Whether a folder is empty, or an artifact with no file that is not its own."""
    if not out.is_dir() or not any(out.iterdir()):
        return out.is_dir()
    try:
        manifest = read_json(out / MANIFEST)
    except (OSError, ValueError):
        return False
    if not isinstance(manifest, dict) or not str(manifest.get("format")).startswith(FORMAT.rpartition(" ")[0]):
        return False
    own = {MANIFEST, *manifest["sha256"]} if isinstance(manifest.get("sha256"), dict) else {MANIFEST}
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if not p.is_dir()}
    return there <= own


def _write_files(segmenter: Segmenter, folder: Path, sizes, platforms, source: dict, saved_model: bool) -> dict:
    weights = flat_weights(segmenter)
    np.savez(folder / WEIGHTS, **weights)  # type: ignore[arg-type]  # its stub takes any name for allow_pickle
    programs: list[dict[str, Any]] = []
    # As a workdir pads photographs: positions of the scores, hence labels, depend on the padded size.
    multiple, extra = segmenter.size_multiple, segmenter.size_extra
    for height, width in sorted({tuple(padded_size(n, multiple, extra) for n in size) for size in sizes}):
        with tracing_for(platforms):
            bilateral = crf.choose_bilateral(segmenter.setting.options["bilateral"], height, width)
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
        write_saved_model(segmenter, folder / "saved_model", [p["size"] for p in programs], weights)
    params = {name: np.asarray(getattr(segmenter.setting.params, name), np.float64).tolist() for name in FIELDS}
    files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    manifest = {
        "format": FORMAT,
        "programs": programs,
        "weights": WEIGHTS,
        "arguments": {
            "weights": "the arrays of the weights file, by name",
            "image": "uint8 [H, W, 3], RGB",
            "size": "int32 [2], height and width of the photograph within it",
            "iterations": f"int32 [], of the CRF, at most {MAX_ITERATIONS}; 0 = network alone",
        },
        "result": "marginals, float32 [H, W, classes]; outside the photograph without meaning",
        "preprocessing": _PREPROCESSING,
        "platforms": list(platforms),
        "labels": list(segmenter.class_names),
        "palette": np.asarray(segmenter.palette).tolist(),
        "crf": {
            **params,
            "iterations": segmenter.setting.iterations,
            "normalization": segmenter.setting.normalization,
            "compatibility": "Potts" if segmenter.compatibility is None else "learned, inside the programs",
        },
        "scales": list(segmenter.scales),
        "mirror": segmenter.mirror,
        "source": source,
        "versions": {"deeplab_jax": __version__, "jax": jax.__version__, "numpy": np.__version__},
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "sha256": {name: digest_of_file(folder / name) for name in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest
