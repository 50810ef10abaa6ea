"""Choosing the best checkpoint of a run, on a separate split."""

from pathlib import Path

from deeplab_jax.console import say
from deeplab_jax.evaluation import workdir as evaluation
from deeplab_jax.runs import processes
from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.record import read_record
from deeplab_jax.runs.reporting import Reporter
from deeplab_jax.training.state import TrainState


class Selection:
    """Chooses the best checkpoint on `config.eval.select_split`, never on the split for which results are reported."""

    def __init__(self, config, workdir: Path, checkpoints: Checkpoints, reporter: Reporter, meta: dict):
        self._config, self._workdir, self._checkpoints = config, workdir, checkpoints
        self._reporter, self._meta = reporter, meta

    def due(self, step: int) -> bool:
        """Whether to evaluate the checkpoint of `step`."""
        every = self._config.eval.every
        return bool(every and self._config.eval.select_split and (step % every == 0 or step == self._config.num_steps))

    def unfinished(self, step: int) -> bool:
        """Whether the checkpoint of `step`, the newest, has yet to be evaluated; all processes agree.

        The best mark is restored from the record: a kill may have occurred between a row and its mark.
        """
        rows = read_record(self._workdir / "metrics.jsonl") if processes.is_first() else []
        recorded = {row["step"]: row["select/mean_iou"] for row in rows if "select/mean_iou" in row}
        for earlier in sorted({*recorded} & {*self._checkpoints.steps()}):
            self._checkpoints.mark_best(earlier, recorded[earlier])
        return bool(processes.from_first(self.due(step) and step not in recorded))

    def __call__(self, step: int, state: TrainState, saved: bool = True) -> None:
        """Evaluates the state after `step`, given as host arrays, and records its mean IoU.

        It can become the best one only if it is `saved` as a checkpoint, for which the disk may have been too full.
        """
        results = evaluation.evaluate_split(
            self._config, state.variables(), self._meta, self._config.eval.select_split, None, crf_iterations=(0,)
        )
        if not results or results[0]["mean_iou"] is None:
            say(f"step {step}: no pixel of '{self._config.eval.select_split}' that could be compared has a label")
            return
        result = results[0]
        classes = {f"select/iou/{n}": iou for n, iou in result["per_class_iou"].items() if iou is not None}
        self._reporter.scalars(step, {"select/mean_iou": result["mean_iou"]} | classes)
        best = saved and self._checkpoints.mark_best(step, result["mean_iou"])
        say(
            f"step {step}: {100 * result['mean_iou']:.2f} % mean IoU on {result['images']} images of "
            f"'{self._config.eval.select_split}'{', the best so far' if best else ''}"
        )
