"""Mean field at inference on lattices: in each iteration only the pixels whose marginals changed are splatted again.

After two or three iterations nine pixels in ten have settled. Each lattice keeps what was splatted so far; a pixel adds
the difference from what it last sent once that exceeds `permutohedral.TOLERANCE` in some label. So no marginal is ever
out of date by more than that, and neither are the filtered marginals where the normalization makes kernels sum to 1.

The iterations use the lattices in turn, one each, and only the last uses the mean of all: on the way to the fixed
point, the next iteration averages over lattices as well as a sum would, at half the cost.

GPUs and TPUs splat everything in each iteration (see `permutohedral.advance`).

Where gradients are taken, and in cases that this module does not cover, `iteration.iterate` recomputes everything.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from deeplab_jax.crf import permutohedral
from deeplab_jax.crf.kernels import Kernel, message, weighted
from deeplab_jax.crf.options import Options


def covers(kernels: Sequence[Kernel], options: Options) -> bool:
    """Whether `iterate` applies: some kernel is on a lattice, and normalization bounds the sums by the values."""
    plain = options.update == "parallel" and options.normalization != "none" and options.storage_dtype is None
    return plain and any(kernel.filter == "permutohedral" for kernel in kernels)


def iterate(
    negative_unary: jax.Array,
    kernels: Sequence[Kernel],
    compatibility: jax.Array | None,
    iterations: int | jax.Array,
    return_all: bool = False,
) -> tuple[jax.Array, jax.Array | None]:
    """The logits [N, C] after `iterations` updates; arguments as in `iteration.iterate`.

    With `return_all` (`iterations` is a number then) also those after 0, 1, ... updates, [T + 1, N, C]: each with the
    mean of all lattices, as if it were the last.
    """
    labels = negative_unary.shape[1]
    structures = [kernel.structure for kernel in kernels if kernel.filter == "permutohedral"]
    count = structures[0].lattices  # of all, which are around the same points

    def logits_of(total: jax.Array) -> jax.Array:
        return negative_unary + (total if compatibility is None else -weighted(compatibility, total))

    def step(n: int | jax.Array, state: tuple[jax.Array, list]) -> tuple[jax.Array, list]:
        """An update by one lattice."""
        logits, sent = state
        q = jax.nn.softmax(logits, axis=-1)
        total, sent = _send(kernels, sent, q, n % count)
        return logits_of(_other_messages(kernels, q) + total), sent

    def full_step(n: int | jax.Array, state: tuple[jax.Array, list]) -> tuple[jax.Array, jax.Array, list]:
        """An update by all lattices, and the update that `step` would make."""
        logits, sent = state
        q = jax.nn.softmax(logits, axis=-1)

        def add(lattice: jax.Array, state: tuple) -> tuple:
            total, alone, sent = state
            out, sent = _send(kernels, sent, q, lattice)
            return total + out, jnp.where(lattice == n % count, out, alone), sent

        zeros, others = jnp.zeros_like(q), _other_messages(kernels, q)
        total, alone, sent = lax.fori_loop(0, count, add, (zeros, zeros, sent))
        return logits_of(others + total / count), logits_of(others + alone), sent

    def with_room(n: int) -> tuple[jax.Array, jax.Array | None]:
        sent = [_start(kernel, labels, n) for kernel in kernels]
        if return_all:

            def recorded(state: tuple[jax.Array, list], n: jax.Array) -> tuple[tuple[jax.Array, list], jax.Array]:
                shown, logits, sent = full_step(n, state)
                return (logits, sent), shown

            _, shown = lax.scan(recorded, (negative_unary, sent), jnp.arange(iterations))
            return shown[-1], jnp.concatenate([negative_unary[None], shown])
        state = lax.fori_loop(0, iterations - 1, step, (negative_unary, sent))
        return lax.cond(iterations > 0, lambda: full_step(0, state)[0], lambda: negative_unary), None

    branch = jnp.max(jnp.stack([structure.which_room() for structure in structures]))
    most = max(len(structure.rooms) for structure in structures)
    return lax.switch(branch, [partial(with_room, n) for n in range(most)])


def _start(kernel: Kernel, labels: int, room: int) -> permutohedral.Splatted | None:
    """The empty state with the room of this index, or the last one, in `Lattice.rooms`."""
    if kernel.filter != "permutohedral":
        return None
    rooms = kernel.structure.rooms
    return permutohedral.start(kernel.structure, labels, rooms[min(room, len(rooms) - 1)])


def _other_messages(kernels: Sequence[Kernel], q: jax.Array) -> jax.Array:
    """The sum of the messages of kernels that are not on lattices, [N, C]."""
    return sum((message(kernel, q) for kernel in kernels if kernel.filter != "permutohedral"), jnp.zeros_like(q))


def _send(kernels: Sequence[Kernel], sent: list, q: jax.Array, lattice: int | jax.Array) -> tuple[jax.Array, list]:
    """The sum of the messages of kernels on lattices, each from one of its lattices; and the new `sent`."""
    total = jnp.zeros_like(q)
    after: list = []
    for kernel, before in zip(kernels, sent, strict=True):
        if before is None:
            after.append(None)
            continue
        now, out = permutohedral.advance(kernel.structure, before, q, kernel.before, lattice)
        out = out if kernel.include_self else out - kernel.before * q
        total, after = total + weighted(kernel.weight, kernel.after * out), [*after, now]
    return total, after
