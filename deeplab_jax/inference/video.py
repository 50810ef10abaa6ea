"""Reading and writing videos with imageio-ffmpeg's ffmpeg: every frame is segmented by itself."""

import itertools
import logging
import os
import re
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import numpy as np

from deeplab_jax.console import Meter, shown
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_atomically
from deeplab_jax.imaging.overlay import overlay

_NOTE = "deeplab_jax "
_SAID_EVERY = 25  # frames
logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns if pixels are made square
# ffmpeg is started by a fork that executes it at once: the deadlock that JAX warns of cannot happen.
warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
# A playlist within the file can only open files.
_ONLY_FILES = ["-protocol_whitelist", "file"]
# What ffmpeg's readers of mp4, mkv and webm, ogv and avi say of files cut short or overwritten, but go on with.
_DAMAGE = re.compile(
    r"^\[.*(partial file|ended prematurely|invalid as first byte of an EBML|CRC mismatch|wrong during header parsing)",
    re.M,
)
_RATE = re.compile(r"^Output #0.*?^ +Stream #0:0[^\n]* ([\d.]+)(k?) fps", re.M | re.S)
_SLOWEST = 0.01  # frames a second: the writer's have two decimals
_SQUARE = ["-vf", "scale=round(iw*sar):ih,setsar=1"]  # keeps the picture's shape if pixels are not square


def segment_video(
    segment,
    source: Path,
    result: Path,
    note: str,
    iterations: int | None = None,
    say=None,
    stopped: Callable[[], bool] = lambda: False,
) -> str:
    """Writes the overlay of each frame as an H.264 `.mp4` of the source's size and frame rate, without sound.

    Args:
      segment: the result of `deeplab_jax.load`.
      source: any video that ffmpeg reads.
      result: the `.mp4`; an odd width or height grows by one pixel, as H.264 requires.
      note: stored in the file; see `read_note`.
      iterations: of the CRF; None = the model's.
      say: called with a line of progress every few frames.
      stopped: asked before each batch of frames.

    Returns:
      A remark: the number of frames.

    Raises:
      UserError: `source` is not a video, is damaged or too slow, `result` cannot be written, or it was stopped.
    """
    if say:
        say(f"{shown(source)}: checking that it is whole")
    rate, size, expected, frames = open_video(source)
    if rate < _SLOWEST:
        raise UserError(f"{source}: has {rate:g} frames a second, which the writer cannot store; segment its frames as "
                        "photographs")  # fmt: skip
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
                if stopped():
                    raise UserError(f"{source}: was interrupted")
                for frame, (labels, _) in zip(batch, segment.many(batch, iterations)):
                    writer.send(np.ascontiguousarray(overlay(frame, labels, segment.palette, segment.class_names)))
                    meter.tick()
                    if say and meter.done % _SAID_EVERY == 0:
                        rate_now = f"{meter.per_second:.1f} frames/s"
                        say(f"{shown(source)}: frame {meter.done} of {expected}, {rate_now}, {meter.left}")
        finally:
            writer.close()

    write_atomically(result, write)
    return f"  ({meter.done} frames)"


def open_video(path: Path) -> tuple[float, tuple[int, int], int, Iterator[np.ndarray]]:
    """Opens a video: frames per second, (width, height), number of frames, and the frames: uint8 [H, W, 3] RGB.

    The whole video is decoded once before the first frame, which finds damage early and gives the number of frames.
    Pixels that are not square are made square: the frames have the shape that a player shows. If the frame rate varies,
    frames are repeated so that it does not.

    Raises:
      UserError: ffmpeg cannot read it, or cannot read it to its end.
    """
    rate, frame_count = _examine(path)
    reader = imageio_ffmpeg.read_frames(_file(path), pix_fmt="rgb24", input_params=_ONLY_FILES, output_params=_SQUARE)
    try:
        width, height = next(reader)["size"]
        first = next(reader)
    except (OSError, RuntimeError, StopIteration, KeyError, IndexError, ValueError) as e:
        raise _not_a_video(path) from e

    def frames() -> Iterator[np.ndarray]:
        number = 0
        try:
            for data in itertools.chain([first], reader):
                yield np.frombuffer(data, np.uint8).reshape(height, width, 3)
                number += 1
        except (OSError, RuntimeError, ValueError) as e:
            raise _damaged(path) from e
        if number < frame_count:
            raise _damaged(path)

    return rate, (width, height), frame_count, frames()


def _examine(path: Path) -> tuple[float, int]:
    """Decodes a whole video as `read_frames` does; returns frames per second and the number of frames.

    They are those of ffmpeg's output: the input's header may lack both, or have the average of a rate that varies.
    """
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostats", "-xerror", *_ONLY_FILES, "-i", _file(path)]
    command += ["-an", "-sn", "-dn", "-vcodec", "rawvideo", "-f", "image2pipe", "-progress", "pipe:1"]
    command += ["-y", os.devnull]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    counts = re.findall(r"^frame=(\d+)$", done.stdout, re.M)  # a report every half second, and one at the end
    rate = _RATE.search(done.stderr)
    if not re.search(r"^ +Stream #0:.* Video: ", done.stderr, re.M):
        raise _not_a_video(path)
    if done.returncode or _DAMAGE.search(done.stderr):
        raise _damaged(path)
    if not rate or not counts or not int(counts[-1]):
        raise _not_a_video(path)
    return float(rate[1]) * (1000 if rate[2] else 1), int(counts[-1])


def _not_a_video(path: Path) -> UserError:
    return UserError(f"{path}: cannot be decoded as a video; replace or remove it")


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: cannot be decoded to its end, as it is damaged or incomplete; replace it, or convert it with ffmpeg "
        "to keep what is left"
    )


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
