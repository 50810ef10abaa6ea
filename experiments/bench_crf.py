"""Times the dense CRF against pydensecrf2, and measures how its cost grows.

    python -m experiments.bench_crf --case v2_full.npz --modes compare,gradient,growth --out DIR

compare: ours with and without label pruning and pydensecrf2 (`pip install pydensecrf2`; omitted if missing), in turn on
one image, lattice and set-up included, compilation excluded and reported separately; labels versus the exact marginals.
sizes: the plain call on that photograph, also smaller, with several widths, and pydensecrf2, in turn. gradient: forward
and backward versus forward. growth: seconds and memory for 0.25..4 megapixels and 2..64 labels, with a plot. cold: CPU
seconds of cold-started processes that refine twenty photographs of twenty sizes (`crf_cold`). Memory is what the
compiled program needs for arguments, results and temporaries, as planned by XLA.
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
from PIL import Image

from deeplab_jax import cli
from deeplab_jax.crf import CRFParams, mean_field
from deeplab_jax.errors import UserError
from experiments import crf_cases, crf_cold

FLAGS = flags.FLAGS
flags.DEFINE_string("case", None, "a .npz with image, unary, parameters and exact_symmetric", required=True)
flags.DEFINE_list("modes", ["compare", "gradient", "growth"], "what to measure")
flags.DEFINE_string("out", "runs/bench_crf", "folder for the results")
flags.DEFINE_integer("rounds", 7, "alternating runs of each system")

SIZES = (((160, 120), 11), ((240, 180), 11), ((250, 188), 21), ((500, 375), 21))  # width and height, labels
WIDTHS = ((50, 10), (80, 13), (30, 8), (67, 3), (121, 5))


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

    def theirs() -> np.ndarray:
        return crf_cases.peer(case["unary"], case["image"], params, iterations=iterations)

    systems = {"pruned": lambda: ours(True), "unpruned": lambda: ours(False)}
    compared = theirs() is not None
    if compared:
        systems["pydensecrf2"] = theirs
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
        if compared:
            ratios = [a / b for a, b in zip(seconds[name], seconds["pydensecrf2"], strict=True)]
            row["of_pydensecrf2"] = statistics.median(ratios)
    return table


def sizes(case: dict[str, np.ndarray], out: pathlib.Path) -> dict[str, dict[str, float]]:
    """Seconds of the plain call and over pydensecrf2's in the same round, for `SIZES` and `WIDTHS`."""
    del out
    table = {}
    for (width, height), labels in SIZES:
        image, unary = case["image"], case["unary"]
        if (height, width, labels) != unary.shape:
            image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))
            unary = crf_cases.scores(image, labels)
        if crf_cases.peer(unary[:8, :8], image[:8, :8], _params(case)) is None:
            raise UserError("--modes sizes compares with pydensecrf2: pip install pydensecrf2")
        for xy, rgb in WIDTHS:
            params = CRFParams(4.0, xy, rgb, 3.0, 3.0)
            runs = [
                lambda: np.asarray(mean_field(unary, image, params, 10)),  # noqa: B023  run at once
                lambda: crf_cases.peer(unary, image, params),  # noqa: B023
            ]
            rounds = [[_seconds(run)[0] for run in runs] for _ in range(FLAGS.rounds + 1)][1:]
            ours = statistics.median(a for a, _ in rounds)
            ratio = statistics.median(a / b for a, b in rounds)
            table[f"{width}x{height}, {labels} labels, ({xy}, {rgb})"] = {"seconds": ours, "of_pydensecrf2": ratio}
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


MODES = {"compare": compare, "sizes": sizes, "gradient": gradient, "growth": growth, "cold": cold}


def _params(case: dict[str, np.ndarray]) -> CRFParams:
    names = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")
    return CRFParams(**{name: float(case[name]) for name in names})


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
