"""Times the dense CRF against pydensecrf2, and measures how its cost grows.

    PYTHONPATH=. python experiments/bench_crf.py --case v2_full.npz --modes compare,gradient,growth --out DIR

compare: ours with and without label pruning and pydensecrf2 (`pip install pydensecrf2`; omitted if missing),
  alternating
on one image, lattice and set-up included, compilation excluded and reported separately; labels versus the exact
marginals. gradient: forward and backward versus forward. growth: seconds and memory for 0.25..4 megapixels and 2..64
labels, with a plot. cold: CPU seconds of cold-started processes that refine twenty photographs of twenty sizes
(`crf_cold`). Memory is what the compiled program needs for arguments, results and temporaries, as planned by XLA.
Writes bench_crf.json and bench_crf.png to --out, and the table to stdout.
"""

import json
import pathlib
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from deeplab_jax import cli
from deeplab_jax.crf import CRFParams, mean_field
from deeplab_jax.errors import UserError
from experiments import crf_cold

FLAGS = flags.FLAGS
flags.DEFINE_string("case", None, "a .npz with image, unary, parameters and exact_symmetric", required=True)
flags.DEFINE_list("modes", ["compare", "gradient", "growth"], "what to measure")
flags.DEFINE_string("out", "runs/bench_crf", "folder for the results")
flags.DEFINE_integer("rounds", 7, "alternating runs of each system")


def main(argv: Sequence[str]) -> None:
    del argv
    unknown = set(FLAGS.modes) - set(MODES)
    if unknown:
        raise UserError(f"--modes names {sorted(unknown)}; choose from {', '.join(MODES)}")
    if not pathlib.Path(FLAGS.case).is_file():
        raise UserError(f"--case {FLAGS.case} does not exist; give the path of a .npz case")
    case = dict(np.load(FLAGS.case))
    out = pathlib.Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"platform": jax.default_backend(), "devices": jax.device_count(), "jax": jax.__version__}
    for mode in FLAGS.modes:
        results[mode] = MODES[mode](case, out)
    results["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (out / "bench_crf.json").write_text(json.dumps(results, indent=2))
    print(json.dumps(results, indent=2))


def compare(case: dict[str, np.ndarray], out: pathlib.Path) -> dict[str, dict[str, float]]:
    """Seconds, ratio to pydensecrf2 in the same round, and percent of labels wrong."""
    del out
    params, iterations = _params(case), int(case["iterations"])
    exact = case["exact_symmetric"].astype(np.float32)

    def ours(prune: bool) -> np.ndarray:
        q = mean_field(case["unary"], case["image"], params, iterations, bilateral="permutohedral", prune=prune)
        return np.asarray(q)

    systems = {"pruned": lambda: ours(True), "unpruned": lambda: ours(False)}
    peer = _pydensecrf(case)
    if peer is not None:
        systems["pydensecrf2"] = peer
    memory = {
        name: _memory(
            partial(
                mean_field, params=params, iterations=iterations, bilateral="permutohedral", prune=name == "pruned"
            ),
            case["unary"],
            case["image"],
        )[1]
        for name in systems
        if name != "pydensecrf2"
    }
    first = {name: _seconds(run)[0] for name, run in systems.items()}
    seconds = {name: [] for name in systems}
    table = {}
    for _ in range(FLAGS.rounds):
        for name, run in systems.items():
            spent, q = _seconds(run)
            seconds[name].append(spent)
            table[name] = {
                "wrong_percent": 100 * float((q.argmax(-1) != exact.argmax(-1)).mean()),
                "mean_abs_dq": float(np.abs(q - exact).mean()),
            }
    for name, row in table.items():
        row["seconds"] = statistics.median(seconds[name])
        row |= {"memory_mib": memory[name]} if name in memory else {}
        row["compile_seconds"] = first[name] - row["seconds"]
        if peer is not None:
            ratios = [a / b for a, b in zip(seconds[name], seconds["pydensecrf2"], strict=True)]
            row["of_pydensecrf2"] = statistics.median(ratios)
    return table


def gradient(case: dict[str, np.ndarray], out: pathlib.Path) -> dict[str, float]:
    """Forward, and forward with the gradient of a loss with respect to the unary, without pruning."""
    del out
    params = _params(case)

    def loss(unary: jax.Array) -> jax.Array:
        return (mean_field(unary, case["image"], params, 10, bilateral="permutohedral") ** 2).mean()

    unary = jnp.asarray(case["unary"])
    runs = {"forward": jax.jit(loss), "both": jax.jit(jax.value_and_grad(loss))}
    seconds = {name: [] for name in runs}
    for n in range(FLAGS.rounds + 1):
        for name, run in runs.items():
            spent, _ = _seconds(lambda run=run: run(unary))
            if n:
                seconds[name].append(spent)
    ratio = statistics.median(b / f for b, f in zip(seconds["both"], seconds["forward"], strict=True))
    return {name: statistics.median(s) for name, s in seconds.items()} | {"ratio": ratio}


def growth(case: dict[str, np.ndarray], out: pathlib.Path) -> dict[str, dict[str, dict[str, float]]]:
    """Seconds and memory of two iterations (set-up included): megapixels at 21 labels, labels at 0.25 megapixels."""
    import matplotlib.pyplot as plt
    from PIL import Image

    params = _params(case)
    rng = np.random.default_rng(0)

    def measure(megapixels: float, labels: int) -> tuple[float, float]:
        width = round((megapixels * 1e6 * 4 / 3) ** 0.5)
        height = round(width * 3 / 4)
        image = np.asarray(Image.fromarray(case["image"]).resize((width, height), Image.Resampling.BICUBIC))
        unary = jnp.asarray(rng.normal(size=(height, width, labels)), jnp.float32)
        program, mib = _memory(
            partial(mean_field, params=params, iterations=2, bilateral="permutohedral"), unary, image
        )
        _seconds(lambda: program(unary, image))
        return statistics.median(_seconds(lambda: program(unary, image))[0] for _ in range(5)), mib

    measured = {
        "megapixels": {str(m): measure(m, 21) for m in (0.25, 0.5, 1, 2, 4)},
        "labels": {str(c): measure(0.25, c) for c in (2, 4, 8, 16, 32, 64)},
    }
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.2), layout="constrained")
    for n, (name, row) in enumerate(measured.items()):
        for axis, values, ylabel in zip(axes[2 * n :], zip(*row.values()), ("seconds, 2 iterations", "MiB")):
            axis.plot([float(x) for x in row], values, "o-")
            axis.set(xlabel=name, ylabel=ylabel, xlim=(0, None), ylim=(0, None))
    figure.savefig(out / "bench_crf.png", dpi=100)
    kinds = ("seconds", "mib")
    return {name: {x: dict(zip(kinds, pair)) for x, pair in row.items()} for name, row in measured.items()}


