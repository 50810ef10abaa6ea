"""Evaluating a run: the choice of split, checkpoint and CRF parameters."""

import copy
from collections.abc import Sequence
from pathlib import Path

import jax
from ml_collections import ConfigDict

from deeplab_jax.console import say
from deeplab_jax.crf.setting import Setting, read_preset
from deeplab_jax.data import open_dataset
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.evaluate import evaluate, format_results
from deeplab_jax.inference.from_config import create_segmenter
from deeplab_jax.runs import processes
from deeplab_jax.runs.checkpoints import load_workdir
from deeplab_jax.runs.job import Job
from deeplab_jax.runs.lock import writing
from deeplab_jax.runs.reporting import show_evaluation


def evaluate_split(
    config: ConfigDict,
    variables: dict,
    meta: dict,
    split: str,
    out_dir: Path | None,
    crf_iterations: Sequence[int] | None = None,
) -> list[dict]:
    """Evaluates variables on a split; see `deeplab_jax.evaluation.evaluate.evaluate` for the result.

    Args:
      config: the run's config.
      variables: host arrays.
      meta: `class_names` and `palette`.
      split: of `config.data`.
      out_dir: where results are written; None = nowhere.
      crf_iterations: overrides `config.eval.crf_iterations`.

    Raises:
      UserError: the split cannot be read, or has another number of classes than the checkpoint.
    """
    config = copy.deepcopy(config)
    if crf_iterations is not None:
        config.eval.crf_iterations = tuple(crf_iterations)
        config.eval.trimap_widths = ()
        config.eval.overlays = 0
    dataset = open_dataset(config.data, split, seed=config.seed)
    if dataset.num_classes != len(meta["class_names"]):
        raise UserError(
            f"config.data: split '{split}' has {dataset.num_classes} classes, the checkpoint {len(meta['class_names'])}"
        )
    segmenter = create_segmenter(config, variables, meta["class_names"], meta["palette"], devices=jax.local_devices())
    return evaluate(
        segmenter,
        dataset,
        config,
        out_dir,
        split=split,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def evaluate_workdir(config: ConfigDict, workdir: str | Path) -> str:
    """Evaluates a workdir's best (or newest) checkpoint on `config.eval.split`.

    With `config.search.images`, the CRF's parameters are first searched on the held-out images
    (`config.data.holdout`), once; the search is stored in the workdir. It replaces parameters learned end to end:
    training wants a softer CRF than testing. A preset file in `config.crf.preset` that training did not have replaces
    both.

    Returns:
      The table to print.

    Raises:
      UserError: there is no checkpoint, or the data cannot be used, or another process writes there.
    """
    workdir = Path(workdir)
    # Perhaps only process 0 has seen the last mark; all evaluate the checkpoint that it chose.
    loaded = load_workdir(workdir) if processes.is_first() else None
    step = processes.from_first(loaded[2]["step"] if loaded else 0)
    trained, variables, meta = loaded or load_workdir(workdir, step)
    with writing(workdir):
        return _evaluate(config, workdir, trained, variables, meta)


def _evaluate(config: ConfigDict, workdir: Path, trained: ConfigDict, variables: dict, meta: dict) -> str:
    config = copy.deepcopy(config)
    config.model = trained.model  # the network is the trained one; evaluation may differ
    given = config.crf.preset.endswith(".json") and config.crf.preset != trained.crf.get("preset", "")
    searches = bool(config.search.images and config.crf.iterations) and not given
    if searches:
        preset = _search(config, workdir)
        config.crf.preset = str(workdir / "crf_preset.json")
        say(f"CRF parameters: {preset.source}")
    elif given:
        say(f"CRF parameters: {config.crf.preset}")
    if searches or given:
        variables = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "crf"}}
    results = evaluate_split(config, variables, meta, config.eval.split, workdir / "eval")
    processes.barrier("evaluated")
    if results and processes.is_first():
        show_evaluation(workdir, meta["step"], config.eval.split, results)
    lines = [
        f"step {meta['step']}, split '{config.eval.split}', {results[0]['images']} images" if results else "no labels",
        format_results(results) if results else "",
    ]
    if processes.is_first():
        log = workdir / "tensorboard"  # not written where TensorFlow is not installed
        shown = f", tensorboard --logdir {log}" if log.is_dir() else ""
        lines.append(f"open: {workdir / 'eval'} (results and overlays){shown}")
    return "\n".join(line for line in lines if line)


def _search(config: ConfigDict, workdir: Path) -> Setting:
    """Chooses the CRF's parameters on `config.search.images` held-out images; continues where it was stopped.

    All processes share the images; process 0 writes the result, and the others read it.
    """
    job = Job(jax.process_index(), jax.process_count())
    with job.meeting(workdir / "crf_search" / ".processes"):
        table = _search_together(config, workdir, job)
        if job.is_first:
            say(table)
        job.conclude({}, lambda reports: 0)
    return read_preset(workdir / "crf_preset.json")


def _search_together(config: ConfigDict, workdir: Path, job: Job) -> str:
    from deeplab_jax.search.workdir import search_as_configured

    return search_as_configured(config, workdir, say=say if job.is_first else lambda line: None, job=job)[1]
