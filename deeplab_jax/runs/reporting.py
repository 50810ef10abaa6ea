"""Reporting during a run: metrics.jsonl is the record, TensorBoard (through clu) a view of it.

The only module that imports TensorFlow, through clu's metric writer and progress; if TensorFlow is not installed,
only the record is written, which is reported once.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.console import clock, say
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, reason, remove_leftovers, replace_together, set_aside, write_text
from deeplab_jax.runs import schema
from deeplab_jax.runs.record import inspect_record


class Reporter:
    """Writes scalars and pictures of one run; after a resume, entries after the checkpoint are removed.

    Args:
      workdir: the run's folder.
      first_step: the number of steps already done: 0, or the resumed checkpoint's.
      num_steps: steps of the whole run.
      active: false on all processes but the first: nothing is written.
      costs: (end, cost of a step before it) of each stage of the run, in the order of the steps; in any unit.

    Raises:
      UserError: the record cannot be written (only here; a disk that fills up later does not stop training).
    """

    def __init__(
        self,
        workdir: str | Path,
        first_step: int,
        num_steps: int,
        active: bool = True,
        costs: Sequence[tuple[int, float]] = (),
    ):
        self._active, self._costs = active, costs
        self._record = Path(workdir) / "metrics.jsonl"
        self._pictures = Path(workdir) / "pictures"
        self._writer, self._progress = None, None
        self._unwritten: list[bytes] = []  # rows not yet written (disk full)
        self._size = 0  # bytes of the record on disk
        self._full = False  # whether a full disk was reported
        self._start = (time.perf_counter(), first_step)
        self._num_steps = num_steps
        if not active:
            return
        rows = self._rows_until(first_step)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        try:
            write_text(self._record, text)
            remove_leftovers(self._pictures)
        except (OSError, UserError) as e:
            raise UserError(
                f"{self._record}: cannot be written ({reason(e.__cause__ or e)}); free disk space or give another "
                "--workdir"
            ) from e
        self._size = len(text.encode())
        try:
            self._open_tensorboard(Path(workdir) / "tensorboard", rows, first_step)
        except Exception as e:
            self._end_view(e)

    def _rows_until(self, first_step: int) -> list[dict]:
        """The rows of the finished steps; a damaged record is kept beside the new one."""
        found = inspect_record(self._record)
        if found.problem:
            kept = set_aside(self._record)
            say(
                f"warning: {self._record}: {found.problem}; its {len(found.rows)} readable rows are kept, and the "
                f"damaged file beside it as {kept.name}"
            )
        elif first_step and not self._record.exists():
            say(f"warning: {self._record}: is missing; the record begins again after step {first_step}")
        return [row for row in found.rows if row["step"] <= first_step]

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Records scalars of a step, e.g. {"train/loss": 0.7}."""
        if not self._active:
            return
        row = {"step": step} | {name: float(value) for name, value in values.items()}
        self._unwritten.append((json.dumps(row) + "\n").encode())
        self._write_rows()
        self._view(lambda w: w.write_scalars(step, {k: v for k, v in row.items() if k != "step"}))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Records a picture [H, W, 3] uint8, as PNG in `pictures/` and in TensorBoard; omitted if the disk is full."""
        if not self._active:
            return
        from PIL import Image

        path = self._pictures / f"{step:08d}_{name.replace('/', '_')}.png"
        try:
            self._pictures.mkdir(exist_ok=True)
            replace_together({path: lambda temporary: Image.fromarray(image).save(temporary, "PNG")})
        except OSError as e:
            self._say_full(path, e)
        self._view(lambda w: w.write_images(step, {name: image[None]}))

    def hyperparameters(self, values: dict) -> None:
        """Shows the config's fields on TensorBoard's hyperparameter page."""
        if self._writer:
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in values.items()}
            self._view(lambda w: w.write_hparams(plain))

    def line(self, step: int, values: dict[str, float], images_per_step: int) -> None:
        """Prints the progress line of a step: values, images per second, time left."""
        seconds, done = time.perf_counter() - self._start[0], step - self._start[1]
        if self._progress:
            self._view(lambda w: self._progress(step))
        if not self._active or done <= 0:
            return
        left = seconds / self._work(self._start[1], step) * self._work(step, self._num_steps)
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        rate = f"{done * images_per_step / seconds:.2f} images/s"
        say(f"step {step}/{self._num_steps}  {numbers}  {rate}  {clock(left)} left")

    def _work(self, start: int, end: int) -> float:
        """The cost of the steps after `start` up to `end`."""
        total, begin = 0.0, 0
        for stop, cost in self._costs or ((self._num_steps, 1.0),):
            total += cost * max(0, min(end, stop) - max(start, begin))
            begin = stop
        return total

    def restart_clock(self, step: int) -> None:
        """Restarts the rate after something other than training (compilation, evaluation)."""
        self._start = (time.perf_counter(), step)

    def flush(self) -> None:
        """Writes buffered data."""
        self._write_rows()
        self._view(lambda w: w.flush())

    def close(self) -> None:
        """Writes buffered data and closes the TensorBoard log."""
        self._write_rows()
        self._view(lambda w: w.close())
        self._writer = self._progress = None

    def _write_rows(self) -> None:
        """Appends the waiting rows; if the disk is full they wait longer, and training continues."""
        if not self._unwritten:
            return
        try:
            append(self._record, self._size, b"".join(self._unwritten))
        except OSError as e:
            self._say_full(self._record, e)
            return
        self._size += sum(map(len, self._unwritten))
        self._unwritten.clear()
        if self._full:
            say(f"{self._record}: could be written again")
        self._full = False

    def _say_full(self, path: Path, error: OSError) -> None:
        if not self._full:
            say(f"warning: {path}: cannot be written ({reason(error)}); metrics are kept in memory, training continues")
        self._full = True

    def _view(self, write: Callable[[Any], None]) -> None:
        """Writes to TensorBoard's log if there is one; stops after a failure, because the record is authoritative."""
        if not self._writer:
            return
        try:
            write(self._writer)
        except Exception as e:  # TensorFlow reports a full disk with exceptions of its own
            self._end_view(e)

    def _end_view(self, error: Exception) -> None:
        self._writer = self._progress = None
        say(f"warning: TensorBoard logs cannot be written ({reason(error)}); the next run writes them from the record")

    def _open_tensorboard(self, folder: Path, rows: list[dict], first_step: int) -> None:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
        try:
            from clu import metric_writers, periodic_actions
        except ImportError as e:
            say(f"TensorBoard logs are not written ({e.name} is not installed); metrics go to {self._record}")
            return
        # An event file cannot be shortened, so the view is rewritten from the record.
        shutil.rmtree(folder, ignore_errors=True)
        writer = self._writer = metric_writers.SummaryWriter(str(folder))
        for row in rows:
            writer.write_scalars(row["step"], {k: v for k, v in row.items() if k != "step"})
        for path, step, name in self._kept_pictures(first_step):
            _show_picture(self._writer, step, name, path)
        self._progress = periodic_actions.ReportProgress(
            num_train_steps=self._num_steps, writer=self._writer, every_steps=None, every_secs=30.0
        )

    def _kept_pictures(self, first_step: int) -> Iterator[tuple[Path, int, str]]:
        """(path, step, name) of the pictures of finished steps; those of later steps are deleted."""
        for path in sorted(self._pictures.glob("*.png")):
            step, _, name = path.stem.partition("_")
            if not step.isdecimal() or not name:
                continue  # not written by this package
            if int(step) <= first_step:
                yield path, int(step), name
            else:
                path.unlink()


