"""Many photographs through a segmenter: read, segmented and written at the same time; existing results are skipped."""

import contextlib
import itertools
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deeplab_jax.console import Meter, shown
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging import files, listing
from deeplab_jax.imaging.overlay import overlay
from deeplab_jax.inference import video
from deeplab_jax.limits import REFUSE_ABOVE
from deeplab_jax.runs.job import Job, Report, absence, digest

_PROBS = "probs"  # in the note of a label map that was written with its probabilities
_LOOKED_AT = 1000  # photographs whose sizes are read before the first is segmented


@dataclass(frozen=True)
class PredictOptions:
    """Options of `predict`.

    Attributes:
      out: the folder for results.
      iterations: of the CRF; 0 = off, None = the model's.
      probabilities: also writes `_probs.npy`, [H, W, C] float16.
      overwrite: recomputes existing results.
      refuse_above: photographs of more pixels are refused.
      verbose: also reports the number of programs used.
    """

    out: Path
    iterations: int | None = None
    probabilities: bool = False
    overwrite: bool = False
    refuse_above: int = REFUSE_ABOVE
    verbose: bool = False


@dataclass(frozen=True)
class Task:
    """One photograph or video: its source, the stem of its results, and the digest of all that determines them."""

    source: listing.Input
    stem: Path
    digest: str

    @property
    def result(self) -> Path:
        return Path(f"{self.stem}.{'mp4' if self.source.is_video else 'png'}")

    def outputs(self, probabilities: bool) -> list[Path]:
        """Every file that is written; the first one is written last and marks completion."""
        if self.source.is_video:
            return [self.result]
        return [self.result, Path(f"{self.stem}_overlay.png"), *[Path(f"{self.stem}_probs.npy")] * probabilities]

    @property
    def words(self) -> list[str]:
        """What the result in place says of itself: the digest, and what was written with it."""
        note = video.read_note if self.source.is_video else files.read_note
        return (note(self.result) or "").split()

    def is_done(self, probabilities: bool) -> bool:
        """Whether the results exist and were made from this same file by this model with these settings."""
        words = self.words
        same = words[:1] == [self.digest] and (self.source.is_video or not probabilities or _PROBS in words)
        return same and all(map(os.path.isfile, self.outputs(probabilities)))


def plan(paths: Sequence[str | Path], segment, options: PredictOptions, complain=None) -> list[Task]:
    """Lists the tasks, in order, named so that no two results collide.

    Args:
      complain: called with a sentence for each path that cannot be read; see `listing.find_inputs`.

    Raises:
      UserError: there is nothing to do, or a result would overwrite a photograph.
    """
    same = next((path for path in paths if Path(path).is_dir() and Path(path).resolve() == options.out.resolve()), None)
    if same is not None:
        raise UserError(f"--out={options.out}: is the folder of the photographs, where results would be mistaken for "
                        "photographs; choose another")  # fmt: skip
    inputs = listing.find_inputs(paths, exclude=options.out, complain=complain)
    made_by = [segment.identity, options.iterations]
    tasks = []
    for item, stem in zip(inputs, listing.result_stems(inputs)):
        try:
            stat = item.path.stat()
            of_file = [stat.st_size, stat.st_mtime_ns]
        except OSError:  # it has disappeared, which is reported when it is read
            of_file = []
        tasks.append(Task(item, options.out / stem, digest([str(item.path.resolve()), *of_file, *made_by])))
    outputs = [path for task in tasks for path in task.outputs(options.probabilities)]
    listing.check_outputs(outputs, [item.path for item in inputs])
    if not options.overwrite:
        files.refuse_foreign(task.result for task in tasks if not (task.source.is_video and task.words))
    return tasks


def predict(segment, paths: Sequence[str | Path], options: PredictOptions, say=print, job: Job | None = None) -> int:
    """Segments photographs, folders and videos; a bad file is reported on stderr and the rest are processed.

    Each of several processes handles its share of the list; names and padded shapes follow from the whole list, so that
    the results equal those of one process.

    Args:
      segment: the result of `deeplab_jax.load`.
      paths: files and folders.
      say: called with a line for each result.
      job: the processes that share the work.

    Returns:
      The number of files and folders that failed or were left undone by any process; the same in every process.
    """
    job = job or Job()
    unreadable: list[str] = []
    tasks = plan(paths, segment, options, complain=unreadable.append)
    for sentence in unreadable if job.is_first else ():
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    mine = job.share(tasks)
    todo = mine if options.overwrite else [t for t in mine if not t.is_done(options.probabilities)]
    if len(todo) < len(mine):
        say(f"{len(mine) - len(todo)} of {len(mine)} are done and skipped (--overwrite recomputes them)")
    if todo:
        segment.plan(_known_sizes(tasks, options))
    meter = Meter(len(todo), every=0)
    failed = 0
    with closing(_outcomes(segment, todo, options, say)) as outcomes:
        for task, outcome in outcomes:
            if isinstance(outcome, UserError):
                failed += 1
                line = f"{shown(task.source.path)}: failed"
                print(f"error: {shown(str(outcome))}", file=sys.stderr, flush=True)
            else:
                line = f"{shown(task.result)}{outcome}"
            meter.tick()
            say(f"[{meter.done}/{meter.total}{f', {meter.left}' if meter.done < meter.total else ''}] {line}")
    if options.verbose and segment.programs:
        say(f"programs: {', '.join(f'{number} {kind}' for kind, number in segment.programs.items())}")

    def sum_up(reports: list[Report]) -> int:
        bad = len(unreadable)
        for report in reports:
            if report.found is not None and report.found["plan"] == listed:
                bad += report.found["failed"]
                continue
            share = job.share_of(report.index, tasks)
            left = [task.source.path for task in share if not task.is_done(options.probabilities)]
            bad += len(left)
            print(f"error: {shown(absence(report, len(share), left))}", file=sys.stderr, flush=True)
        everything = len(tasks) + len(unreadable)
        if job.count > 1:
            say(f"{everything - bad} of {everything} files are done, by {job.count} processes")
        if bad:
            words = "failed" if job.count == 1 else "failed or are missing"
            print(f"error: {bad} of {everything} files {words}", file=sys.stderr, flush=True)
        return bad

    listed = digest([[str(task.stem) for task in tasks], segment.identity, options.iterations])
    return job.conclude({"failed": failed, "plan": listed}, sum_up)


