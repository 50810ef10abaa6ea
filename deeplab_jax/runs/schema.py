"""Checks of a workdir's files when they are read: config.json, run.json, best.json, eval/*.json.

Each function accepts any JSON value and returns it in the form that the program uses, or raises a ValueError that
states briefly what is wrong with it. Presets are checked in `crf.params`, rows of the record in
`runs.record`.
"""

import functools
import math

from ml_collections import ConfigDict

from deeplab_jax.config import load_config, recorded_config
from deeplab_jax.crf.params import FIELDS, MAX_ITERATIONS, NORMALIZATIONS, WEIGHTS, WIDTHS
from deeplab_jax.old_fields import renamed
from deeplab_jax.runs.record import is_count

_NEEDED = ("model", "crf", "data", "eval")  # groups that every version of the program has written
_MOST = 1 << 31

# Lowest and highest value of the config's numbers, also of each in a tuple; a number without an entry must be finite.
RANGES: dict[str, tuple[float, float]] = {
    "batch_size": (1, 1 << 16),
    "num_steps": (0, _MOST),
    "model.output_stride": (1, 64),
    "model.head_rates": (1, 512),
    "model.head_width": (0, 1 << 16),
    "model.head_kernel": (1, 15),
    "model.scales": (0.05, 16),
    "model.dropout": (0, 0.99),
    "model.widths": (1, 1 << 16),
    "model.blocks": (0, 512),
    "model.fine_branch": (0, 1 << 16),
    "crf.iterations": (0, MAX_ITERATIONS),
    "crf.train_iterations": (0, MAX_ITERATIONS),
    "crf.stride": (1, 1024),
    "data.crop": (1, 1 << 14),
    "data.scales": (0.01, 16),
    **dict.fromkeys(("data.brightness", "data.contrast", "data.saturation"), (0, 1)),
    "data.gamma": (0, 8),
    "data.color_cast": (0, 1),
    "data.blur": (0, 100),
    "data.val_fraction": (0, 1),
    "data.workers": (1, 1024),
    "data.holdout": (0, _MOST),
    "optimizer.accumulate": (1, 1 << 16),
    "eval.crf_iterations": (0, MAX_ITERATIONS),
    "eval.every": (0, _MOST),
    "eval.limit": (0, _MOST),
    "eval.scales": (0.05, 16),
    "eval.tile": (0, 1 << 15),
    "eval.batch_size": (1, 1 << 12),
    "eval.size_multiple": (1, 1 << 11),
    "eval.trimap_widths": (1, 1 << 12),
    "eval.overlays": (0, 10_000),
    "checkpoint.every": (0, _MOST),
    "checkpoint.keep": (0, _MOST),
    "log.every": (1, _MOST),
    "log.images_every": (0, _MOST),
} | {f"crf.{name}": WIDTHS if name.endswith("std") else WEIGHTS for name in FIELDS}

_NOT_EMPTY = ("data.crop", "eval.scales", "eval.crf_iterations")


@functools.cache
def _defaults() -> dict:
    return {name: value for name, value in load_config("base").to_dict().items() if name != "name"}


def config(value: object) -> ConfigDict:
    """The config of a config.json, with today's fields; see `deeplab_jax.config.recorded_config`.

    Raises:
      ValueError: it is not a config, a field has another type, or a number lies outside its range.
    """
    if not isinstance(value, dict):
        raise ValueError("holds no config")
    for group in _NEEDED:
        if not isinstance(value.get(group), dict):
            raise ValueError(f"lacks the group '{group}'")
    try:
        _check_types(_defaults(), renamed(value), "")
        found = recorded_config(value)
    except (KeyError, TypeError, AttributeError) as e:  # a name that ConfigDict reserves
        raise ValueError(f"has a field that no config can have ({str(e)[:100]})") from e
    if "name" not in value:
        del found["name"]
    problem = out_of_range(found)
    if problem:
        raise ValueError(problem)
    return found


def _check_types(defaults: dict, given: dict, prefix: str) -> None:
    for name in {*defaults} & {*given}:
        field, default, value = f"{prefix}{name}", defaults[name], given[name]
        if isinstance(default, dict) and isinstance(value, dict):
            _check_types(default, value, f"{field}.")
        elif isinstance(default, dict):
            raise ValueError(f"'{field}' is not a group of fields")
        elif default is not None and not _alike(value, default):
            raise ValueError(f"'{field}' is {str(value)[:60]!r}, and should be like {default!r}")


