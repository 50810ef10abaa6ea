"""Mean field against regularized Frank-Wolfe (Le-Huu and Alahari, NeurIPS 2021) on a trained network's scores.

  python -m experiments.updates --config camvid --config.data.dir=PATH/camvid --model camvid

--model names a workdir, an exported artifact or a model of the package; its network, at one scale, and its CRF
parameters are used. All updates run the same iterations with the same filter, under the symmetric normalization, which
Frank-Wolfe needs. Measured on `config.eval.split`: mean IoU, over whole images and within 3 pixels of boundaries, and
the energy (Eq. 1) of the labelling per pixel, relative to the network's labelling.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags

from deeplab_jax import cli
from deeplab_jax.console import Meter
from deeplab_jax.metrics.confusion import confusion_matrix, mean_iou
from deeplab_jax.metrics.trimap import band
from experiments import common

FLAGS = flags.FLAGS

TRIMAP = 3  # pixels
UPDATES: Mapping[str, Mapping] = {
    "mean field": {},
    "Frank-Wolfe, entropy 1": {"update": "frank_wolfe"},
    "Frank-Wolfe, entropy 0.9": {"update": "frank_wolfe", "regularization": 0.9},
    "Frank-Wolfe, euclidean 1": {"update": "frank_wolfe", "regularizer": "euclidean"},
    "Frank-Wolfe, euclidean 3": {"update": "frank_wolfe", "regularizer": "euclidean", "regularization": 3.0},
}


def labellings(params, iterations: int, updates: Mapping[str, Mapping]) -> dict[str, Callable]:
    """For each update a compiled function (unary [H, W, C], image [H, W, 3]) -> (labels [H, W], their energy)."""
    import jax

    from deeplab_jax.crf import energy, mean_field

    def run(unary, image, options):
        labels = mean_field(unary, image, params, iterations, bilateral="permutohedral", **options).argmax(-1)
        return labels, energy(labels, unary, image, params, bilateral="permutohedral")

    return {name: jax.jit(partial(run, options=options)) for name, options in updates.items()}


def measure(model, dataset, indices: Sequence[int], updates: Mapping[str, Mapping]) -> list[dict]:
    """One dict per update, the network first: `name`, `mean_iou`, `trimap`, `energy` (per pixel, over the network's).

    Args:
      model: of `deeplab_jax.load`.
      dataset: its `dataset[i]` are examples with labels.
      indices: the images.
      updates: name -> keyword arguments of `mean_field`.
    """
    import jax

    from deeplab_jax.crf import energy
    from deeplab_jax.data import reading

    params, classes = model.crf.params, dataset.num_classes
    runs = labellings(params, model.crf.iterations, updates)
    energy_of = jax.jit(lambda labels, u, i: energy(labels, u, i, params, bilateral="permutohedral"))
    names = ["network", *runs]
    matrices = {name: np.zeros((2, classes, classes), np.int64) for name in names}
    energies: dict[str, list[float]] = {name: [] for name in names}
    meter = Meter(len(indices))
    for index in indices:
        example = reading.read(dataset, index)
        if example is None:
            continue
        scores = model.segmenter.scores([example.image])[0]
        found = {"network": (scores.argmax(-1), energy_of(scores.argmax(-1), -scores, example.image))}
        found |= {name: run(-scores, example.image) for name, run in runs.items()}
        inside = band(example.label, (TRIMAP,))
        for name, (labels, value) in found.items():
            matrices[name] += confusion_matrix(example.label, np.asarray(labels), classes, inside, 2)
            energies[name].append(float(value - found["network"][1]) / inside.size)
        if meter.tick():
            print(f"{meter.done} of {meter.total} images, {meter.left}", flush=True)
    return [
        {"name": n, "mean_iou": mean_iou(m.sum(0)), "trimap": mean_iou(m[0]), "energy": float(np.mean(energies[n]))}
        for n, m in matrices.items()
    ]


def table(results: Sequence[Mapping], title: str) -> common.Table:
    """The results of `measure`, accuracies in percent."""
    rows = [
        (r["name"], common.percent(r["mean_iou"]), common.percent(r["trimap"]), f"{r['energy']:+.4f}") for r in results
    ]
    return common.Table(title, ("update", "mean IoU", f"{TRIMAP} px", "energy per pixel, over the network's"), rows)


def main(argv: Sequence[str]) -> None:
    del argv
    import deeplab_jax
    from deeplab_jax.data import open_dataset

    config = common.load_config()
    model = deeplab_jax.load(FLAGS.model, scales=(1.0,), mirror=False)
    dataset = open_dataset(config.data, config.eval.split, seed=config.seed)
    count = min(FLAGS.images or len(dataset), len(dataset))
    indices = [i * len(dataset) // count for i in range(count)]
    results = measure(model, dataset, indices, UPDATES)
    title = f"{config.data.name}, {count} images of '{config.eval.split}', {model.crf.iterations} iterations, symmetric"
    common.write(Path(FLAGS.out), "updates", [table(results, title)], {"results": results})


if __name__ == "__main__":
    common.define_flags("camvid", "updates")
    flags.DEFINE_string("model", "camvid", "workdir, artifact or model of the package")
    flags.DEFINE_integer("images", 0, "images to measure, spread over the split; 0 = all", lower_bound=0)
    cli.run(main)
