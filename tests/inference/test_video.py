"""Videos of many containers and rates, and damaged ones."""

import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import imageio_ffmpeg
import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.inference import video
from deeplab_jax.inference.photographs import PredictOptions, predict
from tests.toy_workdir import NAMES, photograph

# ffmpeg is started by a fork that executes it at once.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called:RuntimeWarning")
SIZE = (48, 64)
DAMAGED = "cannot be decoded to its end, as it is damaged or incomplete; replace it, or convert it with ffmpeg"
MPEG4 = {"codec": "mpeg4", "quality": 9}
THEORA = {"codec": "libtheora"}
VP9 = {"codec": "libvpx-vp9"}
EARLY_HEADER = {"output_params": ["-movflags", "+faststart"]}
VARIABLE = {"output_params": ["-vf", "setpts=N*N/30/TB", "-fps_mode", "vfr", "-bf", "0"]}  # frame n at n * n / 30 s


def write(path: Path, count: int = 30, fps: float = 10, **options) -> bytes:
    """Writes a video of `count` frames, and returns the file's bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"fps": fps, "macro_block_size": 1, "ffmpeg_log_level": "error"} | options
    writer = imageio_ffmpeg.write_frames(str(path), SIZE[::-1], **options)
    writer.send(None)
    for n in range(count):
        writer.send(np.roll(photograph(SIZE), n, axis=1))
    writer.close()
    return path.read_bytes()


def cut(whole: bytes) -> bytes:
    return whole[: len(whole) * 6 // 10]


def zeroed(whole: bytes) -> bytes:
    half, quarter = len(whole) // 2, len(whole) // 4
    return whole[:half] + bytes(quarter) + whole[half + quarter :]


@pytest.fixture(scope="module")
def model() -> SimpleNamespace:
    """A model that finds the first class everywhere."""
    return SimpleNamespace(
        many=lambda images, *_, **__: [(np.zeros(image.shape[:2], np.uint8), None) for image in images],
        batch_size=4, workers=1, identity=["toy"], class_names=NAMES, palette=voc_palette(),
        remark=lambda size: "", plan=lambda sizes: None, programs={},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "options", "count", "fps", "rate"),
    [
        ("v.mp4", EARLY_HEADER, 30, 10, 10),
        ("v.mov", {}, 30, 29.97, 29.97),
        ("v.mkv", {}, 30, 1000, 1000),  # ffmpeg says "1k fps"
        ("v.mkv", {"output_params": ["-live", "1"]}, 30, 10, 10),  # neither duration nor number of frames
        ("v.webm", VP9, 12, 10, 10),
        ("v.avi", {}, 30, 0.5, 0.5),
        ("v.mpg", {"codec": "mpeg2video"}, 30, 25, 25),
        ("v.wmv", {}, 30, 10, 10),
        ("v.ogv", THEORA, 30, 12, 12),  # ffmpeg says no frame rate
        ("v.mp4", {"output_params": ["-metadata", "title=[x] partial file, 5 fps"]}, 2, 10, 10),
    ],
)
def test_whole_videos(tmp_path, name, options, count, fps, rate):
    write(tmp_path / name, count, fps, **options)
    found_rate, size, expected, frames = video.open_video(tmp_path / name)
    assert (found_rate, size, expected) == (rate, SIZE[::-1], count)
    assert len(list(frames)) == count


@pytest.mark.parametrize("name", ["v.mp4", "v.mkv"])
def test_a_rate_that_varies_keeps_the_time(tmp_path, name):
    write(tmp_path / name, 10, **VARIABLE)
    rate, _, expected, frames = video.open_video(tmp_path / name)
    assert rate == 10
    assert len(list(frames)) == expected
    assert 2.7 <= expected / rate <= 3.4  # the last of ten frames is at 2.7 seconds


KINDS = {"v.mp4": EARLY_HEADER, "v.mkv": {}, "v.webm": VP9, "v.avi": MPEG4, "v.ogv": THEORA}
CASES = [*itertools.product(KINDS, [cut, zeroed])]
CASES.remove(("v.ogv", cut))  # it does not say how long it is


@pytest.mark.parametrize(("name", "damage"), CASES)
def test_a_damaged_video_is_an_error_and_leaves_nothing(model, tmp_path, capsys, name, damage):
    source = tmp_path / "in" / name
    source.write_bytes(damage(write(source, **KINDS[name])))
    assert predict(model, [source], PredictOptions(tmp_path / "out"), say=str) == 1
    sentence, count = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"error: {source}: {DAMAGED}")
    assert count == "error: 1 of 1 files failed"
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != source]


def test_a_decoder_that_stops_early_is_an_error(tmp_path, monkeypatch):
    write(tmp_path / "v.mp4")
    read = imageio_ffmpeg.read_frames
    monkeypatch.setattr(imageio_ffmpeg, "read_frames", lambda *a, **k: itertools.islice(read(*a, **k), 21))
    _, _, expected, frames = video.open_video(tmp_path / "v.mp4")
    assert expected == 30 and len(list(itertools.islice(frames, 20))) == 20
    with pytest.raises(UserError, match=DAMAGED):
        next(frames)


def test_progress_and_rate_without_a_rate_in_the_header(model, tmp_path):
    write(tmp_path / "v.ogv", 30, 12, **THEORA)
    lines = []
    assert predict(model, [tmp_path / "v.ogv"], PredictOptions(tmp_path / "out"), say=lines.append) == 0
    checking, progress, done = lines
    assert checking == f"{tmp_path / 'v.ogv'}: checking that it is whole"
    assert re.fullmatch(r".*v\.ogv: frame 25 of 30, [\d.]+ frames/s, .* left", progress)
    assert done.endswith("v.mp4  (30 frames)")
    rate, size, count, _ = video.open_video(tmp_path / "out/v.mp4")
    assert (rate, size, count) == (12, SIZE[::-1], 30)


def test_video_in_and_out(segment, tmp_path):
    frames = [photograph((48, 64), n) for n in range(3)]
    writer = imageio_ffmpeg.write_frames(str(tmp_path / "v.avi"), (64, 48), fps=5, quality=9, macro_block_size=1)
    writer.send(None)
    for frame in frames:
        writer.send(frame)
    writer.close()
    assert predict(segment, [tmp_path / "v.avi"], PredictOptions(tmp_path / "out"), say=str) == 0
    rate, size, _, found = video.open_video(tmp_path / "out/v.mp4")
    found = list(found)
    assert rate == 5 and size == (64, 48) and len(found) == 3
    assert np.abs(found[0].astype(int) - frames[0]).mean() > 5  # painted over
    lines = []
    assert predict(segment, [tmp_path / "v.avi"], PredictOptions(tmp_path / "out"), say=lines.append) == 0
    assert len(lines) == 1 and "skipped" in lines[0]


def test_pixels_that_are_not_square_and_a_name_like_a_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"fps": 5, "macro_block_size": 1, "ffmpeg_log_level": "error", "output_params": ["-vf", "setsar=3/2"]}
    writer = imageio_ffmpeg.write_frames("file:concat:a.mp4", (64, 48), **options)
    writer.send(None)
    for level in (0, 120):
        writer.send(np.full((48, 64, 3), level, np.uint8))
    writer.close()
    _, size, _, frames = video.open_video(Path("concat:a.mp4"))
    assert size == (96, 48) and [frame.shape for frame in frames] == [(48, 96, 3)] * 2


def test_what_is_no_video_is_a_sentence(segment, tmp_path, capsys):
    (tmp_path / "v.mp4").write_bytes(b"nothing to see")
    assert predict(segment, [tmp_path / "v.mp4"], PredictOptions(tmp_path / "out"), say=str) == 1
    assert "v.mp4: cannot be decoded as a video" in capsys.readouterr().err
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["v.mp4"]
