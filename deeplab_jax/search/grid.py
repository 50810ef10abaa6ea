"""Coarse-to-fine search of the CRF's parameters on held-out images (v1 section 5.1).

Every combination of a coarse grid is scored on a few images, the best quarter on more, and so on to all of them; then
the same around the best with half the steps. Measurements are kept in a ledger, so that a search continues where it was
stopped. Images are visited one by one: each image's lattice is built once and shared by settings of equal widths.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.console import Meter
from deeplab_jax.crf.params import WEIGHTS, WIDTHS, CRFParams
from deeplab_jax.errors import UserError
from deeplab_jax.runs.devices import in_order
from deeplab_jax.runs.job import Job
from deeplab_jax.runs.schema import CHOICES
from deeplab_jax.search.ledger import Counts, Ledger


class Candidate(NamedTuple):
    """One point of the search; the fields are those of `CRFParams`, the normalization, and the treatment of thin
    classes.

    A weight is a number, or one number per class. If `thin` has a flag per class, the bilateral weight of flagged
    classes is `thin_factor` times that of the others.
    """

    bilateral_weight: float | tuple[float, ...]
    bilateral_xy_std: float
    bilateral_rgb_std: float
    gaussian_weight: float | tuple[float, ...]
    gaussian_xy_std: float
    normalization: str
    thin_factor: float = 1.0
    thin: tuple[bool, ...] = ()

    @property
    def params(self) -> CRFParams:
        """Its parameters; with thin classes, one bilateral weight per class, float32 [C]."""
        if not any(self.thin):
            return CRFParams(*self[:5])
        weights = np.asarray(self.bilateral_weight, np.float32) * np.where(
            self.thin, np.float32(self.thin_factor), np.float32(1)
        )
        return CRFParams(weights, *self[1:5])

    @property
    def widths(self) -> tuple:
        """The widths, on which a lattice depends."""
        return self.bilateral_xy_std, self.bilateral_rgb_std, self.gaussian_xy_std

    @property
    def key(self) -> str:
        return json.dumps(self)


def thin_flags(names: Sequence[str], class_names: Sequence[str]) -> tuple[bool, ...]:
    """One flag per class: whether it is among `names`.

    Raises:
      UserError: a name is not a class.
    """
    names = [str(name) for name in names]  # a flag's 1 is the class "1"
    if unknown := [name for name in names if name not in class_names]:
        raise UserError(f"thin class '{unknown[0]}': no such class; there are {', '.join(class_names)}")
    return tuple(name in names for name in class_names)


OBJECTIVES = CHOICES["search.objective"]  # both: their mean

Axes = Mapping[str, tuple]

# The papers' first grids; w2 and sigma_gamma are fixed at 3 there.
GRIDS: Mapping[str, Axes] = {
    "v1": {
        "bilateral_weight": (5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
        "bilateral_xy_std": (50.0, 60.0, 70.0, 80.0, 90.0, 100.0),
        "bilateral_rgb_std": (3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0),
        "gaussian_weight": (3.0,),
        "gaussian_xy_std": (3.0,),
    },
    "v2": {
        "bilateral_weight": (3.0, 4.0, 5.0, 6.0),
        "bilateral_xy_std": (30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 100.0),
        "bilateral_rgb_std": (3.0, 4.0, 5.0, 6.0),
        "gaussian_weight": (3.0,),
        "gaussian_xy_std": (3.0,),
    },
}


def axis(name: str, values: Iterable[str | float], given: str) -> tuple[float, ...]:
    """The values of the axis `name`, ascending, from numbers or their texts; `given` names their flag or field.

    Raises:
      UserError: one is not a number, a width or factor is not positive, or there are none.
    """
    positive = name.endswith(("std", "factor"))
    values = list(values)
    shown = f"{given}={','.join(map(str, values))}"
    try:
        found = sorted({float(value) for value in values})
    except ValueError as e:
        raise UserError(f"{shown}: needs numbers separated by commas") from e
    if not found or not all(map(math.isfinite, found)) or (positive and found[0] <= 0) or found[0] < 0:
        raise UserError(f"{shown}: needs finite numbers, {'above' if positive else 'from'} 0")
    low, high = limits(name)
    if found[0] < low or found[-1] > high:
        raise UserError(f"{shown}: must lie between {low:g} and {high:g}")
    return tuple(found)


def limits(name: str) -> tuple[float, float]:
    """The smallest and largest value of the axis `name`: what presets may hold."""
    return WIDTHS if name.endswith(("std", "factor")) else (0.0, WEIGHTS[1])


def configured_axes(search: ConfigDict) -> Axes:
    """The grid of a config's group `search`.

    Raises:
      UserError: it has a value that cannot be searched.
    """
    return {name: axis(name, values, f"config.search.grid.{name}") for name, values in search.grid.items()}


def settings_of(axes: Axes) -> list[Candidate]:
    """All combinations of the values of each field of `Candidate`; fields with a default need no axis."""
    return [Candidate(*values) for values in itertools.product(*(_values(axes, name) for name in Candidate._fields))]


def _values(axes: Axes, name: str) -> tuple:
    return axes[name] if name in axes else (Candidate._field_defaults[name],)


def around(best: Candidate, axes: Axes) -> dict[str, tuple]:
    """The next, finer grid: for each searched number, the best value and half a step on either side.

    >>> fine = around(Candidate(4.0, 50.0, 3.0, 3.0, 3.0, "after"), GRIDS["v2"] | {"normalization": ("after",)})
    >>> fine["bilateral_weight"], fine["bilateral_xy_std"], fine["gaussian_weight"]
    ((3.5, 4.0, 4.5), (45.0, 50.0, 55.0), (3.0,))
    """
    fine = {}
    for name, value in zip(Candidate._fields, best):
        values = sorted(set(_values(axes, name)))
        if name == "normalization" or len(values) == 1:
            fine[name] = (value,)
            continue
        steps = [b - a for a, b in itertools.pairwise(values)]
        at = values.index(value)
        step = min(steps[max(at - 1, 0) : at + 1]) / 2
        least, most = limits(name)
        below = (value - step,) if value - step >= least else ()
        above = (value + step,) if value + step <= most else ()
        fine[name] = (*below, value, *above)
    return fine


class Round(NamedTuple):
    """A round of the search: this many candidates on this many images."""

    candidates: int
    images: int


def rounds(settings: int, images: int, exhaustive: bool = False) -> list[Round]:
    """The rounds that thin out a grid: all on a tenth of the images, the best quarter on a third, a sixteenth on all.

    Each round has at least 4 images and 8 candidates, if there are that many.

    >>> rounds(128, 100)
    [Round(candidates=128, images=10), Round(candidates=32, images=34), Round(candidates=8, images=100)]
    """
    if exhaustive or settings <= 2:
        return [Round(settings, images)]
    plan: list[Round] = []
    for quarter, share in ((1, 0.1), (4, 1 / 3), (16, 1.0)):
        step = Round(
            min(settings, max(math.ceil(settings / quarter), 8)), min(images, max(math.ceil(images * share), 4))
        )
        if plan and plan[-1].images == step.images:
            continue
        plan.append(step)
    return plan


def mean_iou(counts: Iterable[Counts]) -> float:
    """Mean IoU over the classes that occur, from the summed counts of many images."""
    hit, truth, predicted = (functools.reduce(np.add, column) for column in zip(*counts))
    union = truth + predicted - hit
    occurs = union > 0
    return float((hit[occurs] / union[occurs]).mean()) if occurs.any() else float("nan")


class Scorer(Protocol):
    """The measurement for the search: an image's counts with each of several settings (None = without CRF)."""

    objective: str

    def __len__(self) -> int: ...

    def count(self, image: int, settings: Sequence[Candidate | None]) -> Iterable[tuple[Candidate | None, dict]]: ...


