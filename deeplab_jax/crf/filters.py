"""The filters of the appearance kernel. Adding one takes its module and a line in `FILTERS`.

A module has two functions: `build(features) -> structure`, for features [N, D] divided by their standard deviations,
where a structure is any pytree; and `apply(structure, values)`, which sums values [N, C] over all points with the
weights exp(-|f_i - f_j|^2 / 2), i = j included, exactly or approximately, and has a gradient.
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
      module: the module with `build` and `apply`.
      grid: whether `build` takes `grid=(H, W)`: points must be the pixels of an image, row by row.
      cutoff: whether `build` takes `cutoff`, below which kernel values may be skipped, and `far`: see `exact.build`.
      width_gradient: whether marginals have a gradient in the features, and so in the kernel's widths.
      turns: whether it is the mean of several filters: `apply` takes `turn`, and a structure has `lattices`.
    """

    module: ModuleType
    grid: bool = False
    cutoff: bool = False
    width_gradient: bool = True
    turns: bool = False


FILTERS: dict[str, Filter] = {
    "permutohedral": Filter(permutohedral, width_gradient=False, turns=True),
    "exact": Filter(exact, cutoff=True),
    "separable": Filter(separable, grid=True),
}
Turn = int | jax.Array | None
SMOOTHNESS = "gaussian"  # the filter of the smoothness kernel, which depends on position only


def check_name(name: str) -> None:
    """Raises ValueError for a name that is neither "auto" nor in `FILTERS`."""
    if not isinstance(name, str) or (name != "auto" and name not in FILTERS):
        raise ValueError(f"bilateral={name!r} must be one of auto, {', '.join(FILTERS)}")


def build(name: str, features: jax.Array, grid: tuple[int, int] | None, cutoff: float | None) -> Any:
    """The structure of a filter for features [N, D]; `grid` is None if the points are not the pixels of an image."""
    chosen = FILTERS[name]
    # Colors and places in a photograph are near each other, in standard deviations; other features may not be.
    options: dict[str, Any] = {"cutoff": cutoff, "far": grid is None} if chosen.cutoff else {}
    if chosen.grid:
        options["grid"] = grid
    return chosen.module.build(features, **options)


def apply(name: str, structure: Any, values: jax.Array, turn: Turn = None) -> jax.Array:
    """The sums of a built filter, the smoothness kernel's included; [N, C].

    `turn` n: of a filter that is the mean of several, such as lattices, only the one whose turn it is, n modulo their
    number. None: the mean of all.
    """
    if name != SMOOTHNESS and FILTERS[name].turns and turn is not None:
        return FILTERS[name].module.apply(structure, values, turn % structure.lattices)
    module = gaussian if name == SMOOTHNESS else FILTERS[name].module
    return module.apply(structure, values)


def for_points(name: str) -> str:
    """The filter that replaces the chosen one for points that are not the pixels of an image."""
    return "permutohedral" if FILTERS[name].grid else name
