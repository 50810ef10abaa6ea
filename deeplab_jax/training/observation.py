"""Pictures and scalars for observing a training: one photograph through network and CRF, the CRF's parameters."""

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.data import reading
from deeplab_jax.imaging import overlay
from deeplab_jax.inference.from_config import create_segmenter
from deeplab_jax.runs.reporting import Reporter
from deeplab_jax.training.state import TrainState


class Pictures:
    """Records, at checkpoints, the first training photograph and, if they are learned, the CRF's parameters.

    Args:
      config: `log.images_every` is the number of steps between pictures; 0 = none.
      reporter: receives pictures and scalars.
      meta: `class_names` and `palette`.
      dataset: its first example that can be decoded is shown.
      done: steps of earlier runs, whose pictures exist.
    """

    def __init__(self, config: ConfigDict, reporter: Reporter, meta: dict, dataset, done: int):
        self._config, self._reporter, self._meta, self._dataset = config, reporter, meta, dataset
        every = config.log.images_every
        self._shown = done // every * every if every else 0

    def __call__(self, step: int, state: TrainState) -> None:
        """Records what is due at the checkpoint of `step`; `state` holds host arrays."""
        learned = crf_scalars(state.trainable.get("crf", {}))
        due = step == self._config.num_steps or step % max(self._config.checkpoint.every, 1) == 0
        if learned and due:  # not at checkpoints added by an interruption, so that a resumed run has the same record
            self._reporter.scalars(step, learned)
        every = self._config.log.images_every
        if every and step - self._shown >= every:
            self._shown = step // every * every
            self._reporter.picture(step, "train", self._picture(state))

    def _picture(self, state: TrainState) -> np.ndarray:
        """Photograph, truth, network, network + CRF and errors side by side, [H, W, 3] uint8."""
        _, example = next(reading.readable(self._dataset))
        names, palette = self._meta["class_names"], np.asarray(self._meta["palette"], np.uint8)
        segmenter = create_segmenter(self._config, state.variables(), names, palette, devices=jax.local_devices()[:1])
        counts = tuple(dict.fromkeys((0, self._config.crf.iterations)))
        assert example.label is not None, "pictures need images with labels"
        (found,) = segmenter.labels([example.image], counts)
        panels = [example.image, overlay.overlay(example.image, example.label, palette, names)]
        panels += [overlay.overlay(example.image, labels, palette, names, legend=False) for labels in found]
        panels.append(overlay.error_map(example.image, found[-1], example.label))
        titles = ["network" if not n else f"network + CRF, {n} iterations" for n in counts]
        return overlay.side_by_side(panels, ["photograph", "truth", *titles, "errors"])


def crf_scalars(learned: dict[str, np.ndarray]) -> dict[str, float]:
    """The CRF's learned arrays as scalars: numbers unchanged, the mean of others; for compatibility, off the diagonal.

    >>> crf_scalars({"gaussian_weight": np.float32(3), "compatibility": 1 - np.eye(3)})
    {'crf/gaussian_weight': 3.0, 'crf/compatibility': 1.0}
    """
    scalars = {}
    for name, value in learned.items():
        value = np.asarray(value, np.float64)
        if name == "compatibility":
            value = value[~np.eye(len(value), dtype=bool)]
        if name.startswith("log_"):
            name, value = name.removeprefix("log_"), np.exp(value)
        scalars[f"crf/{name}"] = float(value.mean())
    return scalars
