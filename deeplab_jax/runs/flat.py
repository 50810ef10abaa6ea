"""A run's state as flat name -> array, the form in checkpoints."""

import re

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from deeplab_jax.errors import UserError


def flatten_state(state) -> dict[str, np.ndarray]:
    """A state pytree as flat name -> array; names join the path with dots, as in `trainable.head.fc1.kernel`."""
    return dict(zip(names_of(state), map(np.asarray, jax.tree.leaves(state)), strict=True))


def names_of(tree) -> list[str]:
    """Names of a pytree's leaves in their order, each the path joined with dots.

    >>> names_of({"head": {"kernel": 1.0, "bias": 0.0}})
    ['head.bias', 'head.kernel']
    """
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(tree)]


def unflatten_state(template, flat: dict[str, np.ndarray]):
    """Fills a template state with the arrays of `flatten_state`.

    Raises:
      UserError: names or shapes differ: the checkpoint belongs to another architecture or optimizer.
    """
    leaves, treedef = jax.tree.flatten(template)
    names = names_of(template)
    flat = _renumbered(flat, names)
    lacking = sorted(set(names) - set(flat))
    unknown = sorted(set(flat) - set(names))
    if lacking or unknown:
        what = f"lacks '{lacking[0]}'" if lacking else f"has '{unknown[0]}', which this config does not have"
        kind = "optimizer" if (lacking or unknown)[0].startswith(("opt_state.", "ema.")) else "architecture"
        raise UserError(f"the checkpoint is of another {kind}: it {what}; use another --workdir or its config")
    for name, leaf in zip(names, leaves):
        if flat[name].shape != leaf.shape:
            raise UserError(
                f"the checkpoint is of another architecture: '{name}' is {flat[name].shape} there and {leaf.shape} "
                "by this config; use another --workdir or its config"
            )
    return jax.tree_util.tree_unflatten(treedef, [flat[n].astype(leaf.dtype) for n, leaf in zip(names, leaves)])


def _renumbered(flat: dict[str, np.ndarray], names: list[str]) -> dict[str, np.ndarray]:
    """The arrays of a run that began when clipping had a place of its own, before the others of the optimizer."""
    moved = {re.sub(r"^opt_state\.(\d+)", lambda m: f"opt_state.{int(m[1]) - 1}", k): v for k, v in flat.items()}
    return moved if set(moved) == set(names) else flat


def variables_from(flat: dict[str, np.ndarray]) -> dict:
    """Flax variables (averaged ones if there are any) from a flat state."""
    averaged = "ema." if any(name.startswith("ema.trainable.") for name in flat) else ""
    groups = {f"{averaged}trainable.": "params.", "frozen.": "params.", f"{averaged}batch_stats.": "batch_stats."}
    found = {
        collection + name.removeprefix(prefix): value
        for name, value in flat.items()
        for prefix, collection in groups.items()
        if name.startswith(prefix)
    }
    return unflatten_dict(found, sep=".")