class Row(NamedTuple):
    """A line of the table: a setting (None = network alone), its mean IoUs and the number of images."""

    setting: Candidate | None
    images: int
    scores: dict[str, float]


class Result(NamedTuple):
    """The result of a search.

    Attributes:
      best: the setting with the highest objective on all images.
      rows: one per setting tried, each on the largest number of images it was measured on, best first.
      grids: for each pass (coarse, fine, ...), its axes and every setting's objective on the images of its first round.
    """

    best: Candidate
    rows: list[Row]
    grids: list[tuple[Axes, dict[Candidate, float]]]


def search(
    scorer: Scorer,
    ledger: Ledger,
    axes: Axes,
    *,
    references: Sequence[Candidate] = (),
    passes: int = 2,
    exhaustive: bool = False,
    improve: Callable[[Candidate], Candidate] | None = None,
    say: Callable[[str], None] = print,
    job: Job | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Result:
    """Searches coarse to fine.

    Args:
      scorer: measures one image under several settings.
      ledger: stores results, which are not measured again.
      axes: the coarse grid.
      references: settings that are measured on all images for comparison, and may win.
      passes: 1 = the coarse grid only; each further pass halves the steps around the best.
      exhaustive: every setting on every image.
      improve: derives from the grid's best a setting off the grid, which wins if it is better on all images.
      say: called with a line of progress.
      job: the processes that share the images; each chooses from the results of all.
      devices: each measures one image at a time; default the first local one.
    """
    measure = partial(_measure, scorer, ledger, say=say, job=job or Job(), devices=devices or jax.local_devices()[:1])
    order = _spread(len(scorer))
    everything = [
        Round(1 + len(references), len(scorer)),
        *rounds(math.prod(map(len, axes.values())), len(scorer), exhaustive),
    ]
    searched = sum(len(set(_values(axes, name))) > 1 for name in Candidate._fields if name != "normalization")
    everything += (passes - 1) * rounds(3**searched, len(scorer), exhaustive)
    everything += [Round(1, len(scorer))] if improve else []
    meter = Meter(_runs(everything))
    measure([None, *references], order, meter, "references")
    tried: dict[Candidate | None, int] = {s: len(scorer) for s in (None, *references)}
    grids: list[tuple[Axes, dict[Candidate, float]]] = []
    best: Candidate | None = None
    for number in range(passes):
        axes = around(best, axes) if best else axes
        candidates = settings_of(axes)
        for step in rounds(len(candidates), len(scorer), exhaustive):
            candidates, images = candidates[: step.candidates], order[: step.images]
            name = ("coarse", "fine")[number] if number < 2 else f"pass {number + 1}"
            what = f"{name}: {len(candidates)} settings on {len(images)} images"
            measure(candidates, images, meter, what)
            scores = {s: objective_of(score(ledger, s, images), scorer.objective) for s in candidates}
            if len(grids) == number:
                grids.append((axes, scores))
            for s in candidates:
                tried[s] = max(tried.get(s, 0), len(images))
            candidates.sort(key=lambda s: (-scores[s], s))
        best = candidates[0]
    if improve and best is not None:
        improved = improve(best)
        measure([improved], order, meter, "improved")
        tried[improved] = len(scorer)
    rows = [Row(s, n, score(ledger, s, order[:n])) for s, n in tried.items()]
    rows.sort(key=lambda row: (-row.images, -objective_of(row.scores, scorer.objective)))
    return Result(next(row.setting for row in rows if row.setting is not None), rows, grids)


def score(ledger: Ledger, setting: Candidate | None, images: Sequence[int]) -> dict[str, float]:
    """The objectives of a setting over images: for each kind of counts, one sum over all, not a mean of means."""
    found = [counts for i in images if (counts := ledger.get(setting, i)) is not None]
    assert len(found) == len(images), "requested results were measured"
    scores = {kind: mean_iou([counts[kind] for counts in found]) for kind in found[0]}
    defined = [value for value in scores.values() if not math.isnan(value)]
    return scores | {"both": sum(defined) / len(defined) if defined else math.nan}


def objective_of(scores: Mapping[str, float], objective: str) -> float:
    """The objective, or the mean IoU where there is none: images of one class each have no boundary."""
    return scores[objective] if not math.isnan(scores[objective]) else scores["mean_iou"]


def _measure(
    scorer: Scorer,
    ledger: Ledger,
    settings: Sequence,
    images: Sequence[int],
    meter: Meter,
    what: str,
    *,
    say: Callable[[str], None],
    job: Job,
    devices: Sequence[jax.Device],
) -> None:
    """Measures missing results for this process's images, then waits for those of the others."""
    meter.known(sum(ledger.recalled(s, image) for image in images for s in settings))
    lacking = {image: [s for s in settings if ledger.get(s, image) is None] for image in images}
    todo = [(image, some) for image, some in lacking.items() if some and job.owns(image)]

    def count(image_and_settings: tuple[int, list]) -> Iterable[tuple[Candidate | None, dict]]:
        results = scorer.count(*image_and_settings)
        return results if len(devices) == 1 else list(results)  # with one device each is stored as it is computed

    for (image, _), results in in_order(count, todo, devices):
        for setting, counts in results:
            ledger.add(setting, image, counts)
            if meter.tick():
                say(f"{what}; {meter.done} of about {meter.total} runs, {meter.left}")
    if job.count == 1:
        return

    def all_measured() -> bool:
        ledger.refresh()
        return all(ledger.get(s, image) is not None for image, some in lacking.items() for s in some)

    job.wait_until(all_measured)
    meter.known(sum(len(some) for image, some in lacking.items() if not job.owns(image)))


def _spread(count: int) -> list[int]:
    """A fixed order in which every prefix is spread over the whole list (golden-ratio steps)."""
    return sorted(range(count), key=lambda i: i * 0.6180339887498949 % 1)


def _runs(plan: Sequence[Round]) -> int:
    """Runs of the CRF that a plan needs; a candidate's images of one round are not measured again in the next."""
    return sum(
        step.candidates * (step.images - (before.images if before and before.images < step.images else 0))
        for before, step in zip([None, *plan], plan)
    )
