"""The preparation of a run before its first step: settings, data, network, optimizer, and the initial state.

Nothing here writes: errors are found before the workdir is touched.
"""

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.console import say
from deeplab_jax.crf.layer import filter_for
from deeplab_jax.crf.setting import setting_from_config
from deeplab_jax.data import has_holdout, open_dataset, require_labels, require_two_classes
from deeplab_jax.data.class_weights import check_class_weights, class_weights_for
from deeplab_jax.data.dataset import SegmentationDataset
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.submission import check_submission
from deeplab_jax.imaging.mirror import checked_swaps
from deeplab_jax.models import BACKBONES, create_model, initial
from deeplab_jax.runs import processes, schema
from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.flat import unflatten_state
from deeplab_jax.runs.provenance import config_of, read_config
from deeplab_jax.runs.record import read_record
from deeplab_jax.search.grid import thin_flags
from deeplab_jax.search.workdir import flattering
from deeplab_jax.training.crops import check_crop
from deeplab_jax.training.optimizer import create_optimizer, create_schedule
from deeplab_jax.training.state import TrainState, create_state
from deeplab_jax.training.step import AXIS, create_train_step
from deeplab_jax.weights.initial import load_initial, recorded_settings, settings_of


@dataclasses.dataclass
class Setup:
    """A run that is ready to begin.

    Attributes:
      config: the caller's, with the settings recorded with the weights that it begins with.
      dataset: of the training split.
      state: host arrays after the finished steps.
      done: the number of finished steps.
      step_fn: (replicated state, batch) -> (state, metrics).
      schedule: step -> learning rate.
      meta: the values written beside each checkpoint.
      present: steps of the existing checkpoints.
    """

    config: ConfigDict
    dataset: SegmentationDataset
    state: TrainState
    done: int
    step_fn: jax.stages.Wrapped
    schedule: Callable
    meta: dict
    present: list[int]


def prepare(config: ConfigDict, workdir: Path, restart: bool = False) -> Setup:
    """Checks and builds everything, reading the workdir without changing it.

    Args:
      config: see configs/base.py; not modified.
      workdir: the run's folder, which need not exist.
      restart: begin at step 0 regardless of the workdir's contents.

    Raises:
      UserError: the config, the data, or the contents of the workdir cannot be used.
    """
    check(config)
    dataset = open_dataset(config.data, config.data.train_split, seed=config.seed)
    require_two_classes(dataset)
    check_classes(config, dataset.class_names)
    if config.eval.every and config.eval.select_split:  # a misspelt one is reported now, not at the first evaluation
        require_labels(open_dataset(config.data, config.eval.select_split, seed=config.seed))
    config = with_recorded_settings(config, None if restart else workdir)
    model = build_model(config, dataset.num_classes)
    schedule = create_schedule(config)
    optimizer = create_optimizer(config, schedule)
    state = create_state(initial_variables(config, model), config, optimizer)
    if processes.is_first():
        print_overview(state)
        for sentence in notes(config):
            say(sentence)
    weights = class_weights_for(config, dataset)
    present = Checkpoints(workdir, read_only=True).present()
    done, state = (0, state) if restart else resume(workdir, state, dataset, config.num_steps)
    meta = {
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "palette": np.asarray(dataset.palette).tolist(),
        "data_fingerprint": dataset.fingerprint,
        "config": config.to_dict(),
    }
    step_fn = create_train_step(model.clone(axis_name=AXIS), config, optimizer, weights)
    return Setup(config, dataset, state, done, step_fn, schedule, meta, present)


def check(config: ConfigDict) -> None:
    """Refuses configs that cannot run, before anything is read or written.

    Raises:
      UserError: naming the field and the remedy.
    """
    if problem := schema.problem(config):
        raise UserError(problem)
    rows = jax.device_count() * config.optimizer.accumulate
    if config.batch_size < 1 or config.batch_size % rows:
        raise UserError(
            f"config.batch_size={config.batch_size}: must be divisible by {jax.device_count()} device(s) times "
            f"config.optimizer.accumulate={config.optimizer.accumulate}; the next suitable size: "
            f"{max(1, -(-config.batch_size // rows)) * rows}"
        )
    check_crop(config)
    check_crf(config)
    model = config.model
    norm = BACKBONES[model.backbone].batch_norm and model.batch_norm == "frozen"
    if norm and not config.init_from and not model.allow_random_frozen:
        raise UserError(
            "config.model.batch_norm=frozen needs stored statistics: give --config.init_from=WEIGHTS (see "
            "deeplab_jax.convert_weights), or train them with --config.model.batch_norm=trained, or allow random ones "
            "with --config.model.allow_random_frozen=true"
        )


def check_crf(config: ConfigDict) -> None:
    """Raises `UserError` if `config.crf` describes no CRF, or one that cannot be learned as it says."""
    try:
        setting = setting_from_config(config.crf)
        if config.crf.train == "end_to_end" and config.crf.train_iterations:
            filter_for(config.crf.learn, setting.options["bilateral"])
    except ValueError as e:
        raise UserError(f"config.crf: {e}") from e


def check_classes(config: ConfigDict, class_names: Sequence[str]) -> None:
    """Refuses fields that do not fit the classes of the data; some would be read after the training only.

    Raises:
      UserError: names the field.
    """
    try:
        setting_from_config(config.crf).params.of_classes(np.arange(len(class_names)), len(class_names))
    except ValueError as e:
        raise UserError(f"config.crf: {e}; give as many, or one for all") from e
    thin_flags(config.search.thin, class_names)
    checked_swaps(config.data.mirror_swaps, len(class_names))
    check_class_weights(config.loss.class_weights, len(class_names))
    check_submission(config.eval.submission, len(class_names))


