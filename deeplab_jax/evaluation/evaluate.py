"""Evaluation of a data set: one pass of the network, one of the CRF, every metric."""

import itertools
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from deeplab_jax.crf.filters import FILTERS
from deeplab_jax.data import reading
from deeplab_jax.data.dataset import Example
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.gallery import Gallery
from deeplab_jax.evaluation.submission import Submission, check_submission
from deeplab_jax.files import write_text
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.metrics import confusion as metrics
from deeplab_jax.metrics import trimap


@dataclass
class Measured:
    """One image's counts. `confusion` is [iterations, bands + 1, C, C] int64: a pixel is in its narrowest band."""

    index: int
    name: str
    confusion: np.ndarray | None
    size: tuple[int, int]

    @property
    def mean_iou(self) -> np.ndarray:
        """Mean IoU of this image alone for each number of iterations, [iterations]."""
        assert self.confusion is not None, "an image without a label has no counts"
        return np.array([metrics.mean_iou(c.sum(0)) for c in self.confusion])


def evaluate(
    segmenter: Segmenter,
    dataset,
    config,
    out_dir: str | Path | None = None,
    *,
    split: str | None = None,
    process_index: int = 0,
    process_count: int = 1,
    progress: bool = True,
) -> list[dict]:
    """Evaluates every image of a data set once, at its own size, without and with CRF.

    Args:
      segmenter: network and CRF.
      dataset: `len(ds)`, `ds[i]` with `image` [H, W, 3] uint8 RGB, `label` [H, W] uint8 (255 = void) or None, `name`;
        `ds.class_names`, `ds.palette`. Undecodable examples stop the evaluation or are left out (see `data.reading`).
      config: the run's config; `config.eval` is read.
      out_dir: gets `<split>.json`, `<split>_images.json`, pictures, and with `config.eval.submission` the archive for
        the test server; None = nothing is written.
      split: name for the files; default `config.eval.split`.
      process_index, process_count: each process handles every `process_count`-th image; counts are summed over all,
        every process returns the same results, and the first writes them.
      progress: shows a bar with rate and time left on stderr, and reports the path of the archive.

    Returns:
      One dict per number of CRF iterations in `config.eval.crf_iterations`, ascending: `crf_iterations`, `bilateral`
      (the filter used; several, depending on the images' sizes, separated by commas), `mean_iou` (over the classes that
      occur in truth or prediction), `pixel_accuracy`, `mean_accuracy`, `frequency_weighted_iou`, `per_class_iou` {name:
      fraction, None where the class does not occur}, `trimap` {width: {mean_iou, pixel_accuracy}}, `images`, and
      `skipped` if images were left out; fractions in 0..1. Empty if the split has no labels.

    Raises:
      UserError: there are no images, one cannot be decoded, or a label does not fit its image or the classes.
    """
    split = split or config.eval.split
    counts = tuple(sorted(set(config.eval.crf_iterations)))  # ascending: the last is the longest CRF, for all below
    if not counts or counts[0] < 0:
        raise UserError(
            f"config.eval.crf_iterations={tuple(config.eval.crf_iterations)}: needs numbers of at least 0 (0 = no CRF)"
        )
    widths = tuple(sorted(set(config.eval.trimap_widths)))
    if config.eval.trimap_source not in trimap.SOURCES:
        raise UserError(
            f"config.eval.trimap_source is '{config.eval.trimap_source}'; it must be one of {', '.join(trimap.SOURCES)}"
        )
    size = min(len(dataset), config.eval.limit or len(dataset))
    if not size:
        raise UserError(f"split '{split}' has no images to evaluate; choose another with --config.eval.split")
    out_dir = Path(out_dir) if out_dir else None
    gallery = Gallery(out_dir, split, segmenter.palette, segmenter.class_names, counts, config.eval.overlays)
    exporter = None
    if out_dir and config.eval.submission:
        check_submission(config.eval.submission, len(segmenter.class_names))
        exporter = Submission(out_dir / f"{split}_submission", config.eval.submission, split)

    indices = range(process_index, size, process_count)
    segmenter.plan(reading.known_sizes(dataset, range(size)))  # of all: every process pads an image equally
    total = np.zeros((len(counts), len(widths) + 1, len(segmenter.class_names), len(segmenter.class_names)), np.int64)
    per_image = np.full((size, len(counts)), np.nan)
    names = [""] * size
    filters = np.zeros(size, np.int8)  # each image's filter, as its index in FILTERS plus one
    labelled = 0

    def work(batch: list[tuple[int, Example]]) -> list[Measured]:
        predictions = segmenter.labels([e.image for _, e in batch], counts)
        found = []
        for (index, example), labels in zip(batch, predictions, strict=True):
            if exporter:
                exporter.add(example.name, labels[-1])
            counted = None
            if example.label is not None:
                counted = count(example, labels, len(segmenter.class_names), widths, config.eval.trimap_source)
            measured = Measured(index, example.name, counted, example.image.shape[:2])
            if counted is not None:
                gallery.offer(index, size, example, labels, measured.mean_iou)
            found.append(measured)
        return found

    bar = tqdm(total=len(indices), desc=f"evaluating {split}", unit="image", disable=not progress or process_index > 0)
    with bar:
        for measured in _in_threads(work, _batches(dataset, indices, segmenter), workers=1 + len(segmenter.devices)):
            for m in measured:
                names[m.index] = m.name
                filters[m.index] = _filter_used(segmenter, m.size) if counts[-1] else 0
                if m.confusion is not None:
                    labelled += 1
                    total += m.confusion
                    per_image[m.index] = m.mean_iou
                bar.update()

    if process_count > 1:
        total, labelled, per_image, names, filters = _over_processes(total, labelled, per_image, names, filters)
    skipped = [i for i, name in enumerate(names) if not name] if reading.skips(dataset) else []
    if len(skipped) == size:
        raise reading.all_corrupt(dataset)
    if exporter and process_index == 0:
        archive = exporter.close([name for name in names if name])
        if progress:
            print(f"for the test server: {archive}", file=sys.stderr, flush=True)
    for i in skipped:
        names[i] = reading.name_of(dataset, i)
    results = []
    if labelled:
        used = [",".join(b for k, b in enumerate(FILTERS, 1) if k in filters) if n else "none" for n in counts]
        results = [
            summarize(total[i], n, used[i], segmenter.class_names, widths, labelled, config.eval.trimap_source)
            | ({"skipped": len(skipped)} if skipped else {})
            for i, n in enumerate(counts)
        ]
    if out_dir and labelled:
        pictures = gallery.write(per_image)
        if process_index == 0:
            gallery.remove_others(pictures)
            write_results(out_dir, split, results, per_image, names, pictures)
            gallery.write_plots(results, total.sum(1))
    return results