def _known_sizes(tasks: Sequence[Task], options: PredictOptions) -> list[tuple[int, int]]:
    """Sizes (H, W) of the photographs, from their headers; unreadable ones are reported later."""
    sizes: list[tuple[int, int]] = []
    for task in tasks:
        if not task.source.is_video and len(sizes) < _LOOKED_AT:
            with contextlib.suppress(UserError):
                sizes.append(files.size_of(task.source.path))
    return [size for size in sizes if 0 < size[0] * size[1] <= options.refuse_above]


def _outcomes(segment, tasks: Sequence[Task], options: PredictOptions, say) -> Generator[tuple[Task, str | UserError]]:
    """Yields each task, in order, with a remark or an error.

    Reading, computing and writing have threads of their own, so that network and CRF never wait for a disk. A bounded
    number of photographs is in progress, and a large one goes through the network by itself.
    """
    size = segment.batch_size
    hands = max(2, segment.workers)
    with (
        ThreadPoolExecutor(hands) as readers,
        ThreadPoolExecutor(segment.workers) as workers,
        ThreadPoolExecutor(hands) as writers,
    ):
        remaining = iter(tasks)
        stopped = threading.Event()
        reading = deque(_read(readers, task, options) for task in itertools.islice(remaining, size + 2 * hands))
        writing: deque[tuple[Task, Future]] = deque()
        try:
            while reading or writing:
                batch = [reading.popleft() for _ in range(min(size, len(reading)))]
                reading.extend(_read(readers, task, options) for task in itertools.islice(remaining, len(batch)))
                if batch:
                    computed = workers.submit(_compute, segment, batch, options, say, stopped.is_set)
                    for i, (task, _) in enumerate(batch):
                        writing.append((task, writers.submit(_write, computed, i, task, segment)))
                # One more batch than there are workers is in progress; the results of the oldest are awaited.
                while len(writing) > segment.workers * size or (writing and not reading):
                    task, future = writing.popleft()
                    yield task, future.result()
        finally:
            stopped.set()  # an interrupt does not wait for the end of a video


def _read(readers: ThreadPoolExecutor, task: Task, options: PredictOptions) -> tuple[Task, Future | None]:
    if task.source.is_video:
        return task, None
    return task, readers.submit(
        files.read_photograph,
        task.source.path,
        refuse_above=options.refuse_above,
        remark=lambda line: print(shown(line), flush=True),
    )


def _compute(
    segment, batch: list[tuple[Task, Future | None]], options: PredictOptions, say, stopped: Callable[[], bool]
) -> list:
    """Segments a batch: for each task (image, labels, marginals or None), a UserError, or None for a video."""
    results: list = []
    for task, future in batch:
        try:
            results.append(
                future.result()
                if future
                else video.segment_video(
                    segment, task.source.path, task.result, task.digest, options.iterations, say, stopped
                )
            )
        except UserError as e:
            results.append(e)
    photographs = [i for i, r in enumerate(results) if isinstance(r, np.ndarray)]

    def segmented(chosen: list[int]) -> None:
        try:
            found = segment.many([results[i] for i in chosen], options.iterations, marginals=options.probabilities)
        except UserError as e:
            if len(chosen) > 1:  # which of them was refused is not known
                for i in chosen:
                    segmented([i])
            else:
                results[chosen[0]] = UserError(f"{batch[chosen[0]][0].source.path}: {e}")
            return
        for i, (labels, marginals) in zip(chosen, found):
            results[i] = results[i], labels, marginals

    if photographs:
        segmented(photographs)
    return results


def _write(computed: Future, i: int, task: Task, segment) -> str | UserError:
    """Writes the results of one task; the label map is written last and marks completion."""
    result = computed.result()[i]
    if isinstance(result, UserError | str):
        return result
    image, labels, marginals = result
    note = task.digest if marginals is None else f"{task.digest} {_PROBS}"
    try:
        files.write_png(f"{task.stem}_overlay.png", overlay(image, labels, segment.palette, segment.class_names))
        if marginals is None and _PROBS in task.words:
            Path(f"{task.stem}_probs.npy").unlink(missing_ok=True)  # they are of the label map that is replaced
        if marginals is not None:
            half = marginals.astype(np.float16, copy=False)
            write_atomically(f"{task.stem}_probs.npy", lambda path: np.save(path, half))
        files.write_palette_png(task.result, labels, segment.palette, note=note)
    except UserError as e:
        return e
    return segment.remark(labels.shape)
