"""A run's state as flat name -> array, which is how checkpoints hold it."""

import jax
import numpy as np

from deeplab_jax.errors import UserError


def flatten_state(state) -> dict[str, np.ndarray]:
    """A state pytree as flat name -> array; names join the path with dots, as in `trainable.head.fc1.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def unflatten_state(template, flat: dict[str, np.ndarray]):
    """Fills a template state with the arrays of `flatten_state`.

    Raises:
      UserError: names or shapes differ: the checkpoint is of another architecture or optimizer.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    names = [_name(path) for path, _ in leaves]
    lacking = sorted(set(names) - set(flat))
    unknown = sorted(set(flat) - set(names))
    if lacking or unknown:
        what = f"lacks '{lacking[0]}'" if lacking else f"has '{unknown[0]}', which this config does not"
        raise UserError(f"the checkpoint is of another architecture: it {what}; use another --workdir or its config")
    for name, (_, leaf) in zip(names, leaves):
        if flat[name].shape != leaf.shape:
            raise UserError(
                f"the checkpoint is of another architecture: '{name}' is {flat[name].shape} there and {leaf.shape} "
                "by this config; use another --workdir or its config"
            )
    return jax.tree_util.tree_unflatten(treedef, [flat[n].astype(leaf.dtype) for n, (_, leaf) in zip(names, leaves)])


def variables_from(flat: dict[str, np.ndarray]) -> dict:
    """Flax variables (averaged ones where there are any) from a flat state."""
    averaged = "ema." if any(name.startswith("ema.trainable.") for name in flat) else ""
    groups = {f"{averaged}trainable.": "params", "frozen.": "params", f"{averaged}batch_stats.": "batch_stats"}
    variables: dict = {}
    for name, value in flat.items():
        for prefix, collection in groups.items():
            if name.startswith(prefix):
                node = variables.setdefault(collection, {})
                *parents, last = name.removeprefix(prefix).split(".")
                for part in parents:
                    node = node.setdefault(part, {})
                node[last] = value
    return variables


def _name(path) -> str:
    return ".".join(_key(entry) for entry in path)


def _key(entry) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)
