"""The options that are fixed when mean field is compiled."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of one run.

    Attributes:
      iterations: T; a tracer in programs for any number of iterations.
      normalization: "none", "before", "after" or "symmetric".
      bilateral: the filter of the appearance kernel, after resolving "auto".
      cutoff: of the exact filter.
      radius: (x, y) where the smoothness kernel is cut off, in pixels; None = not at all.
      extra: the filters of further kernels.
      update: "parallel", "convergent" or "frank_wolfe".
      regularizer: of "frank_wolfe": "entropy" or "euclidean".
      regularization: how much it counts, above 0.
      include_self: whether i = j counts.
      return_all: marginals of several numbers of iterations.
      counts: which ones; None = 0, 1, ..., T.
      return_log: log marginals.
      prune: leaves out labels that win nowhere; None = in plain calls only.
      storage_dtype: of marginals between iterations.
    """

    iterations: int | jax.Array = 10
    normalization: str = "symmetric"
    bilateral: str | None = "exact"
    cutoff: float | None = None
    radius: tuple[int, int] | None = None
    extra: tuple[str, ...] = ()
    update: str = "parallel"
    regularizer: str = "entropy"
    regularization: float = 1.0
    include_self: bool = True
    return_all: bool = False
    counts: tuple[int, ...] | None = None
    return_log: bool = False
    prune: bool | None = None
    storage_dtype: Any = None
