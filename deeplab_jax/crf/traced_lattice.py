"""Builds permutohedral lattices in compiled programs: the counterpart of `host_lattice`.

As there, the form "axes" is taken where the first lattice of the form "direct" has few vertices. (The forms are in
`lattice_design`.) One loop builds one lattice after another, so that a program has the code once.
"""

import functools
import operator

import flax.struct
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from deeplab_jax.crf import lattice_design, vertices
from deeplab_jax.crf.vertices import at_once

BLOCK = 4096  # vertices, or points to be numbered, processed at once: these stay in a CPU's cache
LARGE_BLOCK = 1 << 16  # elsewhere, so that there are few steps
USUAL = 1 / 4  # of the most vertices that points can touch: hardly a photograph has more
LEAST = 16384  # room for vertices around few points, which have many neighbors that no point touches


@flax.struct.dataclass
class Lattice:
    """L lattices around N points.

    Attributes:
      vertices: int32 [L, D + 1, N], that each point touches, numbered from 0 in each lattice.
      weights: [L, D + 1, N], barycentric: their sum is 1.
      neighbors: int32 [L, 2 (D + 1), M], of each vertex, next and previous along each axis; where there is none, the
        lattice's count.
      counts: int32 [L], the vertices.
      axes: bool [], whether the form is "axes", not "direct".
    """

    vertices: jax.Array
    weights: jax.Array
    neighbors: jax.Array
    counts: jax.Array
    axes: jax.Array

    @property
    def lattices(self) -> int:
        """L."""
        return self.vertices.shape[0]

    @property
    def rooms(self) -> list[int]:
        """The numbers of vertices for which a program has a branch, more than a lattice has; "axes" has the first."""
        return rooms(self.vertices[0].size)

    def which_room(self) -> jax.Array:
        """The index of the least room that suffices; int32 []."""
        return (self.counts.max() >= self.rooms[0]).astype(jnp.int32)

    @property
    def scale(self) -> jax.Array:
        """The factor of the filter; see `lattice_design.scale`."""
        axes, direct = (lattice_design.scale(form, self.vertices.shape[1] - 1) for form in ("axes", "direct"))
        return jnp.where(self.axes, axes, direct).astype(self.weights.dtype)


def build(features: jax.Array) -> Lattice:
    """Finds the lattices (Adams et al. 2010, section 3) around points.

    Works inside jit; memory is linear in N. Gradients do not reach the features. Under vmap the point sets take their
    turns: together, all of them would cost as much as the most expensive one, in both forms.

    Args:
      features: [N, D], already divided by their standard deviations.

    Returns:
      As many lattices as `lattice_design.lattices` says, of the form that their number of vertices suggests, or of the
      form "direct" where there is no room to blur along the axes.
    """
    return _build(lax.stop_gradient(features))


@sequential_vmap
def _build(features: jax.Array) -> Lattice:
    features = features - features.min(axis=0)
    points, dimensions = features.shape
    order, lattices = dimensions + 1, lattice_design.lattices(points)
    sizes, block = rooms(order * points), block_size(order * points)
    few = lattice_design.few(points)
    embeddings = {
        form: [lattice_design.embedding(form, dimensions, n) for n in range(lattices)] for form in ("direct", "axes")
    }
    matrices, shifts = (
        jnp.asarray([[e[part] for e in embeddings[form]] for form in ("direct", "axes")], features.dtype)
        for part in range(2)
    )

    def one(state: tuple[jax.Array, jax.Array, Lattice]) -> tuple[jax.Array, jax.Array, Lattice]:
        n, undecided, built = state
        form = built.axes.astype(jnp.int32)
        touched, found, weights, table, steps = _one(features, matrices[form, n], shifts[form, n], built.axes)
        # All lattices have the other form: where the first has few vertices, and where one has too many to be blurred.
        few_found = undecided & ~built.axes & (n == 0) & (touched <= few)
        crowded = built.axes & (touched >= sizes[0] - 1)
        again = few_found | crowded
        put = lambda whole, part: lax.dynamic_update_index_in_dim(whole, part, n, 0)  # noqa: E731
        near = vertices.join(table, steps, block, built.neighbors, n, ~again)
        kept = built.weights
        for k, weight in enumerate(weights):  # stacked first, XLA would compute them anew for each: 35 times as long
            kept = lax.dynamic_update_slice(kept, weight[None, None], vertices.indices(n, k, 0))
        counts = put(built.counts, table.count)
        built = Lattice(put(built.vertices, found), kept, near, counts, jnp.where(again, few_found, built.axes))
        return jnp.where(again, 0, n + 1), undecided & ~crowded, built

    shape = lattices, order, points
    start = Lattice(
        jnp.zeros(shape, jnp.int32),
        jnp.zeros(shape, features.dtype),
        jnp.zeros((lattices, 2 * order, sizes[-1]), jnp.int32),
        jnp.zeros(lattices, jnp.int32),
        jnp.bool_(order * points <= few),
    )
    state = jnp.int32(0), jnp.bool_(True), start
    return lax.while_loop(lambda state: state[0] < lattices, one, state)[2]


