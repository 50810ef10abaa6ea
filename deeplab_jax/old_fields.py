"""Config fields of earlier versions under their current names.

A run's `config.json`, a user's config file and a script's flags may contain them.
"""

from collections.abc import Mapping
from typing import Any

from deeplab_jax.errors import UserError

# Old dotted name -> new dotted name; a group moves with all its fields.
MOVED = {f"crf.search_{name}": f"search.{name}" for name in ("images", "passes", "objective", "thin", "learn", "grid")}
_SEARCH = tuple(old.removeprefix("crf.") for old in MOVED)
# Three fields that are now one entry of config.data.stages, with their old defaults.
_EARLY = {"early_share": 0.0, "early_crop": (161, 161), "early_scales": (0.25, 0.375, 0.5, 0.625, 0.75)}
# Removed fields, and what to do instead.
_GONE = {
    "model.head_rates_stride": "config.model.head_rates are always those of output stride 8; at 16 they are halved, at "
    "32 quartered",
    "model.width_multiplier": "a VGG-16 with fewer channels is now a backbone of its own; docs/extending.md shows how "
    "to add one",
}


def new_name(dotted: str) -> str:
    """The current name of a field; a name that is not an old one is returned unchanged.

    >>> new_name("crf.search_images"), new_name("crf.search_grid.bilateral_weight"), new_name("seed")
    ('search.images', 'search.grid.bilateral_weight', 'seed')

    Raises:
      UserError: the field was removed, or has become part of another field, whose value has another form.
    """
    group, _, name = dotted.partition(".")
    if group == "data" and name in _EARLY:
        raise UserError(
            f"--config.{dotted}: the first steps' crops and scales are now config.data.stages; give "
            "--config.data.stages='((SHARE, (HEIGHT, WIDTH), (SCALE, SCALE)),)', or '()' for none"
        )
    if dotted in _GONE:
        raise UserError(f"--config.{dotted}: {_GONE[dotted]}")
    for old, new in MOVED.items():
        if dotted == old or dotted.startswith(f"{old}."):
            return new + dotted.removeprefix(old)
    return dotted


def hint(problem: str) -> str:
    """An addition to Python's own sentence about an attribute that a config lacks; "" if it is not an old name."""
    return next(
        (f" (config.{old} is now config.{new})" for old, new in MOVED.items() if old.removeprefix("crf.") in problem),
        "",
    )


def has_old(config: Mapping[str, Any]) -> bool:
    """Whether a config holds a field under an old name."""
    names = {f"{group}.{name}" for group in ("crf", "data", "model") for name in config.get(group, {})}
    return not names.isdisjoint({*MOVED, *_GONE, *(f"data.{name}" for name in _EARLY)})


def renamed(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config, as nested dicts, with its old fields under their new names.

    Raises:
      ValueError: a removed field had a value that nothing represents now.
    """
    config = _copied(config)
    crf, data = config.get("crf", {}), config.get("data", {})
    for old in _SEARCH:
        if old in crf:
            search, value = config.setdefault("search", {}), crf.pop(old)
            name = old.removeprefix("search_")
            search[name] = {**search.get(name, {}), **value} if isinstance(value, Mapping) else value
    early = {name: data.pop(name) for name in _EARLY if name in data}
    if early.get("early_share"):
        share, crop, scales = ({**_EARLY, **early}[name] for name in _EARLY)
        data["stages"] = ((share, tuple(crop), tuple(scales)),)
    _without_gone(config.get("model", {}))
    return config


def _without_gone(model: dict[str, Any]) -> None:
    stride = model.pop("head_rates_stride", 8)
    if stride != 8:
        model["head_rates"] = tuple(rate * stride // 8 for rate in model.get("head_rates", ()))
    width = model.pop("width_multiplier", 1)
    if width != 1:
        raise ValueError(f"config.model.width_multiplier={width}: {_GONE['model.width_multiplier']}")


def _copied(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _copied(v) if isinstance(v, Mapping) else v for k, v in group.items()}
