"""Speed of inference: ResNet-101 with ASPP-L against PyTorch, the network alone and from file to file.

    python -m experiments.bench_predict --case v2_full.npz [--only network,predict] [--rounds 7] [--out runs/bench]

network  images/s at 321 x 321, batch 1, over PyTorch's, same network, weights and threads: channels-last, the better of
         eager and torch.compile. Systems in turn, medians of ratios.
predict  decode, network at one scale, 10 iterations of the CRF at full size, PNG: over PyTorch + pydensecrf2
         (`pip install torch pydensecrf2`). The photograph is the case's. Random weights know nothing, and how long our
         CRF takes depends on how many classes are in question: in both systems the network's scores are replaced by the
         case's before the CRF.
"""

import json
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from deeplab_jax import cli
from deeplab_jax.errors import UserError
from experiments.timing import CLOCKS, in_turn, median_ratio, threads

FLAGS = flags.FLAGS
SIZE = (321, 321)
CLASSES = 21
ITERATIONS = 10


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_list("only", ["network", "predict"], "rows to measure")
    flags.DEFINE_integer("rounds", 7, "rounds in which the systems take turns", lower_bound=1)
    flags.DEFINE_enum("clock", "wall", list(CLOCKS), "wall; or cpu, on a machine in use, under `taskset -c 0`")
    flags.DEFINE_bool("compile_peer", True, "also try torch.compile")
    flags.DEFINE_string("case", "", "a .npz with image [H, W, 3] and unary [H, W, 21], for the row predict")
    flags.DEFINE_string("out", "runs/bench", "folder for bench_predict.json")


