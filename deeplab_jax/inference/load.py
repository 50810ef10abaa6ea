"""`deeplab_jax.load`: a trained network and its CRF, ready for photographs."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from deeplab_jax.config import recorded_config
from deeplab_jax.crf.params import check_iterations
from deeplab_jax.crf.setting import Setting, preset_named
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.classes import KNOWN, Classes
from deeplab_jax.inference.artifact import Artifact, load_artifact
from deeplab_jax.inference.from_config import create_segmenter
from deeplab_jax.inference.options import check_whole
from deeplab_jax.inference.segment import Segment, digest_of
from deeplab_jax.limits import CUT_ABOVE, REFUSE_ABOVE
from deeplab_jax.weights import box, contents, conversion, files
from deeplab_jax.weights.initial import load_initial, located, recorded_settings


def load(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    crf_iterations: int | None = None,
    crf: str | os.PathLike | Setting | None = None,
    cut_above: int = CUT_ABOVE,
    refuse_above: int = REFUSE_ABOVE,
    **options: Any,
) -> Segment | Artifact:
    """Opens a training workdir, an exported artifact, or a model that the package ships.

    Args:
      path: a folder that `main` or `export` wrote, or a shipped model's name, such as "camvid".
      step: the checkpoint of a workdir; None = the best, or the newest.
      crf_iterations: of mean field; 0 = without the CRF, None = the config's.
      crf: a name in `crf.PRESETS`, a preset file, or a `Setting`; default: the model's own setting, learned or searched
        by the run, else its config's.
      cut_above: photographs of more pixels are segmented in overlapping pieces of at most this size, smaller with many
        classes (`tile_above` in earlier versions).
      refuse_above: files of more pixels are refused (`max_pixels` in earlier versions).
      **options: further arguments of `inference.segmenter.Segmenter`, such as `batch_size`, `scales`, `mirror`.

    Returns:
      A callable: `segment(photograph)` returns labels, marginals, entropy, class_names, palette. The programs of an
      artifact fix everything except the photograph and `crf_iterations`.

    Raises:
      UserError: it is none of these, has no complete checkpoint, or an option is not applicable.

    >>> segment = load("camvid", crf_iterations=5)
    >>> segment.class_names[:3]
    ('sky', 'building', 'pole')
    >>> result = segment(photograph)  # doctest: +SKIP
    """
    cut_above, refuse_above = options.pop("tile_above", cut_above), options.pop("max_pixels", refuse_above)
    check_whole("cut_above", cut_above, 1)
    check_whole("refuse_above", refuse_above, 0)
    chosen: dict[str, Any] = {"crf_iterations": crf_iterations, "crf": crf, "cut_above": cut_above}
    if crf_iterations is not None:
        try:
            check_iterations(crf_iterations, where="crf_")
        except ValueError as e:
            raise UserError(str(e)) from e
    boxed = box.folder_of(path)
    if boxed is not None:
        if step is not None:
            raise UserError(f"step={step}: a shipped model has no steps to choose from; leave it out")
        return load_box(boxed, refuse_above=refuse_above, **chosen, **options)
    path = Path(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: no such folder{box.suggestion(path.name)}; give a workdir that deeplab_jax.main wrote, an "
            f"exported artifact, or the name of a shipped model ({box.listed()})"
        )
    if not (path / "config.json").is_file():
        artifact = load_artifact(path)
        if step is not None or crf is not None or options or cut_above != CUT_ABOVE:
            raise UserError(
                f"{path}: step, crf, cut_above and options are fixed in an exported artifact; load its workdir instead"
            )
        artifact.refuse_above = refuse_above
        if crf_iterations is not None:
            artifact.crf_iterations = crf_iterations
        return artifact
    from deeplab_jax.runs.checkpoints import load_workdir  # its import of orbax takes half a second

    config, variables, meta = load_workdir(path, step)
    searched = path / "crf_preset.json"
    if crf is None and config.search.images and searched.is_file():
        chosen["crf"] = searched  # as in the run's own evaluation
    identity = [str(path.resolve()), meta["step"], digest_of(variables)]
    names, palette = meta["class_names"], np.asarray(meta["palette"], np.uint8)
    segment = from_variables(config, variables, names, palette, identity, **chosen, **options)
    segment.refuse_above = refuse_above
    return segment


def load_box(
    folder: str | os.PathLike,
    *,
    crf: str | os.PathLike | Setting | None = None,
    refuse_above: int = REFUSE_ABOVE,
    **options: Any,
) -> Segment:
    """Like `load`, from the folder of a shipped model (see `deeplab_jax.weights.box`).

    Raises:
      UserError: one of its files is missing or damaged, or an option is not applicable.
    """
    boxed = box.read(folder)
    config = recorded_config(boxed.config)
    if crf is None and not boxed.variables["params"].get("crf"):
        crf = boxed.preset
    identity = ["box", Path(folder).name, boxed.digest]
    segment = from_variables(config, boxed.variables, boxed.class_names, boxed.palette, identity, crf=crf, **options)
    segment.refuse_above = refuse_above
    return segment


def load_weights(
    config: Any,
    weights: str | os.PathLike,
    *,
    crf_iterations: int | None = None,
    crf: str | os.PathLike | Setting | None = None,
    cut_above: int = CUT_ABOVE,
    **options: Any,
) -> Segment:
    """Like `load`, from a config and converted weights (as accepted by `config.init_from`).

    Class names and colors are those of the config's data set if it has the same number of classes as the weights.

    Raises:
      UserError: the weights cannot be read, or leave a layer of the network without values.
    """
    weights = located(weights)
    if weights.is_dir():
        raise UserError(f"{weights}: is a folder; give a workdir with --workdir, or a converted .safetensors")
    with config.unlocked():
        config.model.update(recorded_settings(weights))
    classes = contents.classes_of(files.read(weights))
    if classes is None:
        raise UserError(f"{weights}: has no classifier, only a trunk; train it first with --config.init_from={weights}")
    shapes = conversion.network_shapes(config.model, classes)
    zeros = unflatten_dict({name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()})
    variables, report = load_initial(weights, config.model, zeros)
    if report.missing:
        name, reason = next(iter(report.missing.items()))
        raise UserError(
            f"{weights}: leaves {len(report.missing)} arrays of this config's network without values, first {name} "
            f"({reason}); give the config that the weights were converted for"
        )
    names, palette = names_of(config, classes)
    identity = [str(Path(weights).resolve()), digest_of(variables)]
    chosen: dict[str, Any] = {"crf_iterations": crf_iterations, "crf": crf, "cut_above": cut_above}
    return from_variables(config, variables, names, palette, identity, **chosen, **options)


def from_variables(
    config: Any,
    variables: dict,
    class_names: Sequence[str],
    palette: np.ndarray,
    identity: Any = None,
    *,
    crf_iterations: int | None = None,
    crf: str | os.PathLike | Setting | None = None,
    cut_above: int = CUT_ABOVE,
    **options: Any,
) -> Segment:
    """Like `load`, from a run's config and variables in memory.

    Raises:
      UserError: an option, the CRF's setting, or the number of iterations is impossible.
    """
    segment = Segment(create_segmenter(config, variables, class_names, palette, **options), identity, cut_above)
    try:
        setting = segment.crf if crf is None else crf if isinstance(crf, Setting) else preset_named(str(crf))
    except ValueError as e:
        raise UserError(str(e)) from e
    if crf_iterations is not None:
        setting = replace(setting, iterations=crf_iterations)
    return segment.use_crf(setting, keep_compatibility=crf is None or options.get("compatibility") is not None)


def names_of(config: Any, classes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and palette of the config's data set if it has this many classes, else numbers and VOC's palette."""
    known = KNOWN.get(config.data.name, Classes())
    if len(known.names) != classes:
        known = Classes(tuple(f"class {i}" for i in range(classes)))
    return known.names, known.palette
