"""The story of a run: prepare, begin, train, save, select."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from deeplab_jax.config import fields
from deeplab_jax.console import say
from deeplab_jax.data import prefetch, stages, train_batches
from deeplab_jax.errors import UserError
from deeplab_jax.runs import processes
from deeplab_jax.runs.checkpoints import Checkpoints, CheckpointWriteError
from deeplab_jax.runs.flat import flatten_state, names_of
from deeplab_jax.runs.full_disk import reported_once
from deeplab_jax.runs.lock import check_can_write, writing
from deeplab_jax.runs.provenance import begin_again, record_start
from deeplab_jax.runs.reporting import Reporter
from deeplab_jax.training.observation import Pictures
from deeplab_jax.training.selection import Selection
from deeplab_jax.training.setup import Setup, prepare
from deeplab_jax.training.state import TrainState
from deeplab_jax.training.step import replicate, to_devices, unreplicate
from deeplab_jax.training.termination import Terminated, TermSignal


class NonFiniteError(UserError):
    """Loss, gradient or updated state was not finite; the newest checkpoint is from before."""


def train(config: ConfigDict, workdir: str | Path, restart: bool = False) -> None:
    """Trains until `config.num_steps`, from the newest complete checkpoint of `workdir` if it has one.

    Args:
      config: see configs/base.py; not modified.
      workdir: the folder for checkpoints, record and pictures. Nothing in it changes before all checks have passed.
      restart: begin at step 0; the contents of the workdir are moved to its folder `aside`.

    Raises:
      UserError: the config, the data, the workdir or a checkpoint cannot be used, or another process writes there, or
        another process of the job ended.
      NonFiniteError: loss, gradient or updated state is not finite.
      Terminated: SIGTERM or Ctrl-C arrived; the state is saved.
    """
    workdir = Path(workdir)
    try:
        with TermSignal() as stop:
            with at_once(stop, "stopped before the training began; the workdir is unchanged"):
                check_can_write(workdir)
                setup = prepare(config, workdir, restart)
            with writing(workdir), reported_once():
                run = Run(setup, workdir, stop, restart)
                run.train()
    except jax.errors.JaxRuntimeError as e:
        if not processes.lost_peer(e):
            raise
        raise processes.lost_peer_error(e) from e


@contextlib.contextmanager
def at_once(stop: TermSignal, sentence: str):
    """Inside, a signal ends a single process at once; several would wait for each other, and stop at a step."""
    with stop.interrupting(sentence) if jax.process_count() == 1 else contextlib.nullcontext():
        try:
            yield
        except BaseException:
            if not stop.arrived:
                raise
            if sentence:
                say(f"{stop.name}: {sentence}")
            raise Terminated(stop.arrived) from None


class Run:
    """A run, from its first step in this process.

    Attributes:
      state: of the newest step, replicated over the devices.
      saved: the step of the newest complete checkpoint, 0 before the first.
    """

    def __init__(self, setup: Setup, workdir: Path, stop: TermSignal, restart: bool):
        """Takes over the workdir: from here on it records this run."""
        self.config, self.setup, self.stop = setup.config, setup, stop
        first = processes.is_first()
        if first:
            take_over(setup, workdir, restart)
        processes.barrier("workdir")
        say(
            f"training on {len(setup.dataset)} images, {setup.dataset.num_classes} classes, "
            f"{jax.device_count()} device(s)"
        )
        if setup.done:
            say(f"resuming at step {setup.done} of {self.config.num_steps}")
        self.checkpoints = Checkpoints(workdir, self.config.checkpoint.keep)
        if first:
            self.checkpoints.go_on_from(setup.done)
            self.checkpoints.forget_after(setup.done)
        self.leaf_names = names_of(setup.state.trainable)
        crop = self.config.data.crop
        costs = [(stage.end, float(np.prod(stage.crop) / np.prod(crop))) for stage in stages(self.config)]
        self.first_of_a_size = {setup.done + 1, *(end + 1 for end, _ in costs)}
        self.reporter = Reporter(workdir, setup.done, self.config.num_steps, active=first, costs=costs)
        self.reporter.hyperparameters(dict(fields(self.config)))
        self.select = Selection(self.config, workdir, self.checkpoints, self.reporter, setup.meta)
        self.pictures = Pictures(self.config, self.reporter, setup.meta, setup.dataset, setup.done)
        self.pending: list[tuple[int, dict]] = []  # steps whose metrics are still on the devices
        self.saved = setup.done
        self.full = False  # whether a full disk was reported for checkpoints
        self.state = replicate(setup.state)

    def train(self) -> None:
        """Trains until `num_steps`, or until a signal arrives."""
        done, config = self.setup.done, self.config
        if done and self.select.unfinished(done):
            self.evaluate(done, unreplicate(self.state))
        batches = train_batches(
            self.setup.dataset,
            config,
            first_step=done,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        # The next batch is copied to the devices while they work on this one.
        ahead = prefetch(batches, lambda batch: to_devices(batch, config.optimizer.accumulate), size=1)
        for step in range(done + 1, config.num_steps + 1):
            batch = next(ahead)
            if step in self.first_of_a_size:
                self.compile(batch)
            self.state, metrics = self.setup.step_fn(self.state, batch)
            self.pending.append((step, metrics))
            if step in self.first_of_a_size:
                jax.block_until_ready(metrics)
                self.reporter.restart_clock(step)  # the first step of a size compiles
            waiting = step % config.log.every == 0
            if waiting:
                self.settle()
            # All processes stop at the same step.
            stopping = processes.any_process(bool(self.stop.arrived), ask=waiting)
            if stopping or self.checkpoint_due(step):
                self.checkpoint(step, stopping)
        batches.close()
        skipped = int(unreplicate(self.state).skipped)
        if skipped:
            say(f"{skipped} steps were skipped for a non-finite gradient or update")
        if processes.any_process(bool(self.stop.arrived), ask=True):  # after the last step, or where none was left
            self.end()
        self.reporter.close()

    def compile(self, batch: dict) -> None:
        """Compiles the step for batches of this size, if there are several processes.

        All finish before any of them executes it: on a busy machine one may need much longer than another, whose
        devices would time out. The step itself then uses the compiled program.
        """
        if jax.process_count() > 1:
            self.setup.step_fn.lower(self.state, batch).compile()
            processes.barrier("compiled")

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is written after `step`, regardless of signals."""
        every = self.config.checkpoint.every
        return step == self.config.num_steps or bool(every and step % every == 0) or self.select.due(step)

    def checkpoint(self, step: int, stopping: bool) -> None:
        """Saves, ends if requested, and evaluates if due."""
        host_state = self.save(step)
        if stopping or processes.any_process(bool(self.stop.arrived), ask=True):
            self.end()
        if self.select.due(step):
            self.evaluate(step, host_state)
        if step < self.config.num_steps:
            self.reporter.restart_clock(step)

    def settle(self) -> None:
        """Fetches the metrics of the steps since the last time: the only place where the host waits for devices."""
        if self.pending:
            report(self.pending, self.leaf_names, self.setup.schedule, self.config, self.reporter, self.saved)
            self.pending.clear()

    def save(self, step: int) -> TrainState:
        """Writes the state and metrics after `step`; returns the state as host arrays."""
        self.settle()
        host_state = unreplicate(self.state)
        written = True
        if processes.is_first():
            self.pictures(step, host_state)
            try:
                self.checkpoints.save(step, flatten_state(host_state), self.setup.meta | {"step": step})
                self.full = False
            except CheckpointWriteError as e:
                if step >= self.config.num_steps or self.stop.arrived:
                    raise
                if not self.full:
                    say(f"warning: {e}; training continues, the newest checkpoint is that of step {self.saved}")
                written, self.full = False, True
        self.reporter.flush()
        if processes.from_first(written):
            self.saved = step
        return host_state

    def evaluate(self, step: int, host_state: TrainState) -> None:
        """Selects the best checkpoint, unless a signal came: then the next run does it, since the state is saved."""
        try:
            with at_once(self.stop, ""):
                self.select(step, host_state, saved=self.saved == step)
        except Terminated:
            self.end()

    def end(self) -> None:
        """Ends as requested by a signal, here or in another process, once the state is saved."""
        self.reporter.close()
        name = self.stop.name or "a signal to another process"
        say(f"{name}: saved step {self.saved} and stopping; the same command continues from there")
        processes.leave()
        raise Terminated(self.stop.arrived or 15)


