"""The waiting time for refining a folder: cold-started processes, twenty photographs of twenty sizes.

Ours and pydensecrf2 read the same photographs and probabilities, refine them with the same parameters and write label
maps; Python's start, imports and compilation count on both sides. CPU seconds of the whole process.
"""

import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
from PIL import Image

from deeplab_jax.errors import UserError

COUNT = 20
SMALLEST, LARGEST = (200, 150), (500, 375)
PARAMETERS = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")

# Each script is called with the folder of photographs, the folder of probabilities and the folder of results.
LOOP = """
import pathlib, sys
import numpy as np
from PIL import Image
from deeplab_jax.crf import CRFParams, mean_field, ready, unary_from_probabilities
images, probs, out = map(pathlib.Path, sys.argv[1:])
for path in sorted(images.iterdir()):
    unary = unary_from_probabilities(np.load(probs / (path.stem + ".npy")))
    q = mean_field(unary, np.asarray(Image.open(path)), CRFParams({params}), 10)
    Image.fromarray(np.asarray(q.argmax(-1), np.uint8)).save(out / (path.stem + ".png"))
print(ready.run._cache_size())
"""
PEER = """
import pathlib, sys
import numpy as np
from PIL import Image
from pydensecrf import densecrf, utils
images, probs, out = map(pathlib.Path, sys.argv[1:])
w1, xy, rgb, w2, smooth = {params}
for path in sorted(images.iterdir()):
    p, image = np.load(probs / (path.stem + ".npy")), np.array(Image.open(path))
    height, width, labels = p.shape
    crf = densecrf.DenseCRF2D(width, height, labels)
    crf.setUnaryEnergy(utils.unary_from_softmax(np.ascontiguousarray(p.transpose(2, 0, 1))))
    crf.addPairwiseGaussian(sxy=smooth, compat=w2)
    crf.addPairwiseBilateral(sxy=xy, srgb=rgb, rgbim=image, compat=w1)
    q = np.array(crf.inference(10)).argmax(0).reshape(height, width)
    Image.fromarray(q.astype(np.uint8)).save(out / (path.stem + ".png"))
"""


def cold(case: dict[str, np.ndarray]) -> dict[str, float]:
    """CPU seconds of each, programs compiled by the loop, and ratios to pydensecrf2 if it is installed.

    Args:
      case: with `image` [H, W, 3] uint8, `unary` [H, W, C] and the CRF's parameters; photographs are its image resized.
    """
    values = [float(case[name]) for name in PARAMETERS]
    params = ", ".join(map(repr, values))
    with tempfile.TemporaryDirectory() as folder:
        top = pathlib.Path(folder)
        for name in ("images", "probs", "cache_refine", "cache_loop"):
            (top / name).mkdir()
        _photographs(case, top)
        refine = ["-m", "deeplab_jax.refine", f"--image={top / 'images'}", f"--probs={top / 'probs'}"]
        refine += [f"--{flag}={value!r}" for flag, value in zip(PARAMETERS, values, strict=True)]
        refine += ["--iterations=10", "--normalization=symmetric"]
        runs = {
            "refine, empty cache": (refine, "cache_refine"),
            "refine, filled cache": (refine, "cache_refine"),
            "loop, empty cache": (["-c", LOOP.format(params=params)], "cache_loop"),
            "loop, filled cache": (["-c", LOOP.format(params=params)], "cache_loop"),
        }
        measured = {}
        for n, (name, (command, cache)) in enumerate(runs.items()):
            out = top / f"out{n}"
            out.mkdir()
            command = [*command, f"--out={out}"] if "refine" in name else [*command, *_folders(top, out)]
            measured[name], printed = _cpu_seconds(command, str(top / cache))
            if "loop" in name:
                measured["programs of the loop"] = float(printed.split()[-1])
        out = top / "peer"
        out.mkdir()
        try:
            import pydensecrf  # noqa: F401  # an extra of the experiments
        except ImportError:
            return measured
        theirs, _ = _cpu_seconds(["-c", PEER.format(params=params), *_folders(top, out)], str(top))
        ratios = {f"{name}, ratio": s / theirs for name, s in measured.items() if "cache" in name}
        return measured | {"pydensecrf2": theirs} | ratios


def _folders(top: pathlib.Path, out: pathlib.Path) -> list[str]:
    return [str(top / "images"), str(top / "probs"), str(out)]


def _photographs(case: dict[str, np.ndarray], top: pathlib.Path) -> None:
    """Writes photographs of `COUNT` sizes and their probabilities."""
    image = Image.fromarray(case["image"])
    logits = -case["unary"].astype(np.float32)
    for n in range(COUNT):
        share = n / (COUNT - 1)
        width, height = (round(a + (b - a) * share) + (n % 3) for a, b in zip(SMALLEST, LARGEST, strict=True))
        rows, columns = np.arange(height) * logits.shape[0] // height, np.arange(width) * logits.shape[1] // width
        p = np.exp(logits[rows][:, columns])
        np.save(top / "probs" / f"{n:02}.npy", (p / p.sum(-1, keepdims=True)).astype(np.float32))
        image.resize((width, height), Image.Resampling.BICUBIC).save(top / "images" / f"{n:02}.png")


def _cpu_seconds(arguments: list[str], cache: str) -> tuple[float, str]:
    """CPU seconds, user and system, of a Python process with a folder for compiled programs, and what it printed."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    if "-m" in arguments:  # commands keep their programs themselves
        env |= {"DEEPLAB_COMPILATION_CACHE": cache}
    else:
        env |= {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    process = subprocess.Popen([sys.executable, *arguments], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"a child process ended with {os.waitstatus_to_exitcode(status)}; its error is above")
    return usage.ru_utime + usage.ru_stime, printed