def count(example, predictions: Sequence[np.ndarray], num_classes: int, widths: Sequence[int], source: str):
    """Counts one image: [len(predictions), len(widths) + 1, C, C] int64, a pixel in its narrowest trimap band.

    Raises:
      UserError: the label's size differs from the image's, or it holds an id outside the classes.
    """
    label = example.label
    if label.shape != example.image.shape[:2]:
        raise UserError(
            f"{example.name}: the label is {label.shape[1]}x{label.shape[0]} but the photograph is "
            f"{example.image.shape[1]}x{example.image.shape[0]}; they must have the same size"
        )
    bands = trimap.band(label, widths, source)
    try:
        return np.stack([metrics.confusion_matrix(label, p, num_classes, bands, len(widths) + 1) for p in predictions])
    except ValueError as e:
        raise UserError(f"{example.name}: {e}; correct the label or the class list") from e


def summarize(
    confusion: np.ndarray,
    iterations: int,
    bilateral: str,
    class_names: Sequence[str],
    widths: Sequence[int],
    images: int,
    source: str,
) -> dict:
    """One entry of the results from [bands + 1, C, C] counts; see `evaluate`."""
    whole = confusion.sum(0)
    nested = confusion.cumsum(0)
    return {
        "crf_iterations": iterations,
        "bilateral": bilateral,
        "mean_iou": _number(metrics.mean_iou(whole)),
        "pixel_accuracy": _number(metrics.pixel_accuracy(whole)),
        "mean_accuracy": _number(metrics.mean_accuracy(whole)),
        "frequency_weighted_iou": _number(metrics.frequency_weighted_iou(whole)),
        "per_class_iou": {name: _number(iou) for name, iou in zip(class_names, metrics.class_iou(whole), strict=True)},
        "trimap": {
            str(width): {
                "mean_iou": _number(metrics.mean_iou(nested[k])),
                "pixel_accuracy": _number(metrics.pixel_accuracy(nested[k])),
            }
            for k, width in enumerate(widths)
        },
        "trimap_source": source,
        "images": images,
    }


def write_results(out_dir: Path, split: str, results: list[dict], per_image, names, pictures: list[dict]) -> None:
    """Writes `<split>.json`, and `<split>_images.json`: mean IoU of each image alone, and its pictures.

    The mean IoU is null if an image has no label or was left out.
    """
    images = [
        {"name": name, "mean_iou": [_number(v) for v in row]}
        for name, row in zip(names, per_image.tolist(), strict=True)
    ]
    about = {
        "crf_iterations": [r["crf_iterations"] for r in results],
        "images": images,
        "pictures": pictures,
    }
    write_text(out_dir / f"{split}_images.json", json.dumps(about, indent=1) + "\n")
    write_text(out_dir / f"{split}.json", json.dumps(results, indent=1) + "\n")