def take_over(setup: Setup, workdir: Path, restart: bool) -> None:
    """Records that this run begins or continues.

    Raises:
      UserError: the workdir cannot be written, or has changed since the run was prepared.
    """
    if Checkpoints(workdir, read_only=True).present() != setup.present:
        raise UserError(f"{workdir}: another process wrote there meanwhile; run the command again")
    if restart:
        begin_again(workdir)
    record_start(
        workdir,
        setup.config,
        setup.done,
        data_fingerprint=setup.dataset.fingerprint,
        train_images=len(setup.dataset),
        class_names=setup.meta["class_names"],
    )


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
      NonFiniteError: one of them is not finite; names the steps, the parameters and the previous checkpoint.
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
                f"loss, gradient or updated state was not finite at step {step} (checked: {fetched[0][0]} to "
                f"{fetched[-1][0]}); affected parameters: {shown}; {kept}; lower config.optimizer.learning_rate or "
                "set clip_norm"
            )
    for step, metrics in fetched:
        values = {f"train/{k}": float(v) for k, v in metrics.items() if np.ndim(v) == 0 and k != "updated"}
        reporter.scalars(step, values | {"train/learning_rate": float(schedule(step - 1))})
    step, metrics = fetched[-1]
    mean = float(np.mean([m["loss"] for _, m in fetched]))
    reporter.line(step, {"loss": mean, "rate": float(schedule(step - 1))}, config.batch_size)
