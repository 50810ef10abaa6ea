"""The effect of each CRF parameter: one row for each, its value divided by a factor, unchanged, and multiplied.

  python -m experiments.crf_parameters --out docs/images

The scores are not from a network. They are the ground truth of a drawn scene, sampled every few pixels, upsampled
bilinearly and disturbed, which is the best that a network of that output stride can give. The parameters in the middle
column are the config's.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from deeplab_jax import cli
from experiments import common

FLAGS = flags.FLAGS

VOID = 255
SYMBOLS = {
    "bilateral_weight": "w1", "bilateral_xy_std": "sigma_alpha", "bilateral_rgb_std": "sigma_beta",
    "gaussian_weight": "w2", "gaussian_xy_std": "sigma_gamma",
}  # fmt: skip


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """A drawn scene enlarged to 8 k + 1 by repeating its border, void replaced by the nearest class.

    Returns:
      image uint8 [97, 129, 3] RGB, label uint8 [97, 129] without void.
    """
    from scipy import ndimage

    from deeplab_jax.data.builders.shapes import scenes

    image, label = scenes.draw(0, 1, number)
    nearest = ndimage.distance_transform_edt(label == VOID, return_distances=False, return_indices=True)
    label = label[tuple(nearest)]
    return np.pad(image, ((0, 1), (0, 1), (0, 0)), mode="edge"), np.pad(label, ((0, 1), (0, 1)), mode="edge")


def seen_from_afar(label: np.ndarray, stride: int, num_classes: int) -> np.ndarray:
    """The label sampled at `stride` and upsampled like a score map: [H, W] -> [H, W, C], sums to 1."""
    from deeplab_jax.models.layers import resize_bilinear

    coarse = np.eye(num_classes, dtype=np.float32)[label[::stride, ::stride]]
    return np.asarray(resize_bilinear(coarse, label.shape))


def rough_probabilities(label: np.ndarray, num_classes: int, stride: int = 8, seed: int = 0) -> np.ndarray:
    """The result of `seen_from_afar`, made uncertain and disturbed by blotches: [H, W, C] float32, sums to 1."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.normal(size=(*label.shape, num_classes)), (1.5, 1.5, 0))
    scores = 4.0 * seen_from_afar(label, stride, num_classes) + 1.3 * noise / noise.std()
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float32)


def grid(image, label, probabilities, params, palette, *, iterations: int, normalization: str, factor: float):
    """The picture: photograph, scores and truth, then one row for each parameter; [H, W, 3] uint8.

    Args:
      image: [H, W, 3] uint8 RGB.
      label: [H, W] uint8.
      probabilities: [H, W, C].
      params: those of the middle column.
      palette: uint8 [256, 3].
      iterations, normalization: of the mean field.
      factor: by which each parameter is divided and multiplied.
    """
    from deeplab_jax.crf import mean_field, unary_from_probabilities
    from deeplab_jax.imaging.overlay import side_by_side, stack

    unary = unary_from_probabilities(probabilities)

    def refined(changed) -> np.ndarray:
        q = mean_field(unary, image, changed, iterations, normalization=normalization)
        return enlarged(palette[np.asarray(q.argmax(-1))])

    middle = refined(params)
    start = enlarged(palette[probabilities.argmax(-1)])
    shown = [enlarged(image), start, enlarged(palette[label])]
    rows = [side_by_side(shown, ["photograph", "scores, before the CRF", "truth"])]
    for name, symbol in SYMBOLS.items():
        value = getattr(params, name)
        low, high = (refined(params.replace(**{name: value * f})) for f in (1 / factor, factor))
        titles = [
            f"{name}: {symbol} = {value / factor:.3g}",
            f"{symbol} = {value:.3g}",
            f"{symbol} = {value * factor:.3g}",
        ]
        rows.append(side_by_side([low, middle, high], titles))
    return stack(rows)


def enlarged(picture: np.ndarray, times: int = 2) -> np.ndarray:
    """Every pixel repeated, [H, W, ...] -> [times * H, times * W, ...]."""
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def main(argv: Sequence[str]) -> None:
    del argv
    from deeplab_jax.crf import setting_from_config
    from deeplab_jax.data.builders.shapes.scenes import CLASS_NAMES
    from deeplab_jax.imaging.files import write_png
    from deeplab_jax.imaging.palettes import voc_palette

    setting = setting_from_config(common.load_config().crf)
    image, label = scene(FLAGS.scene)
    probabilities = rough_probabilities(label, len(CLASS_NAMES))
    settings = {"iterations": FLAGS.iterations, "normalization": setting.normalization, "factor": FLAGS.factor}
    picture = grid(image, label, probabilities, setting.params, voc_palette(), **settings)
    out = Path(FLAGS.out) / "crf_parameters.png"
    write_png(out, picture)
    print(f"written: {out}")


if __name__ == "__main__":
    common.define_flags("shapes", "crf_parameters")
    flags.DEFINE_integer("scene", 3, "number of the drawn scene", lower_bound=0)
    flags.DEFINE_integer("iterations", 10, "mean-field iterations", lower_bound=0)
    flags.DEFINE_float("factor", 5.0, "each parameter is divided and multiplied by this", lower_bound=1.0)
    cli.run(main)