def format_results(results: Sequence[dict]) -> str:
    """A table in plain text: metrics in percent, one column per number of CRF iterations, a few of many trimaps."""
    if not results:
        return "no labels, so nothing was measured"
    heads = ["CRF off" if not r["crf_iterations"] else f"CRF x{r['crf_iterations']}" for r in results]
    bands = trimap.shown(results[0]["trimap"])
    rows: list[tuple[str, list[float | None]] | None] = [
        ("mean IoU", [r["mean_iou"] for r in results]),
        ("pixel accuracy", [r["pixel_accuracy"] for r in results]),
        ("mean accuracy", [r["mean_accuracy"] for r in results]),
        ("frequency-weighted IoU", [r["frequency_weighted_iou"] for r in results]),
        None,
        *((f"IoU {name}", [r["per_class_iou"][name] for r in results]) for name in results[0]["per_class_iou"]),
        None,
        *(
            (f"trimap {width} px: {words}", [r["trimap"][width][key] for r in results])
            for key, words in (("mean_iou", "mean IoU"), ("pixel_accuracy", "pixel accuracy"))
            for width in bands
        ),
    ]
    first = max(len(row[0]) for row in rows if row)
    widths = [max(8, len(h)) for h in heads]
    skipped = f" ({results[0]['skipped']} skipped)" if results[0].get("skipped") else ""
    lines = [
        f"{results[0]['images']} images{skipped}, percent".ljust(first)
        + "".join(f"  {h:>{w}}" for h, w in zip(heads, widths))
    ]
    rule = "-" * len(lines[0])
    lines.append(rule)
    for row in rows:
        if row is None:
            lines.append(rule)
            continue
        cells = ["-" if v is None or math.isnan(v) else f"{100 * v:.2f}" for v in row[1]]
        lines.append(row[0].ljust(first) + "".join(f"  {c:>{w}}" for c, w in zip(cells, widths)))
    return "\n".join(lines)


def _batches(dataset, indices: Sequence[int], segmenter: Segmenter) -> Iterator[list[tuple[int, object]]]:
    """Groups examples of one padded shape, at most `batch_size` each; every readable index appears once."""
    waiting = defaultdict(list)
    for index in indices:
        example = reading.read(dataset, index)
        if example is None:
            continue
        shape = segmenter.padded_shape(example.image.shape[:2])
        waiting[shape].append((index, example))
        if len(waiting[shape]) == segmenter.batch_size:
            yield waiting.pop(shape)
    yield from waiting.values()


def _filter_used(segmenter: Segmenter, size: tuple[int, int]) -> int:
    """The CRF's filter for an image of (height, width), as its index in `FILTERS` plus one."""
    return 1 + list(FILTERS).index(segmenter.filter_used(size))


def _in_threads(work, items: Iterator, workers: int) -> Iterator:
    """Yields `work(item)` as they finish; at most `workers + 1` items are held, so memory stays bounded.

    Network, CRF and counting of different images overlap: the compiled programs and SciPy release the interpreter.
    """
    with ThreadPoolExecutor(workers) as pool:
        running: set[Future] = set()
        try:
            for item in itertools.chain(items, [None]):
                if item is not None:
                    running.add(pool.submit(work, item))
                while running and (item is None or len(running) > workers):
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield future.result()
        finally:
            for future in running:
                future.cancel()


def _over_processes(total: np.ndarray, labelled: int, per_image: np.ndarray, names: list[str], filters: np.ndarray):
    """Sums and joins the counts of all processes; each image was measured by exactly one."""
    from jax.experimental.multihost_utils import process_allgather

    def gather(array: np.ndarray) -> np.ndarray:
        # As bytes: JAX would turn 64-bit numbers into 32-bit ones.
        raw = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        every = np.asarray(process_allgather(raw))
        return np.stack([np.frombuffer(one.tobytes(), array.dtype).reshape(array.shape) for one in every])

    total = gather(total).sum(0)
    labelled = int(gather(np.array([labelled], np.int64)).sum())
    scores = gather(per_image)
    per_image = np.where(np.isnan(scores), -1, scores).max(0)
    per_image[per_image < 0] = np.nan
    longest = int(gather(np.array([max(len(n.encode()) for n in names)], np.int64)).max())
    text = gather(np.array([n.encode() for n in names], f"S{max(1, longest)}"))
    names = [max(column).decode(errors="replace") for column in text.T.tolist()]
    return total, labelled, per_image, names, gather(filters).max(0)


def _number(value: float) -> float | None:
    """None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)
