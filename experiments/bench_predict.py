"""Speed of inference: ResNet-101 with ASPP-L against PyTorch, the network alone and from file to file.

    python -m experiments.bench_predict --case v2_full.npz [--only network,predict] [--rounds 7] [--out runs/bench]

network  images/s at 321 x 321, batch 1, over PyTorch's, same network, weights and threads: channels-last, the better of
         eager and torch.compile. Systems in turn, each in a process of its own, medians of ratios.
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
from experiments.children import Child, work_when_asked
from experiments.timing import in_turn, median_ratio, threads

FLAGS = flags.FLAGS
SIZE = (321, 321)
CLASSES = 21
ITERATIONS = 10


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_list("only", ["network", "predict"], "rows to measure")
    flags.DEFINE_integer("rounds", 7, "rounds in which the systems take turns", lower_bound=1)
    flags.DEFINE_bool("compile_peer", True, "also try torch.compile")
    flags.DEFINE_string("case", "", "a .npz with image [H, W, 3] and unary [H, W, 21], for the row predict")
    flags.DEFINE_string("out", "runs/bench", "folder for bench_predict.json")
    flags.DEFINE_list("worker", [], "internal: a row and a folder, for the child process that is ours")


def main(argv: Sequence[str]) -> None:
    """Prints and writes the measurements."""
    del argv
    if FLAGS.worker:
        return worker(*FLAGS.worker)
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

    torch.set_num_threads(threads())
    config, variables = network_and_weights()
    path = Path(FLAGS.out) / "bench_predict.json"
    results = json.loads(path.read_text()) if path.is_file() else {}
    results |= {"jax": jax.__version__, "torch": torch.__version__, "platform": jax.default_backend()}
    results |= {"threads": threads()}
    for name in FLAGS.only:
        with tempfile.TemporaryDirectory() as folder:
            peers, compare = ROWS[name](config, variables, Path(folder))
            ours = Child("experiments.bench_predict", f"--worker={name},{folder}", f"--case={FLAGS.case}")
            try:
                systems = {"ours": ours.work} | peers
                notes = compare()
                seconds = in_turn(systems, FLAGS.rounds)
            finally:
                ours.close()
        row = {f"seconds {system}": round(statistics.median(s), 3) for system, s in seconds.items()}
        best = min((s for s in systems if s != "ours"), key=lambda system: statistics.median(seconds[system]))
        ratio = round(median_ratio(seconds[best], seconds["ours"]), 3)
        results[name] = row | {"best_peer": best, "ours_over_peer": ratio, **notes}
        results[name]["xla_flags"] = os.environ.get("XLA_FLAGS", "")
        print(json.dumps({name: results[name]}, indent=1), flush=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")


def network_and_weights() -> tuple:
    """The config at one scale, and variables like those of a trained network."""
    from deeplab_jax.config import load_config
    from experiments.plausible_weights import plausible_variables

    config = load_config("voc_aspp_l", ["model.scales=1.0,"])
    config.crf.normalization = "symmetric"  # pydensecrf's
    return config, plausible_variables(config.model, CLASSES)


# ---- ours: a process of its own ------------------------------------------------------------------------------------


def worker(row: str, folder: str) -> None:
    """The child process: builds, works once, writes its result to the folder, reports; then works on request."""
    config, variables = network_and_weights()
    work = {"network": our_network, "predict": our_predict}[row](config, variables, Path(folder))
    work()
    work_when_asked(work, {})


def our_network(config, variables: dict, folder: Path) -> Callable:
    """Scores of one image; the first are saved as ours.npy."""
    import jax

    from deeplab_jax.models import create_model

    model = create_model(config.model, CLASSES)
    run = jax.jit(lambda variables, image: model.apply(variables, image, train=False)[0])
    on_device = jax.device_put(variables)
    image = _image(SIZE)[None]
    np.save(folder / "ours.npy", run(on_device, image))
    return lambda: jax.block_until_ready(run(on_device, image))


def our_predict(config, variables: dict, folder: Path) -> Callable:
    """From photograph.jpg to ours.png."""
    from deeplab_jax.imaging import files, palettes
    from deeplab_jax.inference.from_config import create_segmenter

    palette = palettes.voc_palette()
    segment = create_segmenter(config, variables, [str(i) for i in range(CLASSES)], palette)
    log_probs = _log_probs()

    def run() -> None:
        image = files.read_photograph(folder / "photograph.jpg")
        segment.scores([image])
        marginals = segment.refine(log_probs, image, ITERATIONS)
        files.write_palette_png(folder / "ours.png", marginals.argmax(-1).astype(np.uint8), palette)

    return run


# ---- the peer ------------------------------------------------------------------------------------------------------


def network(config, variables: dict, folder: Path) -> tuple[dict[str, Callable], Callable]:
    """The peer's scores of one image, and their difference from ours."""
    image = _image(SIZE)[None]
    peers, note = _torch_networks(variables, image)

    def compare() -> dict:
        ours, theirs = np.load(folder / "ours.npy"), peers["torch eager"]().permute(0, 2, 3, 1).numpy()
        difference = float(np.abs(ours - theirs).max() / np.abs(ours).max())
        if difference > 1e-3:
            raise AssertionError(f"the two networks differ by {difference}")
        return {"note": note, "relative_difference": difference}

    return peers, compare


def predict(config, variables: dict, folder: Path) -> tuple[dict[str, Callable], Callable]:
    """The peer's path from a photograph's file to a file of labels, and the share of labels that differ from ours."""
    from PIL import Image

    from deeplab_jax.imaging import palettes

    photograph, palette = np.load(FLAGS.case)["image"], palettes.voc_palette()
    Image.fromarray(photograph).save(folder / "photograph.jpg", quality=95)
    log_probs = _log_probs()
    networks, note = _torch_networks(variables, _image(photograph.shape[:2])[None], upsample=True)

    def theirs(network: Callable) -> None:
        image = np.asarray(Image.open(folder / "photograph.jpg").convert("RGB"))
        network(image[None])
        labels = _densecrf(image, -log_probs, config).argmax(0).reshape(image.shape[:2])
        result = Image.fromarray(labels.astype(np.uint8), mode="P")
        result.putpalette(np.asarray(palette).ravel().tolist())
        result.save(folder / "theirs.png")

    peers = {f"{n} + pydensecrf": lambda f=f: theirs(f) for n, f in networks.items()}
    for run in peers.values():
        run()

    def compare() -> dict:
        ours, others = (np.asarray(Image.open(folder / f"{name}.png")) for name in ("ours", "theirs"))
        return {"note": note, "labels_that_differ_percent": 100 * float((ours != others).mean())}

    return peers, compare


ROWS = {"network": network, "predict": predict}


def _log_probs() -> np.ndarray:
    """The case's scores [H, W, C] as log-probabilities."""
    unary = np.ascontiguousarray(np.load(FLAGS.case)["unary"], np.float32)
    log_probs = unary.min(-1, keepdims=True) - unary
    return log_probs - np.log(np.exp(log_probs).sum(-1, keepdims=True))


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

    params = crf.setting_from_config(config.crf).params
    height, width, labels = unary.shape
    field = densecrf.DenseCRF2D(width, height, labels)
    field.setUnaryEnergy(np.ascontiguousarray(unary.reshape(-1, labels).T))
    field.addPairwiseGaussian(sxy=float(params.gaussian_xy_std), compat=float(params.gaussian_weight))
    field.addPairwiseBilateral(
        sxy=float(params.bilateral_xy_std),
        srgb=float(params.bilateral_rgb_std),
        rgbim=np.array(image),  # a copy, because it rejects read-only arrays
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