def _alike(given: object, default: object) -> bool:
    if isinstance(default, bool) or isinstance(given, bool):
        return isinstance(given, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(given, int | float) and _finite(given)
    if isinstance(default, tuple) and isinstance(given, list | tuple):
        if not default:
            return True
        return all(_alike(g, default[0]) or (isinstance(g, int | float) and _finite(g)) for g in given)
    return isinstance(given, type(default))


def _finite(value: float) -> bool:
    return math.isfinite(value) if isinstance(value, float) else abs(value) < 1 << 63


def out_of_range(settings: ConfigDict) -> str:
    """A sentence about a number of a config outside its range, or ""."""
    for group, values in settings.items():
        fields = {f"{group}.{k}": v for k, v in values.items()} if isinstance(values, ConfigDict) else {group: values}
        for name, value in fields.items():
            if name in _NOT_EMPTY and not value:
                return f"config.{name}: needs at least one value"
            low, high = RANGES.get(name, (-math.inf, math.inf))
            for number in value if isinstance(value, list | tuple) else (value,):
                if isinstance(number, bool) or not isinstance(number, int | float):
                    continue
                if not _finite(number):
                    return f"config.{name}={str(value)[:60]}: must be finite"
                if not low <= number <= high:
                    return f"config.{name}={str(value)[:60]}: must lie between {low:g} and {high:g}"
    if settings.crf.normalization not in NORMALIZATIONS:
        return f"config.crf.normalization={settings.crf.normalization}: must be one of {', '.join(NORMALIZATIONS)}"
    return ""


def best_mark(value: object) -> dict:
    """{"step", "mean_iou"} of a best.json."""
    if not isinstance(value, dict) or not is_count(value.get("step")) or not _share(value.get("mean_iou")):
        raise ValueError("is damaged: it holds no step with its mean IoU")
    return {"step": value["step"], "mean_iou": float(value["mean_iou"])}


def run_entries(value: object) -> list[dict]:
    """The starts that a run.json lists."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise ValueError("is damaged: it holds no list of starts")
    return value


def history(value: object) -> list[dict]:
    """The earlier configs that a config_history.json lists, each with the step up to which it applied."""
    if not isinstance(value, list) or not all(
        isinstance(e, dict) and is_count(e.get("until_step")) and isinstance(e.get("config"), dict) for e in value
    ):
        raise ValueError("is damaged: it holds no list of configs with steps")
    return value


def meta(value: object) -> dict:
    """The values beside a checkpoint's arrays: class names, and a palette with a color for each."""
    value = value if isinstance(value, dict) else {}
    names = value.get("class_names")
    if not isinstance(names, list) or not 2 <= len(names) <= 256 or not all(isinstance(n, str) for n in names):
        raise ValueError("has no list of class names beside it")
    palette = value.get("palette")
    colors = palette if isinstance(palette, list) else []
    if len(colors) < len(names) or not all(
        isinstance(c, list) and len(c) == 3 and all(is_count(v) and v < 256 for v in c) for c in colors
    ):
        raise ValueError(f"has no palette of at least {len(names)} colors beside it")
    return value | {"num_classes": len(names)}


def results(value: object) -> list[dict]:
    """The results of an evaluation, one for each number of iterations, ascending."""
    if not isinstance(value, list) or not value or not all(isinstance(r, dict) for r in value):
        raise ValueError("is not a result of an evaluation")
    names = value[0].get("per_class_iou")
    for result in value:
        shares = [result.get(key) for key in ("mean_iou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou")]
        classes, trimap = result.get("per_class_iou"), result.get("trimap", {})
        if not (is_count(result.get("crf_iterations")) and is_count(result.get("images"))):
            raise ValueError("is not a result of an evaluation")
        if not isinstance(classes, dict) or not isinstance(trimap, dict) or list(classes) != list(names):
            raise ValueError("is not a result of an evaluation, or its results differ in their classes")
        for width, band in trimap.items():
            if not width.isdecimal() or len(width) > 6 or not isinstance(band, dict):
                raise ValueError(f"has no results for a trimap of {width[:20]!r} pixels")
            shares += [band.get("mean_iou"), band.get("pixel_accuracy")]
        if not all(s is None or _share(s) for s in [*shares, *classes.values()]):
            raise ValueError("has a number outside 0 to 1")
    return sorted(value, key=lambda r: r["crf_iterations"])


def pictures(value: object) -> dict:
    """The images and pictures in an evaluation's *_images.json; empty entries are left out."""
    if not isinstance(value, dict):
        raise ValueError("is damaged: it holds no list of pictures")
    images, counts, entries = (_list(value, name) for name in ("images", "crf_iterations", "pictures"))
    return {
        "images": [_image(entry) for entry in images],
        "crf_iterations": [n for n in counts if is_count(n)],
        "pictures": [e for e in entries if _is_picture(e)],
    }


def _list(value: dict, name: str) -> list:
    found = value.get(name)
    return found if isinstance(found, list) else []


def _image(entry: object) -> dict:
    entry = entry if isinstance(entry, dict) else {}
    scores = _list(entry, "mean_iou")
    return {"name": str(entry.get("name", ""))[:500], "mean_iou": [s if _share(s) else None for s in scores]}


def _is_picture(entry: object) -> bool:
    if not isinstance(entry, dict) or not is_count(entry.get("index")) or not isinstance(entry.get("labels"), dict):
        return False
    labels = entry["labels"]
    texts = [entry.get("kind"), entry.get("photo"), entry.get("truth"), *labels.values()]
    counts = all(n.isdecimal() and len(n) <= 6 for n in labels)
    return bool(labels) and counts and all(isinstance(text, str) for text in texts)


def _share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
