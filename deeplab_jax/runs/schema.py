"""Checks of a config, and of a workdir's files when they are read: config.json, run.json, best.json, eval/*.json.

Each function for a file accepts any JSON value and returns it in the form that the program uses, or raises a ValueError
that states briefly what is wrong with it. Presets are checked in `crf.params`, rows of the record in `runs.record`.
"""

import functools
import math
from collections.abc import Collection, Iterator, Mapping

from ml_collections import ConfigDict

from deeplab_jax.config import PER_CLASS, fields, load_config, recorded_config
from deeplab_jax.crf.filters import FILTERS
from deeplab_jax.crf.layer import LEARNABLE
from deeplab_jax.crf.params import FIELDS, MAX_ITERATIONS, NORMALIZATIONS, WEIGHTS, WIDTHS
from deeplab_jax.limits import CROP_SCALES, CROP_SIDES
from deeplab_jax.metrics.trimap import SOURCES
from deeplab_jax.models import architecture_of
from deeplab_jax.old_fields import renamed
from deeplab_jax.runs.record import is_count

_NEEDED = ("model", "crf", "data", "eval")  # groups that every version of the program has written
_MOST = 1 << 31
_FACTORS = (0, 1e6)

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
    "data.crop": CROP_SIDES,
    "data.scales": CROP_SCALES,
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
OF_PRESETS = tuple(f"crf.{name}" for name in FIELDS)  # count only where `crf.preset` is empty
_GRID = tuple(f"search.grid.{name}" for name in (*FIELDS, "thin_factor"))

# Those of fields that only training and searches read. Records are not held to them: a run that began before they were
# checked can still be used.
RANGES_OF_TRAINING: dict[str, tuple[float, float]] = {
    "seed": (0, (1 << 63) - 1),
    "crf.learning_rate_multiplier": _FACTORS,
    "search.images": (0, _MOST),
    "search.passes": (1, 64),
    "search.learn": (0, _MOST),
    **{name: WIDTHS if name.endswith(("std", "factor")) else (0, WEIGHTS[1]) for name in _GRID},
    "data.cache_decoded_mb": (0, _MOST),
    "loss.class_weights": _FACTORS,
    "loss.unary_weight": _FACTORS,
    "optimizer.learning_rate": (0, 1e38),  # training stops by itself where updates overflow
    "optimizer.momentum": (0, 0.99999),
    "optimizer.weight_decay": _FACTORS,
    "optimizer.poly_power": (0, 100),
    "optimizer.step_size": (0, _MOST),
    "optimizer.warmup_steps": (0, _MOST),
    "optimizer.classifier_multiplier": _FACTORS,
    "optimizer.bias_multiplier": _FACTORS,
    "optimizer.clip_norm": (0, _MOST),
    "optimizer.ema": (0, 1),
}

# What a field may be, or each entry of a field that holds several. Those of `model` are in `models.architecture`, those
# of `data` in `data.dataset`.
CHOICES: dict[str, tuple[str, ...]] = {
    "crf.bilateral": ("auto", *FILTERS),
    "crf.normalization": NORMALIZATIONS,
    "crf.train": ("off", "end_to_end"),
    "crf.learn": LEARNABLE,
    "search.objective": ("mean_iou", "trimap", "both"),
    "loss.at": ("scores", "pixels"),
    "optimizer.name": ("sgd", "adamw"),
    "optimizer.schedule": ("poly", "step", "constant", "cosine"),
    "eval.trimap_source": SOURCES,
    "eval.submission": ("", "voc", "cityscapes"),
}
_CHOICES_OF_RECORDS = ("crf.normalization",)
_SIDE_MULTIPLE = 8  # of which `eval.size_multiple` is a multiple: the stride of `inference.tiling`


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
    values = dict(fields(found))
    wrong = _out_of_range(values, RANGES, _NOT_EMPTY) or _no_choice(values, _CHOICES_OF_RECORDS)
    if wrong:
        raise ValueError(wrong)
    return found


