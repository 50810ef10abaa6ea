"""Trained runs for experiments: trained if missing, measured with a choice of CRF parameters, continued."""

import copy
from pathlib import Path

from ml_collections import ConfigDict

from deeplab_jax.errors import UserError
from experiments import common

_NO_DATA = ("cache_dir", "workers", "cache_decoded_mb")  # fields of `config.data` that change no result


def trained(config: ConfigDict, workdir: Path) -> Path:
    """Trains the config in `workdir`, continuing where an earlier call was stopped; returns `workdir`."""
    from deeplab_jax.training import loop

    print(f"--- training {workdir}", flush=True)
    loop.train(config, workdir)
    return workdir


def measure(config: ConfigDict, workdir: Path, folder: Path, *, preset: str | None = None) -> list[dict]:
    """Evaluates a run's network with its own CRF or with another; an earlier evaluation is not repeated.

    Args:
      config: data and evaluation; the network, and without `preset` the CRF, are the run's.
      workdir: the run.
      folder: results are stored here.
      preset: CRF parameters by name or file, instead of the run's own, learned or configured.

    Returns:
      One dict per number of iterations in `config.eval.crf_iterations`; see `deeplab_jax.evaluation.evaluate`.
    """
    from deeplab_jax.evaluation.workdir import evaluate_split
    from deeplab_jax.inference.segment import digest_of
    from deeplab_jax.runs.checkpoints import load_workdir
    from deeplab_jax.runs.job import digest

    own, variables, meta = load_workdir(workdir)
    config = copy.deepcopy(config)
    config.model = own.model
    if preset is None:
        with config.unlocked():
            config.crf = own.crf
    else:
        config.crf.preset = preset
        config.crf.train = "off"
        variables = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "crf"}}
    place = digest(str(workdir.resolve()))[:8]  # several runs may have one name
    where = f"{workdir.resolve().name}_{place}_{Path(preset).stem if preset else 'own'}.json"
    read = Path(preset).read_text() if preset and preset.endswith(".json") and Path(preset).is_file() else preset
    about = {
        "workdir": str(workdir.resolve()),
        "step": meta["step"],
        "preset": read,
        "split": config.eval.split,
        "weights": digest_of([variables[name] for name in sorted(variables)]),
        "crf": config.crf.to_dict(),
        "data": {name: value for name, value in config.data.to_dict().items() if name not in _NO_DATA},
        "seed": config.seed,
        "eval": config.eval.to_dict(),
    }

    def compute() -> list[dict]:
        print(f"--- evaluating {workdir}, CRF parameters: {preset or 'its own'}", flush=True)
        return evaluate_split(config, variables, meta, config.eval.split, None)

    return common.remembered(folder / where, about, compute)


def own_preset(workdir: Path) -> str | None:
    """The preset file that a parameter search left in a run; None if there was no search."""
    path = workdir / "crf_preset.json"
    return str(path) if path.is_file() else None


def searched_preset(config: ConfigDict, workdir: Path, images: int) -> str:
    """The preset file of a run's parameter search on this many held-out images.

    The search continues from what it has measured, so one that has been done takes seconds. A run's own preset is
    used if no images are to be searched on, or none are held out.

    Raises:
      UserError: the config has no held-out images to search on, and the run no preset.
    """
    from deeplab_jax.data import has_holdout

    found = own_preset(workdir)
    if found and not (images and has_holdout(config.data)):
        return found
    if not has_holdout(config.data):
        raise UserError(
            "the CRF's parameters are searched on images that are not used for training; set some aside with "
            "--config.data.holdout=N, or search with deeplab_jax.crf_search first"
        )
    from deeplab_jax.search.workdir import search_as_configured

    print(f"--- searching CRF parameters for {workdir}", flush=True)
    _, text = search_as_configured(config, workdir, images, say=lambda line: print(line, flush=True))
    print(text, flush=True)
    return str(workdir / "crf_preset.json")


def continued(config: ConfigDict, start: Path, workdir: Path, *, steps: int, rate: float, end_to_end: bool) -> Path:
    """Trains a run for this many further steps, with or without the CRF on top; the same batches in both cases.

    Args:
      config: data and schedule of the run.
      start: the run to start from; its averaged weights, if it has them.
      workdir: of the continuation.
      steps: how many.
      rate: learning rate at their beginning.
      end_to_end: whether the loss comes after the mean field and its parameters learn too.
    """
    from deeplab_jax.runs.provenance import read_config

    config = copy.deepcopy(config)
    config.model = read_config(start).model
    config.init_from = str(start)
    config.num_steps = steps
    config.crf.train = "end_to_end" if end_to_end else "off"
    config.data.stages = ()
    config.optimizer.update(learning_rate=float(rate), warmup_steps=0, ema=0.0)  # an average would lag behind
    config.eval.update(every=0, select_split="")
    config.checkpoint.every = steps
    return trained(config, workdir)