def show_evaluation(workdir: str | Path, step: int, split: str, results: list[dict]) -> None:
    """Adds an evaluation to the workdir's TensorBoard log; without TensorFlow, nothing happens.

    Args:
      workdir: the run's folder, with the evaluation's `eval/`.
      step: of the evaluated checkpoint.
      split: its name; scalars are `<split>/crf<n>/...`, pictures `<split>/...`.
      results: as `evaluation.evaluate.evaluate` returns them.
    """
    from deeplab_jax.metrics.trimap import shown

    writer = _tensorboard_writer(Path(workdir) / "tensorboard")
    if writer is None:
        return
    for result in results:
        values = {name: result[name] for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}
        values |= {f"iou/{name}": value for name, value in result["per_class_iou"].items()}
        values |= {f"trimap{width}/mean_iou": result["trimap"][width]["mean_iou"] for width in shown(result["trimap"])}
        prefix = f"{split}/crf{result['crf_iterations']}"
        writer.write_scalars(step, {f"{prefix}/{n}": float(v) for n, v in values.items() if v is not None})
    folder = Path(workdir) / "eval"
    try:
        written = schema.pictures(read_json(folder / f"{split}_images.json"))["pictures"]
    except (OSError, ValueError):
        written = []  # a split's pictures are known by this list only: another split's name may begin as this one's
    paths = [folder / f"{split}_confusion.png", folder / f"{split}_trimap.png"]
    paths += [folder / "overlays" / Path(str(entry.get("overlay"))).name for entry in written]
    for path in sorted(path for path in paths if path.is_file()):
        name = f"{split}/{path.stem.removeprefix(split + '_')}"
        _show_picture(writer, step, name, path)
    writer.flush()
    writer.close()


def _show_picture(writer, step: int, name: str, path: Path) -> None:
    """Adds a PNG to a TensorBoard log; one that cannot be read is reported and left out."""
    from deeplab_jax.imaging.files import read_photograph

    try:
        image = read_photograph(path)
    except UserError as e:
        say(f"warning: {e}; the log omits this picture")
        return
    writer.write_images(step, {name: image[None]})


def _tensorboard_writer(folder: Path):
    """clu's writer of TensorBoard logs, or None if TensorFlow is not installed."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        from clu import metric_writers
    except ImportError:
        return None
    return metric_writers.SummaryWriter(str(folder))


def append(path: Path, size: int, data: bytes) -> None:
    """Appends to a file after its first `size` bytes; cuts off what an earlier attempt on a full disk left."""
    with path.open("ab") as file:
        if file.tell() > size:
            file.truncate(size)
        file.write(data)
