"""The plain call: concrete arrays, on the CPU, without gradients. It runs one program for many sizes (`ready`).

Labels that win nowhere are left out (`pruning`). In cases that are not covered here (the result is None) `mean_field`
runs a program compiled for the given shapes.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.crf import buffers, host_lattice, pruning, ready, ready_kernels
from deeplab_jax.crf.options import Options
from deeplab_jax.crf.params import IMPOSSIBLE, Array, CRFParams, Value, is_traced

_BLOCK = 16384  # points whose log probabilities are computed at once; they stay in the cache


def covers(options: Options, *arguments: Any) -> bool:
    """Whether the plain call supports these options and arguments."""
    usual = options.update == "parallel" and options.include_self and options.storage_dtype is None
    shown = not options.return_log and options.iterations > 0
    lattices = {options.bilateral, *options.extra} - {None} == {"permutohedral"}
    if not (usual and shown and lattices) or is_traced(arguments) or is_traced(jnp.add(0, 0)):  # the last inside a jit
        return False
    leaves = jax.tree.leaves(arguments)
    if any(np.dtype(leaf.dtype) == np.float64 for leaf in leaves if isinstance(leaf, jax.Array)):
        return False
    return _device(leaves) is not None


def _device(leaves: Sequence[Any]) -> jax.Device | None:
    """The CPU on which to compute, or None if the arguments are on another device."""
    arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
    # As for a compiled program: uncommitted arrays go to the device of the others.
    devices = [d for leaf in [a for a in arrays if a.committed] or arrays for d in leaf.devices()]
    if not devices:
        default = jax.config.jax_default_device  # type: ignore[attr-defined]  # JAX adds its settings at run time
        device = default or jax.devices()[0]
        return device if getattr(device, "platform", "") == "cpu" else None
    return devices[0] if len(set(devices)) == 1 and devices[0].platform == "cpu" else None


def _placed(out: np.ndarray, device: jax.Device | None, leaves: Sequence[Any]) -> jax.Array:
    """A result on the CPU of `_device`; committed to it, as of a compiled program, only if an argument was."""
    if any(isinstance(leaf, jax.Array) and leaf.committed for leaf in leaves):
        return jax.device_put(out, device)
    with jax.default_device(device):
        return jax.device_put(out)


def image_marginals(
    unary: Array,
    image: Array,
    params: CRFParams,
    compatibility: Array | None,
    mask: Array | None,
    features: Sequence[Array],
    weights: Sequence[Value],
    options: Options,
) -> jax.Array | None:
    """Like `mean_field`, for unary [H, W, C] or [B, H, W, C]; None if the features span too wide a range."""
    leaves = jax.tree.leaves((unary, image, params, mask, features))
    device = _device(leaves)
    height, width, labels = unary.shape[-3:]
    flat = lambda x, last: np.asarray(x).reshape(-1, height * width, *last)  # noqa: E731
    unaries, images, masks = (
        flat(unary, (labels,)),
        np.asarray(image).reshape(-1, height, width, 3),
        None if mask is None else flat(mask, ()),
    )
    extra = [flat(f, (f.shape[-1],)) for f in features]
    stds = [_pair(params.bilateral_xy_std), _pair(params.gaussian_xy_std)]
    results = []
    for n, one in enumerate(unaries):
        points = [_bilateral(images[n], stds[0], params.bilateral_rgb_std), *(f[n] for f in extra)]
        smooth = (height, width), stds[1], options.radius
        built = _Kernels.build(points, smooth, None if masks is None else masks[n], options, device)
        if built is None:
            return None
        every = [params.bilateral_weight, *weights, params.gaussian_weight]
        start = built.start(one, compatibility is None and _simple(every))
        results.append(built.marginals(start, every, compatibility))
    # The batch axis follows the axis of iterations, if all are requested.
    out = np.stack(results, -3) if len(results) > 1 else results[0][..., None, :, :]
    out = out.reshape(*out.shape[:-3], *unary.shape)
    return _placed(out.astype(unary.dtype, copy=False), device, leaves)


def point_marginals(
    unary: Array,
    compatibility: Array | None,
    mask: Array | None,
    features: Sequence[Array],
    weights: Sequence[Value],
    options: Options,
) -> jax.Array | None:
    """Like `mean_field_features`; None if the features span too wide a range."""
    leaves = jax.tree.leaves((unary, mask, features))
    device = _device(leaves)
    built = _Kernels.build(list(map(np.asarray, features)), None, mask, options, device)
    if built is None:
        return None
    start = built.start(np.asarray(unary), compatibility is None and _simple(weights))
    q = built.marginals(start, weights, compatibility)
    return _placed(q.astype(unary.dtype, copy=False), device, leaves)


def for_weights(
    unary: np.ndarray, image: np.ndarray, params: CRFParams, options: Options
) -> Callable[[Value, Value], np.ndarray] | None:
    """The marginals as a function of the kernels' weights; the lattices, which depend on the widths, are built once.

    Args:
      unary: [H, W, C] float32.
      image: [H, W, 3].
      params: the widths; its weights are not used.
      options: as `covers` accepts them.

    Returns:
      (bilateral_weight, gaussian_weight) -> float32 [H, W, C]; None if the features span too wide a range.
    """
    height, width, labels = unary.shape
    points = [_bilateral(image, _pair(params.bilateral_xy_std), params.bilateral_rgb_std)]
    smooth = (height, width), _pair(params.gaussian_xy_std), options.radius
    built = _Kernels.build(points, smooth, None, options, _device(()))
    if built is None:
        return None
    start = functools.cache(lambda simple: built.start(unary.reshape(-1, labels), simple))

    def marginals(appearance: Value, smoothness: Value) -> np.ndarray:
        weights = [appearance, smoothness]
        return built.marginals(start(_simple(weights)), weights, None).reshape(unary.shape)

    return marginals


def _simple(weights: Sequence[Value]) -> bool:
    """Whether labels that win nowhere may be left out: all labels count alike, and none repels itself."""
    return all(np.ndim(weight) == 0 and np.asarray(weight) >= 0 for weight in weights)


def _pair(std: Value) -> np.ndarray:
    return np.broadcast_to(np.asarray(std, np.float64), (2,))


def _bilateral(image: np.ndarray, xy_std: np.ndarray, rgb_std: Value) -> np.ndarray:
    """Like `kernels.bilateral_features`."""
    height, width, _ = image.shape
    features = np.empty((height, width, 5), np.float32)
    features[..., 0] = np.arange(width) / xy_std[0]
    features[..., 1] = (np.arange(height) / xy_std[1])[:, None]
    features[..., 2:] = image * (1 / np.broadcast_to(np.asarray(rgb_std, np.float32), (3,)))
    return features.reshape(-1, 5)


@dataclasses.dataclass(frozen=True)
class _Kernels:
    """The kernels of one image, or of points, without their weights.

    Attributes:
      lattices: one kernel for each of several features.
      spatial: the smoothness kernel, if there is one.
      valid: float32 [N], 0 where a point is masked; None = all count.
    """

    lattices: list[ready_kernels.LatticeKernel]
    spatial: ready_kernels.SpatialKernel | None
    valid: np.ndarray | None
    points: buffers.Points
    options: Options
    device: jax.Device | None

    @classmethod
    def build(cls, features, smooth, mask, options: Options, device) -> "_Kernels | None":
        """Kernels over features [N, D], and if `smooth` is (size, widths, radius) over an image's grid."""
        count = len(features[0])
        valid = None if mask is None else (np.asarray(mask) != 0).astype(np.float32)
        points, norm = buffers.Points(1, count), options.normalization
        if smooth is not None:
            (height, width), stds, radius = smooth
            points = buffers.Points(height, width, min(radius[0], width - 1))
        unweighted = np.zeros(0, np.float32)  # `marginals` puts weights in its place
        try:
            lattices = [
                ready_kernels.lattice_kernel(_among_valid(f, valid), unweighted, valid, norm, points) for f in features
            ]
        except host_lattice.TooWide:
            return None
        spatial = None
        if smooth is not None:
            spatial = ready_kernels.spatial_kernel(stds, radius, unweighted, valid, norm, points)
        return cls(lattices, spatial, valid, points, options, device)

    def start(self, unary: np.ndarray, simple: bool) -> "_Start":
        """The log probabilities for unary [N, C]."""
        return _Start(unary, self.valid, self.options.prune is not False and simple)

    def marginals(self, start: "_Start", every: Sequence[Value], compatibility):
        """Marginals float32 [N, C], or [T + 1, N, C]; the weight of the smoothness kernel, if there is one, is last."""
        padded = [jnp.asarray(_weight(w, compatibility, start)) for w in every]
        lattices = [dataclasses.replace(k, weight=w) for k, w in zip(self.lattices, padded)]
        spatial = self.spatial and dataclasses.replace(self.spatial, weight=padded[-1])
        with jax.default_device(self.device):
            log, count = start.padded(self.points), self.points.count

            def after(iterations: int) -> np.ndarray:
                q = ready.run(log, lattices, spatial, np.int32(count), np.int32(iterations))
                return start.all_labels(self.points.within(np.asarray(q)).reshape(-1, start.size))

            if not self.options.return_all:
                return after(int(self.options.iterations))
            first = np.exp(start.log - start.log.max(0))
            first = start.all_labels((first / first.sum(0)).T)
            counts = range(self.options.iterations + 1) if self.options.counts is None else self.options.counts
            # Each as if it were the last: with the mean of all lattices.
            return np.stack([after(n) if n else first for n in counts])


