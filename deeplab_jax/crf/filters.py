"""The filters of the appearance kernel. A new one is its module and a line in `FILTERS`.

A module has two functions: `build(features) -> structure`, of features [N, D] divided by their standard deviations, a
structure being any pytree; and `apply(structure, values)`, which sums values [N, C] over all points with the weights
exp(-|f_i - f_j|^2 / 2), or comes close to it, i = j included, and has a gradient.
"""

import dataclasses
from types import ModuleType
from typing import Any

import jax

from deeplab_jax.crf import exact, gaussian, permutohedral, separable


@dataclasses.dataclass(frozen=True)
class Filter:
    """One line of the registry.

    Attributes:
      module: what `build` and `apply` are in.
      grid: whether `build` takes `grid=(H, W)`: points have to be pixels in rows.
      cutoff: whether `build` takes `cutoff`, below which kernel values may be skipped.
      width_gradient: whether marginals have a gradient in the features, and so in the kernel's widths.
    """

    module: ModuleType
    grid: bool = False
    cutoff: bool = False
    width_gradient: bool = True


FILTERS: dict[str, Filter] = {
    "permutohedral": Filter(permutohedral, width_gradient=False),
    "exact": Filter(exact, cutoff=True),
    "separable": Filter(separable, grid=True),
}
SMOOTHNESS = "gaussian"  # the one of the smoothness kernel, which is on position alone


def check_name(name: str) -> None:
    """Raises ValueError for a name that is neither "auto" nor in `FILTERS`."""
    if name != "auto" and name not in FILTERS:
        raise ValueError(f"bilateral={name!r} must be one of auto, {', '.join(FILTERS)}")


def build(name: str, features: jax.Array, grid: tuple[int, int] | None, cutoff: float | None) -> Any:
    """The structure of a filter for features [N, D]; `grid` is None where the points are no pixels in rows."""
    chosen = FILTERS[name]
    options: dict[str, Any] = {"cutoff": cutoff} if chosen.cutoff else {}
    if chosen.grid:
        options["grid"] = grid
    return chosen.module.build(features, **options)


def apply(name: str, structure: Any, values: jax.Array) -> jax.Array:
    """The sums of a filter that was built, or of the smoothness kernel's; [N, C]."""
    module = gaussian if name == SMOOTHNESS else FILTERS[name].module
    return module.apply(structure, values)


def for_points(name: str) -> str:
    """The filter that takes a chosen one's place over points that are no pixels in rows."""
    return "permutohedral" if FILTERS[name].grid else name
