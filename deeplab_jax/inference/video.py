"""Reading and writing videos with imageio-ffmpeg's ffmpeg: every frame is segmented by itself."""

import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from deeplab_jax.console import Meter
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging.overlay import overlay

_NOTE = "deeplab_jax "
_SAID_EVERY = 25  # frames
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns if pixels are made square
# ffmpeg is started by a fork that executes it at once: the deadlock that JAX warns of cannot happen.
warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
_SQUARE = ["-vf", "scale=round(iw*sar):ih,setsar=1"]  # keeps the picture's shape if pixels are not square


def segment_video(segment, source: Path, result: Path, note: str, iterations: int | None = None, say=None) -> str:
    """Writes the overlay of each frame as an H.264 `.mp4` of the source's size and frame rate, without sound.

    Args:
      segment: the result of `deeplab_jax.load`.
      source: any video that ffmpeg reads.
      result: the `.mp4`; an odd width or height grows by one pixel, as H.264 requires.
      note: stored in the file; see `read_note`.
      iterations: of the CRF; None = the model's.
      say: called with a line of progress every few frames.

    Returns:
      A remark: the number of frames.

    Raises:
      UserError: `source` is not a video, or `result` cannot be written.
    """
    rate, size, expected, frames = open_video(source)
    meter = Meter(expected)

    def write(path: Path) -> None:
        writer = imageio_ffmpeg.write_frames(
            _file(path),
            size,
            fps=rate,
            quality=7,
            macro_block_size=1,
            ffmpeg_log_level="error",
            output_params=["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-metadata", f"comment={_NOTE}{note}"],
        )
        writer.send(None)
        try:
            for batch in _batches(frames, segment.batch_size):
                for frame, (labels, _) in zip(batch, segment.many(batch, iterations)):
                    writer.send(np.ascontiguousarray(overlay(frame, labels, segment.palette, segment.class_names)))
                    meter.tick()
                    if say and meter.done % _SAID_EVERY == 0:
                        say(
                            f"{source}: frame {meter.done} of {expected}, {meter.per_second:.1f} frames/s, {meter.left}"
                        )
        finally:
            writer.close()

    write_atomically(result, write)
    return f"  ({meter.done} frames)"


def open_video(path: Path) -> tuple[float, tuple[int, int], int, Iterator[np.ndarray]]:
    """Opens a video: frames per second, (width, height), approximate number of frames, uint8 [H, W, 3] RGB frames.

    Pixels that are not square are made square: the frames have the shape that a player shows.

    Raises:
      UserError: ffmpeg cannot read it.
    """
    # A playlist within the file can only open files.
    only_files = ["-protocol_whitelist", "file"]
    reader = imageio_ffmpeg.read_frames(_file(path), pix_fmt="rgb24", input_params=only_files, output_params=_SQUARE)
    try:
        meta = next(reader)
        width, height = meta["size"]
        first = next(reader)
    except (OSError, RuntimeError, StopIteration, KeyError, IndexError, ValueError) as e:
        raise UserError(f"{path}: cannot be decoded as a video; replace or remove it") from e

    def frames() -> Iterator[np.ndarray]:
        try:
            for data in itertools.chain([first], reader):
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
        except (OSError, RuntimeError, ValueError) as e:
            raise UserError(f"{path}: cannot be decoded to its end; replace or remove it") from e

    frame_count = round(meta.get("duration", 0) * meta["fps"])
    return meta["fps"], (width, height), frame_count, frames()


def _file(path: Path) -> str:
    """A path in the form that ffmpeg treats as a file: plain `concat:a.mp4` would name a protocol."""
    return f"file:{path}"


def read_note(path: Path) -> str | None:
    """The note that `segment_video` left in a file, or None."""
    try:
        with path.open("rb") as file:
            file.seek(max(os.fstat(file.fileno()).st_size - 1_000_000, 0))  # mp4 stores it at the end
            tail = file.read()
    except OSError:
        return None
    at = tail.rfind(_NOTE.encode())
    return tail[at + len(_NOTE) :][:32].decode("ascii", "replace") if at >= 0 else None


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