def _check_types(defaults: dict, given: dict, prefix: str) -> None:
    for name in {*defaults} & {*given}:
        field, default, value = f"{prefix}{name}", defaults[name], given[name]
        if isinstance(default, dict) and isinstance(value, dict):
            _check_types(default, value, f"{field}.")
        elif isinstance(default, dict):
            raise ValueError(f"'{field}' is not a group of fields")
        elif default is not None and not _alike(value, (default,) if _is_list(field, value) else default):
            raise ValueError(f"'{field}' is {str(value)[:60]!r}, and should be like {default!r}")


def _is_list(field: str, value: object) -> bool:
    """Whether the field holds one number for each class."""
    return field.removeprefix("config.") in PER_CLASS and isinstance(value, list | tuple)


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


def problem(settings: ConfigDict) -> str:
    """A sentence about the first field with a value that no command can use, or "".

    Commands ask before any work. What depends on data, devices or files is checked where these are read.
    """
    values = dict(fields(settings))
    return (
        _no_numbers(values)
        or _out_of_range(values, RANGES | RANGES_OF_TRAINING, (*_NOT_EMPTY, *_GRID))
        or _of_another_type(settings)
        or _no_choice(values, CHOICES)
        or _unfit(values, settings.model)
    )


def _of_another_type(settings: ConfigDict) -> str:
    """A sentence about a field that a config file gave another type, or ""."""
    try:
        _check_types(_defaults(), settings.to_dict(), "config.")
    except ValueError as e:
        return str(e)
    return ""


def _no_numbers(values: Mapping[str, object]) -> str:
    """A sentence about an entry of a tuple that is not a number, where the default holds numbers, or not whole."""
    for name, default in fields(ConfigDict(_defaults())):
        numbers = [e for e in default if isinstance(e, int | float)] if isinstance(default, tuple) else []
        if name not in values or not numbers:
            continue
        whole, given = isinstance(numbers[0], int), values[name]
        entries = given if isinstance(given, list | tuple) else (given,)
        if not all(isinstance(e, int if whole else int | float) and not isinstance(e, bool) for e in entries):
            example = ",".join(map(str, numbers[:4]))
            return f"config.{name}={_short(given)}: needs {'whole ' * whole}numbers, such as {example}"
    return ""


def _out_of_range(
    values: Mapping[str, object], ranges: Mapping[str, tuple[float, float]], not_empty: Collection[str]
) -> str:
    """A sentence about a number outside its range, or ""."""
    for name, value in values.items():
        if name in not_empty and not value:
            return f"config.{name}: needs at least one value"
        low, high = ranges.get(name, (-math.inf, math.inf))
        for number in _numbers_in(value):
            if not _finite(number):
                return f"config.{name}={_short(value)}: must be finite"
            if not low <= number <= high:
                return f"config.{name}={_short(value)}: must lie between {low:g} and {high:g}"
    return ""


def _numbers_in(value: object) -> Iterator[int | float]:
    """The numbers of a value, also those inside tuples."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers_in(entry)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


def _no_choice(values: Mapping[str, object], names: Collection[str]) -> str:
    """A sentence about a field of `names` that holds none of its `CHOICES`, or ""."""
    for name in names:
        value = values.get(name, ())
        for entry in value if isinstance(value, list | tuple) else (value,):
            if entry not in CHOICES[name]:
                among = ", ".join(choice or '""' for choice in CHOICES[name])
                return f"config.{name}={_short(entry)}: must be one of {among}"
    return ""


def _unfit(values: Mapping[str, object], model: object) -> str:
    """A sentence about a value that another field, or the network, does not allow, or ""."""
    if values.get("optimizer.schedule") == "step" and values.get("optimizer.step_size") == 0:
        return "config.optimizer.step_size=0: must be at least 1 with config.optimizer.schedule=step"
    multiple = values.get("eval.size_multiple", 0)
    if isinstance(multiple, int) and multiple % _SIDE_MULTIPLE:
        return f"config.eval.size_multiple={multiple}: must be a multiple of {_SIDE_MULTIPLE}"
    crop = values.get("data.crop", (1, 1))
    if not isinstance(crop, list | tuple) or len(crop) != 2:
        return f"config.data.crop={_short(crop)}: must be two sizes in pixels, height and width"
    try:
        architecture_of(model)
    except ValueError as e:
        return str(e)
    return ""


def _short(value: object) -> str:
    return str(value)[:60]


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
