"""The pictures of docs/concepts.md, on a drawn scene: atrous convolution, output stride, mean field.

  python -m experiments.concept_pictures --out docs/images

No network is trained for them: the first shows where the package's convolution reads, found by its gradient; the other
two start from the ground truth sampled at the output stride, the best that a score map of that size can represent.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags

from deeplab_jax import cli
from experiments import common
from experiments.crf_parameters import enlarged, rough_probabilities, scene, seen_from_afar

FLAGS = flags.FLAGS

STRIDE = 8
_BRANCHES = np.array([(253, 231, 37), (255, 127, 14), (80, 220, 255), (240, 90, 200)], np.float32)


def reads(size: tuple[int, int], rate: int, kernel: int = 3) -> np.ndarray:
    """The cells of a map on which the atrous convolution's center output depends: bool [h, w]."""
    import jax
    import jax.numpy as jnp

    from deeplab_jax.models.cpu.convolution import conv

    ones = jnp.ones((kernel, kernel, 1, 1))
    center = lambda x: conv(x, ones, rate=rate)[0, size[0] // 2, size[1] // 2, 0]  # noqa: E731
    return np.asarray(jax.grad(center)(jnp.zeros((1, *size, 1))))[0, :, :, 0] > 0


def atrous(image: np.ndarray, rates: Sequence[int]) -> np.ndarray:
    """A 3x3 kernel at several rates on a map of output stride 8, and the parallel branches of ASPP together."""
    from deeplab_jax.imaging.overlay import side_by_side

    size = tuple((n - 1) // STRIDE + 1 for n in image.shape[:2])
    panels = [painted(image, [reads(size, rate)]) for rate in (1, 2, 4)]
    panels.append(painted(image, [reads(size, 1, kernel=1), *(reads(size, rate) for rate in rates)]))
    titles = ["3x3, rate 1", "3x3, rate 2", "3x3, rate 4", f"ASPP: 1x1 and rates {', '.join(map(str, rates))}"]
    return side_by_side(panels, titles)


def painted(image: np.ndarray, branches: Sequence[np.ndarray]) -> np.ndarray:
    """The photograph in gray with the cells that each branch reads in a color of its own, [2 H, 2 W, 3] uint8."""
    gray = enlarged(np.repeat(image.mean(-1, keepdims=True), 3, axis=-1) * 0.6 + 20)
    for color, cells in zip(_BRANCHES[: len(branches)], branches, strict=True):
        for y, x in np.argwhere(cells) * STRIDE * 2:
            gray[max(0, y - 6) : y + 6, max(0, x - 6) : x + 6] = color
    return gray.round().astype(np.uint8)


def strides(image: np.ndarray, label: np.ndarray, palette: np.ndarray, num_classes: int) -> np.ndarray:
    """The truth after a round trip through maps of output stride 32, 16 and 8, with the share of correct pixels."""
    from deeplab_jax.imaging.overlay import side_by_side

    pictures, titles = [enlarged(image), enlarged(palette[label])], ["photograph", "truth"]
    for stride in (32, 16, 8):
        found = seen_from_afar(label, stride, num_classes).argmax(-1)
        pictures.append(enlarged(palette[found]))
        titles.append(f"stride {stride}: {100 * np.mean(found == label):.0f} % right")
    return side_by_side(pictures, titles)


def iterations(image, label, palette, setting, num_classes: int) -> np.ndarray:
    """Labels and uncertainty by iteration: each pixel in the mean of the label colors weighted by its marginals."""
    from deeplab_jax.crf import mean_field, unary_from_probabilities
    from deeplab_jax.imaging.overlay import side_by_side

    unary = unary_from_probabilities(rough_probabilities(label, num_classes))
    frames = mean_field(unary, image, setting.params, 10, normalization=setting.normalization, return_all=True)
    shown = (0, 1, 2, 10)
    mixed = [np.rint(np.asarray(frames[n]) @ palette[:num_classes].astype(np.float32)) for n in shown]
    titles = ["scores" if n == 0 else f"{n} iteration{'s' if n > 1 else ''}" for n in shown]
    pictures = [enlarged(image), *(enlarged(np.clip(m, 0, 255).astype(np.uint8)) for m in mixed)]
    return side_by_side(pictures, ["photograph", *titles])


def main(argv: Sequence[str]) -> None:
    del argv
    from deeplab_jax.crf import setting_from_config
    from deeplab_jax.data.builders.shapes.scenes import CLASS_NAMES
    from deeplab_jax.imaging.files import write_png
    from deeplab_jax.imaging.palettes import voc_palette

    config, palette, classes = common.load_config(), voc_palette(), len(CLASS_NAMES)
    image, label = scene(FLAGS.scene)
    pictures = {
        "atrous.png": atrous(image, config.model.head_rates),
        "output_stride.png": strides(image, label, palette, classes),
        "mean_field.png": iterations(image, label, palette, setting_from_config(config.crf), classes),
    }
    for name, picture in pictures.items():
        write_png(Path(FLAGS.out) / name, picture)
        print(f"written: {Path(FLAGS.out) / name}")


if __name__ == "__main__":
    common.define_flags("shapes", "concept_pictures")
    flags.DEFINE_integer("scene", 3, "number of the drawn scene", lower_bound=0)
    cli.run(main)
