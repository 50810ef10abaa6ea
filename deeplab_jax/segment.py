"""`deeplab_jax.load`: a trained network and its CRF, ready for photographs."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from deeplab_jax.crf.params import FIELDS, Preset, preset_named
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation import refinement
from deeplab_jax.evaluation.inference import Segmentation, Segmenter
from deeplab_jax.evaluation.segmenters import create_segmenter
from deeplab_jax.evaluation.tiling import STRIDE
from deeplab_jax.imaging.files import MAX_PIXELS, read_photograph
from deeplab_jax.imaging.palettes import camvid_palette, cityscapes_palette, voc_palette

if TYPE_CHECKING:
    from deeplab_jax.evaluation.artifacts import Artifact

# A piece of a large photograph sees at least this many pixels around the part that it labels.
_MARGIN = 128
# Pixels times classes of a piece: 50 megapixels with 21 classes and their probabilities then take less than 8 GB.
_PIECE_VALUES = 30_000_000


class Segment:
    """A network and its CRF: `segment(photograph)`. Safe to call from several threads.

    Attributes:
      class_names: C names.
      palette: uint8 [256, 3].
      crf_iterations: what is used where no number is given.
      tile_above: photographs with more pixels go through network and CRF in overlapping pieces of at most this size,
        smaller with many classes.
      max_pixels: files with more pixels are refused.
      batch_size, workers: how many photographs `predict` hands over at once, and from how many threads.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        identity: Any = None,
        tile_above: int = 4_000_000,
        max_pixels: int = MAX_PIXELS,
    ):
        self._segmenter, self._made_from = segmenter, identity
        self.class_names, self.palette = segmenter.class_names, segmenter.palette
        self.crf_iterations = segmenter.crf_iterations
        self.tile_above, self.max_pixels = tile_above, max_pixels
        self.batch_size = segmenter.batch_size
        on_host = segmenter.devices[0].platform == "cpu"
        self.workers = 1 if on_host else 2 * len(segmenter.devices)  # one computes while the other copies

    @property
    def segmenter(self) -> Segmenter:
        """The parts of the work: scores, and mean field with other parameters."""
        return self._segmenter

    @property
    def crf(self) -> Preset:
        """The CRF's parameters, iterations and normalization."""
        return Preset(self._segmenter.crf_params, self.crf_iterations, self._segmenter.normalization)

    @property
    def bilateral(self) -> str:
        """The CRF's filter."""
        return self._segmenter.bilateral

    @property
    def identity(self) -> list:
        """JSON values that tell this model and its settings from others."""
        learned = None if self._segmenter.compatibility is None else _digest(self._segmenter.compatibility)
        values = [np.asarray(getattr(self.crf.params, name), np.float64).tolist() for name in FIELDS]
        rest = [self.crf_iterations, self.crf.normalization, self.bilateral, self.tile_above, self._segmenter.scales]
        return [self._made_from, learned, values, *rest, self._segmenter.mirror]

    def use_crf(self, preset: Preset, bilateral: str | None = None, keep_compatibility: bool = False) -> "Segment":
        """Changes the CRF's parameters, iterations and normalization in place, and its filter; returns itself.

        Args:
          keep_compatibility: keeps a label compatibility that was learned with the parameters.
        """
        self._segmenter.crf_params, self._segmenter.normalization = preset.params, preset.normalization
        self.crf_iterations = preset.iterations
        if not keep_compatibility:
            self._segmenter.compatibility = None
        self._segmenter.bilateral = bilateral or self._segmenter.bilateral
        self._segmenter.programs.clear()  # normalization, filter and compatibility are compiled in
        return self

    def __call__(self, photograph: str | os.PathLike | np.ndarray, iterations: int | None = None) -> Segmentation:
        """Segments a photograph.

        Args:
          photograph: a file, or RGB uint8 [H, W, 3].
          iterations: of the CRF; 0 = network alone, None = the model's.

        Returns:
          `labels` [H, W], `marginals` [H, W, C], `entropy` [H, W], `class_names`, `palette`, at the photograph's size.

        Raises:
          UserError: the file cannot be read or is too large, or the array is not a photograph.
        """
        image = self._image(photograph)
        ((labels, marginals),) = self.many([image], iterations, marginals=True)
        return Segmentation(labels, marginals, self.class_names, self.palette)

    def many(
        self, images: Sequence[np.ndarray], iterations: int | None = None, marginals: bool = False
    ) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """Segments several photographs, uint8 [H, W, 3] each, together.

        Returns:
          For each (labels uint8 [H, W], marginals [H, W, C] if asked for else None: float32, of a large one float16).
        """
        iterations = self.crf_iterations if iterations is None else iterations
        images = [self._image(image) for image in images]
        large = [self.pieces(image.shape[:2]) > 1 for image in images]
        whole = [image for image, is_large in zip(images, large) if not is_large]
        if marginals:
            found = self._segmenter.scores(whole) if whole else []
            found = [self._segmenter.refine(s, image, iterations) for s, image in zip(found, whole)]
            results = iter([(q.argmax(-1).astype(np.uint8), q) for q in found])
        else:
            found = self._segmenter.labels(whole, (iterations,)) if whole else []
            results = iter([(labels, None) for (labels,) in found])
        return [
            self._in_pieces(image, iterations, marginals) if is_large else next(results)
            for image, is_large in zip(images, large)
        ]

    def pieces(self, size: tuple[int, ...]) -> int:
        """In how many overlapping pieces a photograph of size (H, W) is segmented."""
        return len(self._pieces(size))

    def remark(self, size: tuple[int, ...]) -> str:
        """What to say about how a photograph of size (H, W) is segmented; "" where it is in one piece."""
        count = self.pieces(size)
        return f"  ({size[0] * size[1] / 1e6:.0f} megapixels, in {count} overlapping pieces)" if count > 1 else ""

    def _pieces(self, size: tuple[int, ...]) -> list[refinement.Piece]:
        margin = max(refinement.margin_of(self.crf.params), _MARGIN)
        limit = self.tile_above
        if size[0] * size[1] > limit:
            limit = min(limit, max(_PIECE_VALUES // len(self.class_names), 1))
        return refinement.pieces((size[0], size[1]), limit, margin, align=STRIDE)

    def _in_pieces(self, image: np.ndarray, iterations: int, marginals: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Network and CRF piece by piece, so that memory is bounded by a piece's, and the results'."""
        size = image.shape[:2]
        labels = np.empty(size, np.uint8)
        kept = np.empty((*size, len(self.class_names)), np.float16) if marginals else None
        for piece in self._pieces(size):
            part = image[piece.window]
            if kept is None:
                ((found,),) = self._segmenter.labels([part], (iterations,))
                labels[piece.core] = found[piece.inside]
                continue
            q = self._segmenter.refine(self._segmenter.scores([part])[0], part, iterations)[piece.inside]
            kept[piece.core] = q
            labels[piece.core] = q.argmax(-1)
        return labels, kept

    def _image(self, photograph: str | os.PathLike | np.ndarray) -> np.ndarray:
        if isinstance(photograph, str | os.PathLike):
            return read_photograph(photograph, max_pixels=self.max_pixels)
        image = np.asarray(photograph)
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(
                f"photograph: is {image.dtype} {list(image.shape)}; give a file, or RGB as uint8 [H, W, 3] in 0..255"
            )
        return image


def load(
    path: str | os.PathLike,
    *,
    step: int | None = None,
    crf_iterations: int | None = None,
    crf: str | os.PathLike | Preset | None = None,
    tile_above: int = 4_000_000,
    max_pixels: int = MAX_PIXELS,
    **options: Any,
) -> "Segment | Artifact":
    """Opens a training workdir or an exported artifact.

    Args:
      path: a folder that `main` or `export` wrote.
      step: which checkpoint of a workdir; None = the best, or the newest.
      crf_iterations: of the mean field; 0 = network alone, None = the config's.
      crf: a name in `crf.PRESETS`, a preset file, or a `Preset`, in place of the model's own, which are those that
        the run learned or searched for, else its config's.
      tile_above: larger photographs are segmented in overlapping pieces of at most this many pixels, fewer with many
        classes.
      max_pixels: files with more pixels are refused.
      **options: further arguments of `evaluation.inference.Segmenter`, such as `batch_size`, `scales`, `mirror`.

    Returns:
      A callable: `segment(photograph)` gives labels, marginals, entropy, class_names, palette. An artifact's is
      `deeplab_jax.export.load_artifact`'s, whose programs fix all but the photograph and so take no other argument.

    Raises:
      UserError: it is neither, or has no whole checkpoint, or an option does not fit.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; give a workdir that deeplab_jax.main wrote, or an exported artifact")
    if not (path / "config.json").is_file():
        try:
            from deeplab_jax.export import load_artifact
        except ModuleNotFoundError as e:
            raise UserError(f"{path}: is not a training workdir (it has no config.json)") from e
        if step is not None or crf is not None or options:
            raise UserError(
                f"{path}: step, crf and options are fixed in an exported artifact; load its workdir instead"
            )
        artifact = load_artifact(path)
        artifact.max_pixels = max_pixels
        if crf_iterations is not None:
            artifact.crf_iterations = crf_iterations
        return artifact
    from deeplab_jax.training.checkpoints import load_workdir

    config, _, variables, meta = load_workdir(path, step)
    searched = path / "crf_preset.json"
    if crf is None and config.crf.search_images and not variables["params"].get("crf") and searched.is_file():
        crf = searched  # what the run's own evaluation uses
    identity = [str(path.resolve()), meta["step"], _digest(variables)]
    names, palette = meta["class_names"], np.asarray(meta["palette"], np.uint8)
    chosen = {"crf_iterations": crf_iterations, "crf": crf, "tile_above": tile_above}
    segment = from_variables(config, variables, names, palette, identity, **chosen, **options)
    segment.max_pixels = max_pixels
    return segment


def load_weights(
    config: Any,
    weights: str | os.PathLike,
    *,
    crf_iterations: int | None = None,
    crf: str | os.PathLike | Preset | None = None,
    tile_above: int = 4_000_000,
    **options: Any,
) -> Segment:
    """Like `load`, from a config and converted weights (what `config.init_from` takes).

    Class names and colors are the data set's that the config names, where its number of classes is that of the weights.

    Raises:
      UserError: the weights cannot be read, or leave a layer of the network without values.
    """
    from deeplab_jax.weights import conversion, files, transfer
    from deeplab_jax.weights.initial import load_initial, recorded_settings

    if Path(weights).is_dir():
        raise UserError(f"{weights}: is a folder; give a workdir with --workdir, or a converted .safetensors")
    with config.unlocked():
        config.model.update(recorded_settings(weights))
    classes = conversion.classes_of(files.read(weights))
    if classes is None:
        raise UserError(f"{weights}: has no classifier, only a trunk; train it first with --config.init_from={weights}")
    shapes = conversion.network_shapes(config.model, classes)
    zeros = transfer.unflatten({name: np.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()})
    variables, report = load_initial(weights, config.model, zeros)
    if report.missing:
        name, reason = next(iter(report.missing.items()))
        raise UserError(
            f"{weights}: leaves {len(report.missing)} arrays of this config's network without values, first {name} "
            f"({reason}); give the config that the weights were converted for"
        )
    names, palette = names_of(config, classes)
    identity = [str(Path(weights).resolve()), _digest(variables)]
    chosen = {"crf_iterations": crf_iterations, "crf": crf, "tile_above": tile_above}
    return from_variables(config, variables, names, palette, identity, **chosen, **options)


def from_variables(
    config: Any,
    variables: dict,
    class_names: Sequence[str],
    palette: np.ndarray,
    identity: Any = None,
    *,
    crf_iterations: int | None = None,
    crf: str | os.PathLike | Preset | None = None,
    tile_above: int = 4_000_000,
    **options: Any,
) -> Segment:
    """Like `load`, from a run's config and variables in memory."""
    if crf_iterations is not None:
        options["crf_iterations"] = crf_iterations
    segmenter = create_segmenter(config, variables, class_names, palette, **options)
    segment = Segment(segmenter, identity, tile_above)
    if crf is None:
        return segment
    try:
        preset = crf if isinstance(crf, Preset) else preset_named(str(crf))
    except ValueError as e:
        raise UserError(str(e)) from e
    return segment.use_crf(preset if crf_iterations is None else replace(preset, iterations=crf_iterations))


def names_of(config: Any, classes: int) -> tuple[tuple[str, ...], np.ndarray]:
    """Names and palette of the config's data set if it has this many classes, else numbers and VOC's palette."""
    palette = {"camvid": camvid_palette, "cityscapes": cityscapes_palette}.get(config.data.name, voc_palette)()
    try:
        from deeplab_jax.data.dataset import builder_class  # needs the extra [train]; names are a courtesy here

        names = builder_class(config.data.name).CLASS_NAMES
    except (ModuleNotFoundError, UserError):
        names = ()
    if len(names) != classes:
        return tuple(f"class {i}" for i in range(classes)), voc_palette()
    return tuple(names), palette


def _digest(arrays: Any) -> str:
    """Tells one set of weights from another."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(arrays):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()[:16]
