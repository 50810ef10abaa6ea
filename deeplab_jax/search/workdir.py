"""Searching a run's CRF parameters: its network, held-out images of its data, results in its workdir."""

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from deeplab_jax import data
from deeplab_jax.crf.filters import check_name
from deeplab_jax.crf.params import FIELDS, WEIGHT_FIELDS
from deeplab_jax.crf.setting import Setting, setting_from_config, write_preset
from deeplab_jax.data.reading import name_of, read
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically, write_text
from deeplab_jax.imaging.palettes import VOID
from deeplab_jax.inference.from_config import create_segmenter
from deeplab_jax.runs.checkpoints import load_workdir
from deeplab_jax.runs.job import Job, digest
from deeplab_jax.search import groups, report, scores
from deeplab_jax.search.grid import Axes, Candidate, Ledger, configured_axes, search, thin_flags
from deeplab_jax.search.learning import learn_weights, with_weights


def search_workdir(
    config,
    workdir: str | Path,
    grid: Axes,
    *,
    images: int = 100,
    split: str = "",
    objective: str = "mean_iou",
    trimap_width: int = 5,
    passes: int = 2,
    exhaustive: bool = False,
    thin: Sequence[str] = (),
    learn: int = 0,
    iterations: int = 10,
    bilateral: str = "auto",
    say=print,
    job: Job | None = None,
) -> tuple[Setting, str]:
    """Searches for the run in `workdir` on images of `config`'s data, and writes the results there.

    Args:
      config: locates the data, and defines how photographs are scaled and padded; the network is the workdir's.
      workdir: of the training run.
      grid: the coarse values of each parameter; `thin_factor` counts only if `thin` names classes.
      images: the number of images, spread over the split.
      split: the images; "" = the held-out ones, else those of evaluation.
      objective: what is maximized, one of `grid.OBJECTIVES`.
      trimap_width: pixels around the true boundaries that count as trimap.
      passes: 1 = the coarse grid only; each further pass halves the steps around the best.
      exhaustive: every setting on every image.
      thin: names of thin classes, whose bilateral weight is searched as a multiple of the others': smoothing that helps
        large regions wipes out poles and signs.
      learn: passes over the images in which one weight per kernel and class is then learned; kept if it is better.
      iterations: of the mean field.
      bilateral: its filter.
      say: called with a line of progress.
      job: the processes that share the images, in a `meeting`; the first one writes the results. Each uses all of its
        local devices.

    Returns:
      (the best as a preset, the table's best lines and, if the images belong to several groups, the CRF's gain on a
      group that the search did not see).

    Raises:
      UserError: the data or the workdir cannot be read, the images have no labels, no class has a name in `thin`, or
        `config.crf` names no known parameters or filter.
    """
    workdir, job = Path(workdir), job or Job()
    try:
        configured = setting_from_config(config.crf)
        check_name(bilateral)
    except ValueError as e:
        raise UserError(f"config.crf: {e}") from e
    split = split or ("holdout" if data.has_holdout(config.data) else config.eval.split)
    run_config, variables, meta = load_workdir(workdir)
    dataset = data.open_dataset(config.data, split, config.seed)
    if dataset.num_classes != meta["num_classes"]:
        raise UserError(f"{workdir}: its network has {meta['num_classes']} classes, the data of --config has "
                        f"{dataset.num_classes}; give the config of that run")  # fmt: skip
    flags = thin_flags(thin, meta["class_names"])
    grid = {**grid, "thin": (flags,)} if thin else {**grid, "thin_factor": (1.0,)}
    count = min(images, len(dataset))
    indices = [round(i) for i in np.linspace(0, len(dataset) - 1, count)]
    examples = (read(dataset, i) for i in indices)
    if not any(e is not None and e.label is not None and (e.label != VOID).any() for e in examples):
        raise UserError(
            f"split '{split}': the images of the search have no labels, or only void ones, to compare with; choose "
            "another with --split"
        )
    if split == config.eval.split and not data.has_holdout(config.data):
        say(flattering(split))
    say(f"searching on {count} of {len(dataset)} images of split '{split}'")
    with run_config.unlocked():
        run_config.eval.update({"scales": config.eval.scales, "mirror": config.eval.mirror, "tile": config.eval.tile})

    def segmenter():
        palette = np.asarray(meta["palette"], np.uint8)
        return create_segmenter(run_config, variables, meta["class_names"], palette, devices=jax.local_devices())

    about = {"step": meta["step"], "data": dataset.fingerprint, "split": split, "scales": list(config.eval.scales),
             "mirror": config.eval.mirror, "tile": config.eval.tile, "seed": config.seed,
             "names": digest([name_of(dataset, i) for i in indices])}  # fmt: skip
    folder = workdir / "crf_search"
    store = scores.ScoreStore(folder / "scores", dataset, indices, about, job)
    store.complete(segmenter, say)
    scorer = scores.CRFScorer(store, objective, iterations, bilateral, trimap_width, config.eval.size_multiple)
    about |= {"images": indices, "iterations": iterations, "bilateral": bilateral, "trimap_width": trimap_width}
    ledger = Ledger(folder / "results.jsonl", about, job.index)
    values = [np.asarray(getattr(configured.params, name), np.float64) for name in FIELDS]
    now = None
    if not any(v.ndim for v in values):
        w1, xy, rgb, w2, smooth = map(float, values)
        now = Candidate(w1, xy, rgb, w2, smooth, configured.normalization)
    references = [now] if now else []  # weights per class and widths per axis are not compared
    learning = partial(
        learn_weights, store, passes=learn, bilateral=bilateral, size_multiple=config.eval.size_multiple, say=say
    )
    improve = _remembered(learning, folder / "learned.json", about | {"learn": learn}, job)
    try:
        result = search(
            scorer,
            ledger,
            grid,
            references=references,
            passes=passes,
            exhaustive=exhaustive,
            improve=improve if learn else None,
            say=say,
            job=job,
            devices=jax.local_devices(),
        )
    finally:
        ledger.close()
    notes = {now: "the config's", result.best: "best" if result.best != now else "best, the config's"}
    notes[None] = "network alone"
    value = next(row.scores[objective] for row in result.rows if row.setting == result.best)
    learned = "weights learned per class, " if isinstance(result.best.bilateral_weight, tuple) else ""
    if any(result.best.thin):
        learned = f"{', '.join(thin)} x {result.best.thin_factor:g}, "
    source = f"crf_search: {learned}{objective} {100 * value:.2f} % on {count} images of '{split}', step {meta['step']}"
    preset = Setting(result.best.params, iterations, result.best.normalization, source)
    everywhere = [row.setting for row in result.rows if row.setting is not None and row.images == len(store)]
    everywhere = [s for s in everywhere if not isinstance(s.bilateral_weight, tuple)]  # learned on images of all groups
    names = [dataset.group_of(dataset[i].name) for i in store.indices]
    unseen = groups.sentence(groups.gains_on_unseen(ledger, everywhere, names, objective), objective)
    if job.is_first:
        ledger.gather()
        report.write(folder, result, objective, notes)
        if unseen:
            write_text(folder / "groups.txt", unseen + "\n")
        write_atomically(workdir / "crf_preset.json", lambda path: write_preset(path, preset))
    table = report.table(result.rows, notes, limit=10)
    return preset, f"{table}\n\n{unseen}" if unseen else table