def _one(
    features: jax.Array, matrix: jax.Array, shift: jax.Array, axes: jax.Array
) -> tuple[jax.Array, jax.Array, list[jax.Array], vertices.Table, vertices.Words]:
    """One lattice: how many vertices points touch, which [D + 1, N], weights, all vertices, steps along its axes."""
    points, order = len(features), features.shape[1] + 1
    sizes, block = rooms(order * points), block_size(order * points)
    base, rank, weights = lax.optimization_barrier(_simplices(features, matrix, shift))
    units, steps = vertices.axis_steps(base)
    size = points if at_once() else min(-(-points // 2), BLOCK)  # two or more steps: XLA dissolves a loop of one

    def at(n: jax.Array) -> jax.Array:
        return jnp.minimum(n * size, points - size)  # some twice, which changes nothing

    def corners(n: jax.Array, state: tuple) -> tuple[vertices.Words, jax.Array]:
        cells, ranks = ([lax.dynamic_slice_in_dim(x, at(n), size) for x in xs] for xs in (base, rank))
        return vertices.corners(cells, ranks, units, steps), jnp.ones(order * size, bool)

    def number(n: jax.Array, keys: tuple[vertices.Words, jax.Array], state: tuple) -> tuple[vertices.Table, jax.Array]:
        table, numbers = vertices.number(state[0], *keys)
        return table, lax.dynamic_update_slice_in_dim(state[1], numbers.reshape(-1, size), at(n), 1)

    state = vertices.empty(sizes[-1]), jnp.zeros((order, points), jnp.int32)
    table, found = vertices.with_keys(corners, number, -(-points // size), state)
    touched = table.count
    table = lax.cond(axes, lambda t: vertices.widened(t, steps, block // 4, sizes[0]), lambda t: t, table)
    return touched, found, weights, table, steps


def rooms(most: int) -> list[int]:
    """Numbers of vertices, whole blocks, for which a program has a branch, if points touch at most `most`."""
    block = block_size(most)
    return sorted({(n // block + 1) * block for n in (_usual(most), max(most, _usual(most)))})


def block_size(most: int) -> int:
    """Vertices processed at once, if points touch at most `most`."""
    if not at_once():
        return BLOCK
    return LARGE_BLOCK if _usual(most) >= LARGE_BLOCK else LEAST


def _usual(most: int) -> int:
    return max(int(most * USUAL), LEAST - 1)


def _simplices(features: jax.Array, matrix: jax.Array, shift: jax.Array) -> tuple[list[jax.Array], ...]:
    """The simplices around each point (Adams et al., section 3.1), as lists of D + 1 arrays [N].

    Args:
      features: [N, D].
      matrix: [D, D + 1]; see `lattice_design.embedding`.
      shift: [D + 1].

    Returns:
      base: int32, the remainder-0 vertex divided by D + 1.
      rank: int32, 0 for the coordinate that is furthest above the base.
      weights: of the vertex with remainder k = 0, ..., D.
    """
    dimensions = features.shape[1]
    order = dimensions + 1
    elevated = [sum(features[:, j] * matrix[j, i] for j in range(dimensions)) + shift[i] for i in range(order)]
    # Each barrier keeps XLA from recomputing the operations before it for everything after it.
    elevated = lax.optimization_barrier(elevated)
    nearest = [jnp.round(e / order) for e in elevated]
    above = lax.optimization_barrier([e - n * order for e, n in zip(elevated, nearest, strict=True)])
    total = functools.reduce(operator.add, (n.astype(jnp.int32) for n in nearest))
    rank = [total] * order
    for i in range(order):
        for j in range(i):
            j_first = above[j] >= above[i]
            rank[i] += j_first
            rank[j] += ~j_first
    step = [(r < 0).astype(jnp.int32) - (r > dimensions).astype(jnp.int32) for r in rank]
    base = [n.astype(jnp.int32) + s for n, s in zip(nearest, step, strict=True)]
    rank = [r + s * order for r, s in zip(rank, step, strict=True)]
    above = [(a / order - s.astype(a.dtype)) for a, s in zip(above, step, strict=True)]
    base, rank, above = lax.optimization_barrier((base, rank, above))
    by_rank = [sum(jnp.where(rank[i] == r, above[i], 0) for i in range(order)) for r in range(order)]
    by_rank = lax.optimization_barrier(by_rank)
    weights = [1 + by_rank[-1] - by_rank[0]] + [by_rank[-1 - k] - by_rank[order - k] for k in range(1, order)]
    return base, rank, weights
