"""A network small enough to reason about, and a data set in memory."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from configs.base import get_config

PALETTE = np.random.default_rng(0).integers(0, 256, (256, 3)).astype(np.uint8)


@dataclass(frozen=True)
class ColorNetwork:
    """Scores at stride 8 from the color around a position; `reach` pixels away is as far as it looks."""

    num_classes: int = 4
    reach: int = 4

    def apply(self, variables, images, train=False, valid=None):
        assert not train
        x = images.astype(jnp.float32) - 128
        x = jnp.where(valid[..., None], x, 0.0)
        side = 2 * self.reach + 1
        x = jax.lax.reduce_window(x, 0.0, jax.lax.add, (1, side, side, 1), (1, 1, 1, 1), "SAME") / side**2
        return x[:, ::8, ::8] @ variables["params"]["weights"], {}


def network_variables(num_classes: int = 4, seed: int = 0) -> dict:
    weights = np.random.default_rng(seed).normal(size=(3, num_classes)).astype(np.float32) / 20
    return {"params": {"weights": weights}}


@dataclass
class Example:
    image: np.ndarray
    label: np.ndarray | None
    name: str


@dataclass
class Memory:
    """A data set in memory; counts how often each example is read."""

    examples: list[Example]
    class_names: tuple[str, ...] = ("sky", "tree", "road", "car")
    palette: np.ndarray = field(default_factory=lambda: PALETTE)
    reads: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        self.reads.append(index)
        return self.examples[index]


def scene(size: tuple[int, int], seed: int = 0, num_classes: int = 4, void: bool = True) -> Example:
    """A photograph of blobs, smooth enough that a stride-8 network sees something, and a label with a void rim."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (size[0] // 12 + 2, size[1] // 12 + 2, 3))
    image = np.kron(coarse, np.ones((12, 12, 1)))[: size[0], : size[1]].astype(np.uint8)
    label = (image[..., 0] // (256 // num_classes)).clip(max=num_classes - 1).astype(np.uint8)
    if void:
        label[: size[0] // 10] = 255
    return Example(image, label, f"scene_{seed}")


def config(**evaluation) -> ConfigDict:
    settings = get_config()
    settings.eval.update({"crf_iterations": (0,), "trimap_widths": (1, 3), "overlays": 0} | evaluation)
    return settings