class _Start:
    """The log probabilities to start from, with labels that win nowhere merged into one, the rest.

    Attributes:
      labels: C.
      log: float32 [C', N], labels first: NumPy's reductions over short rows are slow.
      kept: bool [C].
      size: labels in the program's buffers.
      share: float32 [C - C' + 1, N], marginals of the merged labels; only if there are any.
      rest: float32 [N], their sum.
    """

    def __init__(self, unary: np.ndarray, valid: np.ndarray | None, prune: bool):
        self.labels = unary.shape[1]
        self.log = np.empty(unary.shape[::-1], np.float32)
        self.kept = np.ones(self.labels, bool)
        self.size = buffers.lanes(self.labels)
        prune = prune and self.size > buffers.PRUNED
        self.share = np.empty_like(self.log if prune else self.log[:0])

        def prepare(part: slice) -> tuple[np.ndarray, np.ndarray] | None:
            log = self.log[:, part]
            np.negative(unary[part].T, out=log)
            if valid is not None:
                np.copyto(log, 0, where=valid[part] == 0)  # whatever is there, NaN included
            np.maximum(log, np.float32(IMPOSSIBLE), out=log)
            log -= log.max(0)
            np.maximum(log, np.float32(IMPOSSIBLE), out=log)
            if not prune:
                return None
            share = np.exp(log, out=self.share[:, part])
            total = share.sum(0)
            share /= total
            log -= np.log(total)
            return pruning.reached(share, log, None if valid is None else valid[part])

        found = _for_blocks(prepare, len(unary))
        if prune:
            wins, reached = zip(*found, strict=True)
            self.kept = pruning.kept(np.any(wins, 0), np.max(reached, 0))
        pruned = buffers.lanes(int(self.kept.sum()) + 1, buffers.PRUNED)
        if pruned >= self.size:
            self.kept[:] = True
        if not self.kept.all():
            self.size = pruned
            self.share = self.share[~self.kept]
            self.rest = np.maximum(self.share.sum(0), np.float32(1e-37))
            self.log = np.concatenate([self.log[self.kept], np.log(self.rest)[None]])

    def padded(self, points: buffers.Points) -> np.ndarray:
        out = buffers.zeros((points.room, self.size), np.float32)
        places = points.within(out)
        places[..., : len(self.log)] = self.log.T.reshape(*places.shape[:2], -1)
        places[..., len(self.log) :] = IMPOSSIBLE
        return out

    def all_labels(self, q: np.ndarray) -> np.ndarray:
        if self.kept.all():
            return q[:, : self.labels]
        kept, merged = np.flatnonzero(self.kept), np.flatnonzero(~self.kept)
        out = buffers.zeros((len(q), self.labels), np.float32)

        def divide(part: slice) -> None:
            out[part, kept] = q[part, : kept.size]
            out[part, merged] = (self.share[:, part] * (q[part, kept.size] / self.rest[part])).T

        _for_blocks(divide, len(q))
        return out


def _for_blocks(task: Callable[[slice], Any], points: int) -> list[Any]:
    """The results of a task for one block of points after another, in two threads."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(task, [slice(at, at + _BLOCK) for at in range(0, points, _BLOCK)]))


def _weight(weight: Value, compatibility: jax.Array | None, start: _Start) -> np.ndarray:
    """How labels attract each other, float32 [C'] or [C', C'] over the padded labels; the rest receives nothing."""
    size = start.size
    weight = np.asarray(weight, np.float32)
    if compatibility is not None:
        matrix = weight if weight.ndim == 2 else np.diag(np.broadcast_to(weight, (start.labels,)))
        weight = -np.asarray(compatibility, np.float32) @ matrix
    out = np.zeros((size,) * max(weight.ndim, 1), np.float32)
    if weight.ndim == 2:
        out[: start.labels, : start.labels] = weight
    else:
        out[: start.kept.sum()] = weight
    return out


def _among_valid(features: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
    """Moves masked points onto a valid one, as `mean_field` does."""
    features = np.asarray(features, np.float32)
    return features if valid is None else np.where(valid[:, None] > 0, features, features[np.argmax(valid)])
