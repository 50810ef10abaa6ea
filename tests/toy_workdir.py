"""A training workdir with a small random network, made in seconds."""

from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from deeplab_jax.configs.base import get_config
from deeplab_jax.files import write_json
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.models import create_model, initial
from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.weights import files as weight_files
from deeplab_jax.weights import transfer

NAMES = ("background", "cat", "dog", "tree")


def toy_config() -> ConfigDict:
    """A network of few channels whose scores follow the colors; a CRF narrow enough for small pictures."""
    config = get_config()
    config.model.update({"backbone": "resnet_small", "head": "plain", "widths": (4, 4, 8, 8), "blocks": (1, 1, 1, 1)})
    config.model.batch_norm = "trained"
    config.crf.update({"preset": "", "iterations": 4, "bilateral_weight": 4.0, "bilateral_xy_std": 12.0})
    config.crf.update({"bilateral_rgb_std": 10.0, "gaussian_weight": 2.0, "gaussian_xy_std": 1.5})
    return config


def toy_variables(config: ConfigDict, classes: int = len(NAMES), scale: float = 6.0) -> dict:
    """Random values, with scores spread enough that every class wins somewhere and no class everywhere."""
    key = str(config.model), classes, scale
    if key not in _MADE:
        _MADE[key] = _variables(config, classes, scale)
    return jax.tree.map(np.copy, _MADE[key])


_MADE: dict[tuple, dict] = {}  # each is made once in a process


def _variables(config: ConfigDict, classes: int, scale: float) -> dict:
    model = create_model(config.model, classes)
    images = np.random.default_rng(0).integers(0, 256, (1, 65, 65, 3)).astype(np.float32)
    variables = initial.draw(model, initial.plan(model), seed=1)
    scores = jax.jit(lambda v, x: model.apply(v, x, train=False)[0])(variables, images)
    for path, leaf in flatten_dict(variables).items():
        if path[1] == "head" and path[-1] == "kernel":
            leaf *= scale / np.std(scores)
        if path[1] == "head" and path[-1] == "bias":
            leaf -= np.asarray(scores.mean((0, 1, 2))) * scale / np.std(scores)
    return variables


def write_toy_workdir(folder: Path, step: int = 7) -> Path:
    """Writes the workdir and returns it."""
    config = toy_config()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", config.to_dict())
    prefix = {"params": "trainable", "batch_stats": "batch_stats"}
    flat = flatten_dict(toy_variables(config))
    tree = {".".join((prefix[path[0]], *path[1:])): value for path, value in flat.items()}
    meta = {"class_names": list(NAMES), "palette": voc_palette().tolist(), "num_classes": len(NAMES)}
    Checkpoints(folder).save(step, tree, meta | {"data_fingerprint": "toy"})
    return folder


def photograph(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    """A few flat colors with sharp outlines and a little noise: uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(20, 236, (size[0] // 20 + 2, size[1] // 20 + 2, 3))
    image = np.kron(coarse, np.ones((20, 20, 1)))[: size[0], : size[1]]
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def write_weights(folder: Path, classes: int = len(NAMES)) -> list[str]:
    """A config file and converted weights for it; returns the flags that name them."""
    config = toy_config()
    arrays = {transfer.full_name(p): v for p, v in flatten_dict(toy_variables(config, classes)).items()}
    meta = {"preprocessing": config.model.preprocessing, "backbone": "resnet_small", "head": "plain"}
    weight_files.write(folder / "w.safetensors", arrays, meta)
    (folder / "toy.py").write_text("from tests.toy_workdir import toy_config as get_config  # noqa: F401\n")
    return [f"--config={folder}/toy.py", f"--init_from={folder}/w.safetensors"]
