"""The story of a run: open, build, resume, train, select, search, evaluate."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.config import fields
from deeplab_jax.console import say
from deeplab_jax.data import open_dataset, prefetch, stages, train_batches
from deeplab_jax.data.class_weights import class_weights_for
from deeplab_jax.errors import UserError
from deeplab_jax.models import create_model
from deeplab_jax.runs import processes
from deeplab_jax.runs.checkpoints import Checkpoints, CheckpointWriteError, flatten_state, unflatten_state
from deeplab_jax.runs.provenance import open_workdir, record_run
from deeplab_jax.runs.reporting import Reporter, read_record
from deeplab_jax.search.grid import OBJECTIVES, thin_flags
from deeplab_jax.training.crops import check_crop
from deeplab_jax.training.observation import Pictures
from deeplab_jax.training.optimizer import create_optimizer, create_schedule
from deeplab_jax.training.state import TrainState, create_state
from deeplab_jax.training.step import AXIS, create_train_step, replicate, to_devices, unreplicate
from deeplab_jax.training.termination import TERMINATED, Terminated, TermSignal


class NonFiniteError(UserError):
    """Loss, gradient or updated state was not finite; the newest checkpoint is from before."""


def train(config: ConfigDict, workdir: str | Path) -> None:
    """Trains until `config.num_steps`, from the newest whole checkpoint of `workdir` if it has one.

    Args:
      config: see configs/base.py.
      workdir: checkpoints, record and pictures go here.

    Raises:
      UserError: the config, the data, the workdir or a checkpoint cannot be used, or another process of the job ended.
      NonFiniteError: loss, gradient or updated state is not finite.
      Terminated: SIGTERM arrived; the state is saved.
    """
    try:
        with TermSignal() as stop:
            _train(config, Path(workdir), stop)
    except jax.errors.JaxRuntimeError as e:
        if not processes.lost_peer(e):
            raise
        raise UserError(
            f"process {jax.process_index()} of {jax.process_count()}: another process of the job ended "
            f"({str(e).splitlines()[0][:200]}); see its messages; the same command goes on from the newest checkpoint"
        ) from e


def _train(config: ConfigDict, workdir: Path, stop: TermSignal) -> None:
    first = processes.is_first()

    # --- open ---------------------------------------------------------------------------------------------------
    check(config)
    dataset = open_dataset(config.data, config.data.train_split, seed=config.seed)
    thin_flags(config.search.thin, dataset.class_names)  # a misspelt name is told now, not after the training
    apply_recorded_settings(config)
    if first:
        open_workdir(workdir, config, say)
        record_run(workdir, data_fingerprint=dataset.fingerprint, train_images=len(dataset))
    processes.barrier("workdir")
    say(f"training on {len(dataset)} images, {dataset.num_classes} classes, {jax.device_count()} device(s)")

    # --- build --------------------------------------------------------------------------------------------------
    model = build_model(config, dataset.num_classes)
    optimizer = create_optimizer(config)
    state = create_state(initial_variables(config, model), config, optimizer)
    if first:
        print_overview(state)
    weights = class_weights_for(config, dataset)
    step_fn = create_train_step(model.clone(axis_name=AXIS), config, optimizer, weights)
    schedule = create_schedule(config)
    meta = {
        "num_classes": dataset.num_classes,
        "class_names": list(dataset.class_names),
        "palette": np.asarray(dataset.palette).tolist(),
        "data_fingerprint": dataset.fingerprint,
    }

    # --- resume -------------------------------------------------------------------------------------------------
    checkpoints = Checkpoints(workdir, config.checkpoint.keep)
    done, state = resume(checkpoints, state, config, dataset)
    leaf_names = [".".join(str(k.key) for k in p) for p, _ in jax.tree_util.tree_flatten_with_path(state.trainable)[0]]
    state = replicate(state)
    costs = [(stage.end, float(np.prod(stage.crop) / np.prod(config.data.crop))) for stage in stages(config)]
    first_of_a_size = {done + 1, *(end + 1 for end, _ in costs)}
    reporter = Reporter(workdir, done, config.num_steps, active=first, costs=costs)
    reporter.hyperparameters(dict(fields(config)))
    select = Selection(config, workdir, checkpoints, reporter, meta)
    saved = done

    def end() -> None:
        reporter.close()
        say(f"SIGTERM: saved step {saved} and stopping; the same command goes on from there")
        raise Terminated(TERMINATED)

    def evaluate(step: int, host_state: TrainState) -> None:
        """Selects, unless SIGTERM came: the next run does it again, so the state's being saved is enough."""
        try:
            # One process alone can stop in the middle; several would wait for each other.
            with stop.interrupting() if jax.process_count() == 1 else contextlib.nullcontext():
                select(step, host_state)
        except Terminated:
            end()

    if done and select.unfinished(done):
        evaluate(done, unreplicate(state))

    # --- train --------------------------------------------------------------------------------------------------
    batches = train_batches(
        dataset,
        config,
        first_step=done,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    # The next batch is on its way to the devices while they work on this one.
    ahead = prefetch(batches, lambda batch: to_devices(batch, config.optimizer.accumulate), size=1)
    pending: list[tuple[int, dict]] = []
    pictures = Pictures(config, reporter, meta, dataset, done)

    def settle() -> None:
        """Fetches the metrics of the steps since the last time: the one place where the host waits for devices."""
        if pending:
            report(pending, leaf_names, schedule, config, reporter, saved)
            pending.clear()

    def save(step: int) -> TrainState:
        nonlocal saved
        settle()
        host_state = unreplicate(state)
        written = True
        if first:
            pictures(step, host_state)
            try:
                checkpoints.save(step, flatten_state(host_state), meta | {"step": step})
            except CheckpointWriteError as e:
                if step >= config.num_steps or stop.arrived:
                    raise
                say(f"warning: {e}; training goes on, the newest whole checkpoint is that of step {saved}")
                written = False
        reporter.flush()
        if processes.from_first(written):
            saved = step
        return host_state

    for step in range(done + 1, config.num_steps + 1):
        state, metrics = step_fn(state, next(ahead))
        pending.append((step, metrics))
        if step in first_of_a_size:
            jax.block_until_ready(metrics)
            reporter.restart_clock(step)  # the first step of a size compiles
        waiting = step % config.log.every == 0
        if waiting:
            settle()
        last = step == config.num_steps
        stopping = processes.any_process(stop.arrived, ask=waiting)  # all of them stop at one step
        periodic = config.checkpoint.every and step % config.checkpoint.every == 0
        if not (stopping or last or periodic or select.due(step)):
            continue
        host_state = save(step)
        if stopping or processes.any_process(stop.arrived, ask=True):
            end()
        if select.due(step) and saved == step:
            evaluate(step, host_state)
        del host_state  # a second copy of the state, not to be kept while training
        if not last:
            reporter.restart_clock(step)
    batches.close()
    skipped = int(unreplicate(state).skipped)
    if skipped:
        say(f"{skipped} steps were skipped for a non-finite gradient or update")
    reporter.close()


def resume(checkpoints: Checkpoints, state: TrainState, config: ConfigDict, dataset) -> tuple[int, TrainState]:
    """The steps that are done and their state, from the newest whole checkpoint; (0, `state`) where there is none.

    Process 0 looks for it and all take that one: what each of them sees of a shared folder may differ for a moment.

    Raises:
      UserError: the checkpoint is of another architecture.
    """
    newest = checkpoints.newest_whole(say) if processes.is_first() else None
    done = processes.from_first(newest or 0)
    if not done:
        return 0, state
    flat, meta = checkpoints.restore(done)
    state = unflatten_state(state, flat)
    checkpoints.forget_after(done)
    say(f"resuming at step {done} of {config.num_steps}")
    before = meta.get("data_fingerprint", dataset.fingerprint)
    if before != dataset.fingerprint and done >= config.num_steps:
        raise UserError(
            f"the run is at its end, step {done} of {config.num_steps}, and these data are not those that it was "
            "trained on, so nothing would be trained: give another --workdir or a larger --config.num_steps, or "
            "evaluate the run on these data with --mode eval"
        )
    if before != dataset.fingerprint:
        say(f"the data differ from those of the run so far (fingerprint {dataset.fingerprint}, before: {before})")
    return done, state


class Selection:
    """Chooses the best checkpoint on `config.eval.select_split`, never on the split that results are given for."""

    def __init__(self, config, workdir: Path, checkpoints: Checkpoints, reporter: Reporter, meta: dict):
        self._config, self._workdir, self._checkpoints = config, workdir, checkpoints
        self._reporter, self._meta = reporter, meta

    def due(self, step: int) -> bool:
        """Whether the checkpoint of `step` is to be evaluated."""
        every = self._config.eval.every
        return bool(every and self._config.eval.select_split and (step % every == 0 or step == self._config.num_steps))

    def unfinished(self, step: int) -> bool:
        """Whether the checkpoint of `step`, the newest, is still to be evaluated, as all processes agree.

        The best mark is put back as the record has it: a kill may have come between a row and its mark.
        """
        rows = read_record(self._workdir / "metrics.jsonl") if processes.is_first() else []
        recorded = {row["step"]: row["select/mean_iou"] for row in rows if "select/mean_iou" in row}
        for earlier in sorted({*recorded} & {*self._checkpoints.steps()}):
            self._checkpoints.mark_best(earlier, recorded[earlier])
        return bool(processes.from_first(self.due(step) and step not in recorded))

    def __call__(self, step: int, state: TrainState) -> None:
        from deeplab_jax.evaluation.workdir import evaluate_split

        result = evaluate_split(
            self._config, state.variables(), self._meta, self._config.eval.select_split, None, crf_iterations=(0,)
        )[0]
        classes = {f"select/iou/{n}": iou for n, iou in result["per_class_iou"].items() if iou is not None}
        self._reporter.scalars(step, {"select/mean_iou": result["mean_iou"]} | classes)
        best = self._checkpoints.mark_best(step, result["mean_iou"])
        say(
            f"step {step}: {100 * result['mean_iou']:.2f} % mean IoU on {result['images']} images of "
            f"'{self._config.eval.select_split}'{', the best so far' if best else ''}"
        )


def check(config: ConfigDict) -> None:
    """Refuses configs that cannot run, before anything is read or written.

    Raises:
      UserError: naming the field and the remedy.
    """
    rows = jax.device_count() * config.optimizer.accumulate
    if config.batch_size < 1 or config.batch_size % rows:
        raise UserError(
            f"config.batch_size={config.batch_size}: must be divisible by {jax.device_count()} device(s) times "
            f"config.optimizer.accumulate={config.optimizer.accumulate}; the next that is: "
            f"{max(1, -(-config.batch_size // rows)) * rows}"
        )
    check_crop(config)
    if config.search.objective not in OBJECTIVES:
        raise UserError(f"config.search.objective={config.search.objective}: must be among {', '.join(OBJECTIVES)}")
    model = config.model
    norm = model.backbone.startswith("resnet") and model.batch_norm == "frozen"
    if norm and not config.init_from and not model.allow_random_frozen:
        raise UserError(
            "config.model.batch_norm=frozen needs stored statistics: give --config.init_from=WEIGHTS (see "
            "deeplab_jax.convert_weights), or train them with --config.model.batch_norm=trained, or allow random ones "
            "with --config.model.allow_random_frozen=true"
        )


def apply_recorded_settings(config: ConfigDict) -> None:
    """Takes over the preprocessing and stride placement that were recorded with `config.init_from`."""
    if not config.init_from:
        return
    from deeplab_jax.weights import recorded_settings

    for name, value in recorded_settings(config.init_from).items():
        if name in config.model and config.model[name] != value:
            say(f"config.model.{name} = {value}, as recorded with {config.init_from}")
            config.model[name] = value


def build_model(config: ConfigDict, num_classes: int):
    """The config's network, with the mean-field CRF on top if `config.crf.train` is end_to_end.

    Raises:
      UserError: the fields do not describe a network.
    """
    try:
        return create_model(config.model, num_classes, crf=config.crf)
    except ValueError as e:
        raise UserError(f"config.model: {e}") from e


def initial_variables(config: ConfigDict, model) -> dict:
    """Random variables keyed by `config.seed`, with those of `config.init_from` put in their place."""
    height, width = config.data.crop
    image = jnp.zeros((1, height, width, 3), jnp.float32)
    key = jax.random.key(config.seed)
    variables = jax.jit(lambda k: model.init({"params": k, "dropout": k}, image, train=False))(key)
    if not config.init_from:
        return variables
    from deeplab_jax.weights import load_initial

    variables, load_report = load_initial(config.init_from, config.model, jax.tree.map(np.asarray, variables))
    say(str(load_report))
    return variables


def print_overview(state: TrainState) -> None:
    """Says how many parameters there are, learned and frozen, by top-level group (the table is `describe`'s)."""
    from clu import parameter_overview

    total = int(parameter_overview.count_parameters(state.trainable))
    frozen = int(parameter_overview.count_parameters(state.frozen)) if state.frozen else 0
    groups = {name: int(parameter_overview.count_parameters(tree)) for name, tree in state.trainable.items()}
    parts = ", ".join(f"{name} {count:,}" for name, count in groups.items())
    say(f"parameters: {total:,} learned ({parts}), {frozen:,} frozen")


def report(
    pending: list[tuple[int, dict]],
    leaf_names: list[str],
    schedule: Callable,
    config: ConfigDict,
    reporter: Reporter,
    saved: int,
) -> None:
    """Checks the metrics of some steps and records them.

    Raises:
      NonFiniteError: one of them is not finite; names the steps, the parameters and the checkpoint before.
    """
    fetched = [(step, unreplicate(metrics)) for step, metrics in pending]
    if not config.optimizer.skip_nonfinite:
        bad = [(step, m) for step, m in fetched if not np.all(m["finite"])]
        if bad:
            step, metrics = bad[0]
            names = [n for n, ok in zip(leaf_names, metrics["finite"]) if not ok]
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            kept = f"the checkpoint of step {saved} is kept" if saved else "no checkpoint had been written yet"
            raise NonFiniteError(
                f"loss, gradient or updated state was not finite at step {step} (looked at: {fetched[0][0]} to "
                f"{fetched[-1][0]}); parameters concerned: {shown}; {kept}; lower config.optimizer.learning_rate or "
                "set clip_norm"
            )
    for step, metrics in fetched:
        values = {f"train/{k}": float(v) for k, v in metrics.items() if np.ndim(v) == 0 and k != "updated"}
        reporter.scalars(step, values | {"train/learning_rate": float(schedule(step - 1))})
    step, metrics = fetched[-1]
    mean = float(np.mean([m["loss"] for _, m in fetched]))
    reporter.line(step, {"loss": mean, "rate": float(schedule(step - 1))}, config.batch_size)