def notes(config: ConfigDict) -> list[str]:
    """Sentences about fields that are allowed, and do not do what one might expect."""
    found = []
    if config.eval.every and not config.eval.select_split:
        found.append(
            f"note: config.eval.every={config.eval.every} has no effect without config.eval.select_split, which names "
            "the split to evaluate during training"
        )
    if config.search.images and config.crf.iterations and not has_holdout(config.data):
        found.append(flattering(config.eval.split))
    return found


def with_recorded_settings(config: ConfigDict, workdir: Path | None) -> ConfigDict:
    """A copy of the config with the preprocessing, resizing and stride placement that its weights were trained with.

    Args:
      config: see configs/base.py.
      workdir: the run's folder; what its newest checkpoint was trained with comes before what was recorded with
        `config.init_from`. None = the run begins again.

    Raises:
      UserError: `config.init_from` cannot be read.
    """
    config = copy.deepcopy(config)
    source, settings = workdir, settings_so_far(workdir) if workdir else {}
    if not settings and config.init_from:
        source, settings = config.init_from, recorded_settings(config.init_from)
    for name, value in settings.items():
        if name in config.model and config.model[name] != value:
            say(f"config.model.{name} = {value}, as recorded with {source}")
            config.model[name] = value
    return config


def settings_so_far(workdir: Path) -> dict[str, str]:
    """The fields of `config.model` that a run's newest readable checkpoint needs; {} if there is none."""
    checkpoints = Checkpoints(workdir, read_only=True)
    for step in reversed(checkpoints.steps()):
        try:
            return settings_of(config_of(workdir, step, checkpoints.meta(step)).model)
        except (UserError, ValueError):  # `resume` says what is wrong with it, and uses the one before
            continue
    return {}


def build_model(config: ConfigDict, num_classes: int):
    """The config's network, with the mean-field CRF if `config.crf.train` is end_to_end.

    Raises:
      UserError: the fields do not describe a network.
    """
    try:
        return create_model(config.model, num_classes, crf=config.crf)
    except ValueError as e:
        raise UserError(f"config.model: {e}") from e


def initial_variables(config: ConfigDict, model) -> dict:
    """The variables of `config.init_from`, and random ones from `config.seed` where it has none; host arrays."""
    variables = initial.plan(model)
    if config.init_from:
        variables, load_report = load_initial(config.init_from, config.model, variables)
        say(str(load_report))
    return initial.draw(model, variables, config.seed)


def print_overview(state: TrainState) -> None:
    """Prints the numbers of learned and frozen parameters, by top-level group (`describe` has the table)."""
    from clu import parameter_overview

    total = int(parameter_overview.count_parameters(state.trainable))
    frozen = int(parameter_overview.count_parameters(state.frozen)) if state.frozen else 0
    groups = {name: int(parameter_overview.count_parameters(tree)) for name, tree in state.trainable.items()}
    parts = ", ".join(f"{name} {count:,}" for name, count in groups.items())
    say(f"parameters: {total:,} learned ({parts}), {frozen:,} frozen")


def resume(workdir: Path, state: TrainState, dataset, num_steps: int) -> tuple[int, TrainState]:
    """The number of finished steps and their state, from the newest complete checkpoint; (0, `state`) for a new
    workdir.

    Process 0 chooses it for all: their views of a shared folder may differ for a moment.

    Raises:
      UserError: the checkpoint belongs to another architecture, the run is finished and the data differ, or the workdir
        was trained and has no usable checkpoint.
    """
    checkpoints = Checkpoints(workdir, read_only=True)
    newest = checkpoints.newest_whole(say) if processes.is_first() else None
    if processes.is_first() and newest is None:
        refuse_lost_training(workdir, checkpoints)
    processes.barrier("prepared")  # processes may arrive further apart than the devices' time-out
    done = processes.from_first(newest or 0)
    if not done:
        return 0, state
    flat, meta = checkpoints.read(done)
    state = unflatten_state(state, flat)
    before = meta.get("data_fingerprint", dataset.fingerprint)
    if before != dataset.fingerprint and done >= num_steps:
        raise UserError(
            f"the run is at its end, step {done} of {num_steps}, and was trained on other data than "
            "these, so nothing would be trained: give another --workdir or a larger --config.num_steps, or "
            "evaluate the run on these data with --mode eval"
        )
    if before != dataset.fingerprint:
        say(f"the data differ from those of the run so far (fingerprint {dataset.fingerprint}, before: {before})")
    return done, state


def refuse_lost_training(workdir: Path, checkpoints: Checkpoints) -> None:
    """Refuses to begin at step 0 in a workdir that has been trained further than its first checkpoint.

    Raises:
      UserError: lists the contents.
    """
    there = [f"checkpoint {step} ({checkpoints.problem(step)})" for step in checkpoints.present()]
    if (workdir / "best.json").exists():
        there.append("best.json")
    last = max((row["step"] for row in read_record(workdir / "metrics.jsonl")), default=0)
    try:
        first = read_config(workdir).checkpoint.every
    except UserError:
        first = 0
    if first and last > first:
        there.append(f"a record of {last} steps")
    if there:
        raise UserError(
            f"{workdir}: has been trained, but has no usable checkpoint; there is {', '.join(there)}; put a "
            "complete checkpoint back, give another --workdir, or begin again at step 0 with --restart, which moves "
            "all this to aside/"
        )