def flattering(split: str) -> str:
    """The warning that the search chooses by the images on which accuracy is then reported."""
    return (
        f"warning: the CRF's parameters are searched on the evaluation split '{split}', so that the accuracy reported "
        "for it looks too good; set config.data.holdout to search on held-out training images instead"
    )


def search_as_configured(
    config, workdir: str | Path, images: int = 0, say=print, job: Job | None = None
) -> tuple[Setting, str]:
    """`search_workdir` with the settings of the config, on `images` images; 0 = `config.search.images`."""
    crf, wanted = config.crf, config.search
    return search_workdir(
        config,
        workdir,
        {**configured_axes(wanted), "normalization": (crf.normalization,)},
        images=images or wanted.images,
        objective=wanted.objective,
        passes=wanted.passes,
        thin=wanted.thin,
        learn=wanted.learn,
        iterations=crf.iterations or 10,
        bilateral=crf.bilateral,
        say=say,
        job=job,
    )


def _remembered(
    learn: Callable[[Candidate], Candidate], path: Path, about: Mapping, job: Job
) -> Callable[[Candidate], Candidate]:
    """`learn`, but an earlier result for the same setting and circumstances is read from `path`.

    With several processes the first one learns.
    """

    def once(start: Candidate) -> Candidate:
        asked = json.loads(json.dumps({**about, "start": start}))

        def remembered() -> Candidate | None:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a damaged file: learned again
                known = json.loads(path.read_text())
                if known["about"] == asked:
                    return with_weights(start, known["weights"])
            return None

        if job.is_first and remembered() is None:
            learned = learn(start)
            weights = {name: getattr(learned, name) for name in WEIGHT_FIELDS}
            write_text(path, json.dumps({"about": asked, "weights": weights}))
        job.wait_until(lambda: remembered() is not None)
        found = remembered()
        assert found is not None
        return found

    return once