def main(argv: Sequence[str]) -> None:
    """Prints and writes the measurements."""
    del argv
    unknown = set(FLAGS.only) - set(ROWS)
    if unknown:
        raise UserError(f"--only names {sorted(unknown)}; choose from {', '.join(ROWS)}")
    if "predict" in FLAGS.only and not Path(FLAGS.case).is_file():
        raise UserError(f"--case={FLAGS.case}: no such file; the row predict needs an image with its scores")
    try:
        import torch
    except ImportError as e:
        raise UserError("PyTorch is not installed; pip install torch pydensecrf2") from e
    import jax

    from deeplab_jax.config import load_config
    from experiments.plausible_weights import plausible_variables

    torch.set_num_threads(threads())
    config = load_config("voc_aspp_l", ["model.scales=1.0,"])
    variables = plausible_variables(config.model, CLASSES)
    path = Path(FLAGS.out) / "bench_predict.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"jax": jax.__version__, "torch": torch.__version__, "platform": jax.default_backend()}
    results |= {"threads": threads(), "clock": FLAGS.clock}
    for name in FLAGS.only:
        systems, notes = ROWS[name](config, variables)
        seconds = in_turn(systems, FLAGS.rounds, FLAGS.clock)
        row = {f"seconds {system}": round(statistics.median(s), 3) for system, s in seconds.items()}
        best = min((s for s in systems if s != "ours"), key=lambda system: statistics.median(seconds[system]))
        ratio = round(median_ratio(seconds[best], seconds["ours"]), 3)
        results[name] = row | {"best_peer": best, "ours_over_peer": ratio, **notes}
        results[name]["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def network(config, variables: dict) -> tuple[dict[str, Callable], dict]:
    """Scores of one image."""
    import jax

    from deeplab_jax.models import create_model

    model = create_model(config.model, CLASSES)
    run = jax.jit(lambda variables, image: model.apply(variables, image, train=False)[0])
    on_device = jax.device_put(variables)
    image = _image(SIZE)[None]
    systems = {"ours": lambda: jax.block_until_ready(run(on_device, image))}
    peers, note = _torch_networks(variables, image)
    mine, theirs = np.asarray(systems["ours"]()), peers["torch eager"]().permute(0, 2, 3, 1).numpy()
    difference = float(np.abs(mine - theirs).max() / np.abs(mine).max())
    if difference > 1e-3:
        raise AssertionError(f"the two networks differ by {difference}")
    return systems | peers, {"note": note, "relative_difference": difference}


def predict(config, variables: dict) -> tuple[dict[str, Callable], dict]:
    """From a photograph's file to a file of labels."""
    from PIL import Image

    from deeplab_jax.evaluation.segmenters import create_segmenter
    from deeplab_jax.imaging import files, palettes

    case = np.load(FLAGS.case)
    unary = np.ascontiguousarray(case["unary"], np.float32)
    folder = Path(tempfile.mkdtemp())
    photograph = folder / "photograph.jpg"
    Image.fromarray(case["image"]).save(photograph, quality=95)
    palette = palettes.voc_palette()
    names = [str(i) for i in range(CLASSES)]
    config.crf.normalization = "symmetric"  # pydensecrf's
    segment = create_segmenter(config, variables, names, palette)
    log_probs = unary.min(-1, keepdims=True) - unary
    log_probs -= np.log(np.exp(log_probs).sum(-1, keepdims=True))

    def ours() -> None:
        image = files.read_photograph(photograph)
        segment.scores([image])
        marginals = segment.refine(log_probs, image, ITERATIONS)
        files.write_palette_png(folder / "ours.png", marginals.argmax(-1).astype(np.uint8), palette)

    peers, note = _torch_networks(variables, _image(case["image"].shape[:2])[None], upsample=True)

    def theirs(network: Callable) -> None:
        image = np.asarray(Image.open(photograph).convert("RGB"))
        network(image[None])
        labels = _densecrf(image, -log_probs, config).argmax(0).reshape(image.shape[:2])
        result = Image.fromarray(labels.astype(np.uint8), mode="P")
        result.putpalette(np.asarray(palette).ravel().tolist())
        result.save(folder / "theirs.png")

    systems = {"ours": ours} | {f"{n} + pydensecrf": lambda f=f: theirs(f) for n, f in peers.items()}
    for run in systems.values():
        run()
    labels = [np.asarray(Image.open(folder / f"{name}.png")) for name in ("ours", "theirs")]
    return systems, {"note": note, "labels_that_differ_percent": 100 * float((labels[0] != labels[1]).mean())}


ROWS = {"network": network, "predict": predict}


def _torch_networks(variables: dict, image: np.ndarray, upsample: bool = False) -> tuple[dict[str, Callable], str]:
    """PyTorch's forward pass, eager and compiled: [1, H, W, 3] uint8 (default: `image`) -> scores."""
    import torch
    import torch.nn.functional as F

    from experiments.torch_network import DeepLab, compiled, network_input

    net = DeepLab(CLASSES).load(variables).eval()

    def forward(x: torch.Tensor) -> torch.Tensor:
        scores = net(x)
        if upsample:
            scores = F.interpolate(scores, x.shape[-2:], mode="bilinear", align_corners=True).softmax(1)
        return scores

    def runner(function: Callable) -> Callable:
        @torch.inference_mode()
        def run(x: np.ndarray = image) -> torch.Tensor:
            return function(network_input(x))

        return run

    systems = {"torch eager": runner(forward)}
    systems["torch eager"]()
    fast, note = None, "torch.compile not tried"
    if FLAGS.compile_peer:
        fast, note = compiled(forward, lambda function: runner(function)())
    if fast is not None:
        systems["torch compiled"] = runner(fast)
    return systems, note


def _densecrf(image: np.ndarray, unary: np.ndarray, config) -> np.ndarray:
    """pydensecrf's marginals [C, H * W] with the config's published parameters."""
    from pydensecrf import densecrf

    from deeplab_jax import crf

    params, _ = crf.params_from_config(config.crf)
    height, width, labels = unary.shape
    field = densecrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(-1, labels).T))
    field.addPairwiseGaussian(sxy=float(params.gaussian_xy_std), compat=float(params.gaussian_weight))
    field.addPairwiseBilateral(
        sxy=float(params.bilateral_xy_std),
        srgb=float(params.bilateral_rgb_std),
        rgbim=np.array(image),  # a copy: it takes no array that is only read
        compat=float(params.bilateral_weight),
    )
    return np.array(field.inference(ITERATIONS))


def _image(size: Sequence[int]) -> np.ndarray:
    """Smooth noise, [H, W, 3] uint8."""
    coarse = np.random.default_rng(0).integers(0, 256, (size[0] // 8 + 1, size[1] // 8 + 1, 3))
    return coarse.repeat(8, 0).repeat(8, 1)[: size[0], : size[1]].astype(np.uint8)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