def cold(case: dict[str, np.ndarray], out: pathlib.Path) -> dict[str, float]:
    """CPU seconds of cold-started processes; see `crf_cold`."""
    del out
    return crf_cold.cold(case)


MODES = {"compare": compare, "gradient": gradient, "growth": growth, "cold": cold}


def _params(case: dict[str, np.ndarray]) -> CRFParams:
    names = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")
    return CRFParams(**{name: float(case[name]) for name in names})


def _pydensecrf(case: dict[str, np.ndarray]) -> Callable[[], np.ndarray] | None:
    try:
        from pydensecrf import densecrf
    except ImportError:
        return None
    height, width, labels = case["unary"].shape
    image = np.ascontiguousarray(case["image"])

    def run() -> np.ndarray:
        crf = densecrf.DenseCRF2D(width, height, labels)
        crf.setUnaryEnergy(np.ascontiguousarray(case["unary"].reshape(-1, labels).T))
        crf.addPairwiseGaussian(sxy=float(case["gaussian_xy_std"]), compat=float(case["gaussian_weight"]))
        crf.addPairwiseBilateral(
            sxy=float(case["bilateral_xy_std"]),
            srgb=float(case["bilateral_rgb_std"]),
            rgbim=image,
            compat=float(case["bilateral_weight"]),
        )
        return np.array(crf.inference(int(case["iterations"]))).T.reshape(height, width, labels)

    return run


def _memory(run: Callable, unary: np.ndarray, image: np.ndarray) -> tuple[Callable, float]:
    """The compiled program, and its memory in MiB."""
    program = jax.jit(run).lower(unary, image).compile()
    plan = program.memory_analysis()
    return program, (plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes) / 2**20


def _seconds(run: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


if __name__ == "__main__":
    cli.run(main)
