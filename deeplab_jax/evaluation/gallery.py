"""The pictures of an evaluation: examples spread over the set, the best and the worst images, and two plots."""

import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deeplab_jax.data.dataset import Example
from deeplab_jax.imaging import files, overlay


@dataclass
class Candidate:
    """The data for a picture; `labels` has one [H, W] uint8 map per number of CRF iterations."""

    index: int
    score: float
    example: Example
    labels: Sequence[np.ndarray]


class Gallery:
    """Holds the few images whose pictures may be needed at the end, in any order of arrival.

    Images are ranked by their own mean IoU (over the classes that occur in them or are predicted) after the most CRF
    iterations: `counts`, and everything given for each of them, ascend. With several processes each holds its own
    candidates; the ranking is over all.
    """

    def __init__(self, out_dir: Path | None, split: str, palette, class_names, counts: Sequence[int], number: int):
        """`number` pictures of each kind are written to `out_dir/overlays`; nothing if `out_dir` is None."""
        self.out_dir, self.split = out_dir, split
        self.palette, self.class_names, self.counts = palette, class_names, counts
        self.number = number if out_dir else 0
        self._held: dict[int, Candidate] = {}
        self._lock = threading.Lock()

    def offer(self, index: int, size: int, example, labels: Sequence[np.ndarray], mean_iou: np.ndarray) -> None:
        """Considers image `index` of `size`."""
        if not self.number:
            return
        score = float(mean_iou[-1])
        with self._lock:
            self._held[index] = Candidate(index, score, example, labels)
            ranked = sorted((c for c in self._held.values() if not math.isnan(c.score)), key=_rank)
            keep = {c.index for c in ranked[: self.number] + ranked[-self.number :]} | self._samples(size)
            self._held = {i: c for i, c in self._held.items() if i in keep}

    def write(self, per_image: np.ndarray) -> list[dict]:
        """Writes the pictures that this process holds; returns a description of all of them.

        Args:
          per_image: [N, iterations] mean IoU of every image alone, over all processes; NaN if it has none.

        Returns:
          [{"kind": "sample", "best" or "worst", "index": int, "overlay": file, "photo": file, "truth": file,
          "labels": {"<iterations>": file}}], files relative to `out_dir`.
        """
        if not self.number:
            return []
        scores = per_image[:, -1]
        ranked = sorted(np.flatnonzero(~np.isnan(scores)).tolist(), key=lambda i: (scores[i], i))
        number = min(self.number, len(ranked))
        chosen = [("worst", i) for i in ranked[:number]] + [("best", i) for i in ranked[::-1][:number]]
        chosen += [("sample", i) for i in sorted(self._samples(len(scores)) & set(ranked))]
        place = {"worst": 0, "best": 0, "sample": 0}
        pictures = []
        for kind, index in chosen:
            place[kind] += 1
            pictures.append(self._write_one(f"{self.split}_{kind}{place[kind]}", kind, index))
        return pictures

    def remove_others(self, pictures: Sequence[dict]) -> None:
        """Removes the pictures that an earlier evaluation of the split, with more of them, left beside these."""
        if self.out_dir is None or not pictures:
            return
        new = {file for about in pictures for file in (about["overlay"], about["photo"], about["truth"])}
        new |= {file for about in pictures for file in about["labels"].values()}
        ours = re.compile(re.escape(self.split) + r"_(worst|best|sample)\d+(_(photo|truth|crf\d+))?\.png")
        for path in (self.out_dir / "overlays").rglob("*.png"):
            if ours.fullmatch(path.name) and path.relative_to(self.out_dir).as_posix() not in new:
                path.unlink(missing_ok=True)

    def write_plots(self, results: Sequence[dict], confusion: np.ndarray) -> None:
        """Writes the confusion matrix after the most CRF iterations, and the trimap curves.

        Args:
          results: as `evaluate` returns them.
          confusion: [iterations, C, C].
        """
        assert self.out_dir is not None, "there is no folder for plots"
        files.write_png(
            self.out_dir / f"{self.split}_confusion.png", overlay.confusion_picture(confusion[-1], self.class_names)
        )
        if results[0]["trimap"]:
            files.write_png(self.out_dir / f"{self.split}_trimap.png", overlay.trimap_plot(results))

    def _samples(self, size: int) -> set[int]:
        """Image numbers spread evenly over the set."""
        return set(np.linspace(0, size - 1, min(self.number, size)).round().astype(int).tolist())

    def _write_one(self, stem: str, kind: str, index: int) -> dict:
        assert self.out_dir is not None, "there is no folder for pictures"
        parts = Path("overlays") / "parts"
        about: dict[str, Any] = {
            "kind": kind,
            "index": index,
            "overlay": f"overlays/{stem}.png",
            "photo": str(parts / f"{stem}_photo.png"),
            "truth": str(parts / f"{stem}_truth.png"),
            "labels": {str(n): str(parts / f"{stem}_crf{n}.png") for n in self.counts},
        }
        held = self._held.get(index)
        if held is None:  # another process has it
            return about
        photo, truth = held.example.image, held.example.label
        assert truth is not None, "only images with a label are ranked"
        files.write_png(self.out_dir / about["photo"], photo)
        files.write_palette_png(self.out_dir / about["truth"], truth, self.palette)
        for n, labels in zip(self.counts, held.labels, strict=True):
            files.write_palette_png(self.out_dir / about["labels"][str(n)], labels, self.palette)
        shown = {n: labels for n, labels in zip(self.counts, held.labels, strict=True) if n in self._ends()}
        photo, truth, *maps = (_enlarged(a) for a in (photo, truth, *shown.values()))
        # Void parts of the truth were not measured; their colour marks them.
        panels = [photo, overlay.overlay(photo, truth, self.palette, self.class_names)]
        panels += [overlay.overlay(photo, s, self.palette, self.class_names, legend=False) for s in maps]
        titles = [f"photograph {_short(held.example.name)}", "truth"]
        titles += ["network" if n == 0 else f"network + CRF x{n}" for n in shown]
        panels.append(overlay.error_map(photo, maps[-1], truth))
        titles.append("errors")
        files.write_png(self.out_dir / about["overlay"], overlay.side_by_side(panels, titles))
        return about

    def _ends(self) -> set[int]:
        return {min(self.counts), max(self.counts)}


def _rank(candidate: Candidate) -> tuple[float, int]:
    return candidate.score, candidate.index


def _enlarged(array: np.ndarray) -> np.ndarray:
    """[H, W, ...] with every pixel repeated until the picture is wide enough to view."""
    times = max(1, 320 // array.shape[1])
    return array.repeat(times, axis=0).repeat(times, axis=1)


def _short(name: str) -> str:
    return re.sub(r"\s+", " ", name)[-40:]
