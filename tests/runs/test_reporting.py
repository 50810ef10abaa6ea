"""Logs read back as TensorBoard reads them."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from deeplab_jax.config import fields
from deeplab_jax.data import open_dataset, reading
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.workdir import evaluate_workdir
from deeplab_jax.imaging import files
from deeplab_jax.imaging.overlay import confusion_picture
from deeplab_jax.runs import reporting
from deeplab_jax.runs.checkpoints import Checkpoints
from deeplab_jax.runs.record import read_record
from deeplab_jax.runs.reporting import Reporter, show_evaluation
from deeplab_jax.training import loop
from deeplab_jax.training.observation import Pictures, crf_scalars
from tests.training.conftest import END_TO_END

RESULTS = [
    {
        "crf_iterations": n,
        "mean_iou": 0.5 + n / 100,
        "pixel_accuracy": 0.7,
        "mean_accuracy": 0.6,
        "per_class_iou": {"sky": 0.25 + n / 100, "road": None},
        "trimap": {"3": {"mean_iou": 0.3, "pixel_accuracy": 0.4}},
    }
    for n in (0, 5)
]

FIELDS = {
    "batch_size": 4,
    "model.backbone": "resnet_small",
    "data.crop": (33, 33),
    "data.mirror": True,
    "optimizer.learning_rate": 0.05,
}
CONFUSION = np.eye(2), ("sky", "road")


def opened(folder):
    """TensorBoard's own reader of a log."""
    pytest.importorskip("clu.metric_writers", reason="clu or TensorFlow is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    return events


def read_back(folder):
    """(scalars, images) of a log: {tag: [(step, value)]}."""
    events = opened(folder)
    from tensorboard.util.tensor_util import make_ndarray

    scalars, images = {}, {}
    for tag in events.Tags()["tensors"]:
        found = [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)]
        if found[0][1].shape == ():
            scalars[tag] = [(step, float(value)) for step, value in found]
        elif len(found[0][1]) > 2:  # width, height, then the pictures
            images[tag] = [(step, np.asarray(Image.open(io.BytesIO(value[2])))) for step, value in found]
    return scalars, images


def read_hyperparameters(folder):
    """The contents of TensorBoard's hyperparameter page for a log: {name: value}, numbers as floats."""
    events = opened(folder)
    from tensorboard.plugins.hparams import metadata

    about = events.SummaryMetadata(metadata.SESSION_START_INFO_TAG)
    found = metadata.parse_session_start_info_plugin_data(about.plugin_data.content).hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in found.items()}


@pytest.fixture(scope="module")
def workdir(tensorboard, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    reporter = Reporter(folder, 0, 30)
    reporter.hyperparameters(FIELDS | {"batch_size": 2})
    for step in range(1, 5):
        reporter.scalars(step, {"train/loss": 1 / step, "crf/gaussian_weight": 3 - step / 10, "select/iou/sky": 0.5})
    reporter.picture(4, "train", np.full((8, 10, 3), 99, np.uint8))
    reporter.close()
    reporter = Reporter(folder, 3, 30)  # continues from step 3: step 4 and its picture are removed
    reporter.hyperparameters(FIELDS)
    reporter.scalars(4, {"train/loss": 7.0})
    reporter.picture(4, "train", np.full((8, 10, 3), 33, np.uint8))
    reporter.close()
    (folder / "eval").mkdir()
    files.write_png(folder / "eval" / "val_confusion.png", confusion_picture(*CONFUSION))
    for other in ("val_best1", "val_worst7", "val_aug_best1"):  # only the first is this evaluation's
        files.write_png(folder / "eval" / "overlays" / f"{other}.png", np.full((6, 30, 3), 7, np.uint8))
    about = {"kind": "best", "index": 0, "overlay": "overlays/val_best1.png", "photo": "p", "truth": "t",
             "labels": {"0": "l"}}  # fmt: skip
    (folder / "eval" / "val_images.json").write_text(
        json.dumps({"images": [], "crf_iterations": [0], "pictures": [about]})
    )
    show_evaluation(folder, 30, "val", RESULTS)
    return folder


def test_log_has_scalars_of_the_record(workdir):
    scalars, _ = read_back(workdir / "tensorboard")
    assert [step for step, _ in scalars["train/loss"]] == [1, 2, 3, 4]
    np.testing.assert_allclose([v for _, v in scalars["train/loss"]], [1, 1 / 2, 1 / 3, 7])
    np.testing.assert_allclose(scalars["crf/gaussian_weight"], [(1, 2.9), (2, 2.8), (3, 2.7)], rtol=1e-6)
    assert scalars["select/iou/sky"] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    assert [r["train/loss"] for r in read_record(workdir / "metrics.jsonl")] == [1, 1 / 2, 1 / 3, 7]


def test_log_has_evaluations_by_class_and_width(workdir):
    scalars, _ = read_back(workdir / "tensorboard")
    for n in (0, 5):
        np.testing.assert_allclose(scalars[f"val/crf{n}/mean_iou"], [(30, 0.5 + n / 100)], rtol=1e-6)
        np.testing.assert_allclose(scalars[f"val/crf{n}/iou/sky"], [(30, 0.25 + n / 100)], rtol=1e-6)
        np.testing.assert_allclose(scalars[f"val/crf{n}/trimap3/mean_iou"], [(30, 0.3)], rtol=1e-6)
    assert not [tag for tag in scalars if "road" in tag]


def test_log_has_the_hyperparameters_of_the_last_run(workdir):
    assert read_hyperparameters(workdir / "tensorboard") == FIELDS | {"data.crop": "(33, 33)"}


def test_time_left_knows_that_the_first_steps_are_cheaper(tmp_path, capsys, monkeypatch):
    now = iter([0.0, 10.0, 60.0])
    monkeypatch.setattr(reporting, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    reporter = Reporter(tmp_path, 0, 100, costs=[(60, 0.5), (100, 1.0)])
    reporter._progress = None  # clu's has a clock of its own
    reporter.line(20, {}, 6)  # half a second a step: 40 more of those and 40 of a second
    reporter.line(80, {}, 6)  # 60 half steps and 20 full steps in 60 s: 1.2 s per full step, of which 20 are left
    reporter.close()
    assert [line.split("  ")[-1] for line in capsys.readouterr().err.splitlines()] == ["1:00 left", "0:24 left"]


def test_log_has_pictures(workdir):
    _, images = read_back(workdir / "tensorboard")
    expected = {
        "train": (4, np.full((8, 10, 3), 33)),
        "val/confusion": (30, confusion_picture(*CONFUSION)),
        "val/best1": (30, np.full((6, 30, 3), 7)),
    }
    assert images.keys() == expected.keys()
    for tag, (step, picture) in expected.items():
        ((found, image),) = images[tag]
        assert found == step
        np.testing.assert_array_equal(image, picture)


@pytest.mark.long
def test_log_of_a_real_run(tensorboard, runs, tmp_path):
    pytest.importorskip("clu.metric_writers", reason="clu or TensorFlow is not installed")
    steps = (
        END_TO_END,
        "num_steps=4",
        "checkpoint.every=2",
        "log.images_every=2",
        "eval.every=4",
        "eval.crf_iterations=0,2",
    )
    config = runs.config(*steps, "eval.limit=2", "eval.overlays=1", "crf.learn=weights,compatibility,stds")
    loop.train(config, tmp_path)
    evaluate_workdir(config, tmp_path)
    scalars, images = read_back(tmp_path / "tensorboard")

    plain = {name: v if isinstance(v, int | float | str) else str(v) for name, v in fields(config)}
    assert read_hyperparameters(tmp_path / "tensorboard") == plain

    results = json.loads((tmp_path / "eval" / "val.json").read_text())
    assert [r["crf_iterations"] for r in results] == [0, 2]
    for result in results:
        for name, iou in result["per_class_iou"].items():
            tag = f"val/crf{result['crf_iterations']}/iou/{name}"
            np.testing.assert_allclose(scalars.get(tag, []), [(4, iou)] if iou is not None else [], rtol=1e-6)

    learned = {step: Checkpoints(tmp_path).restore(step)[0] for step in (2, 4)}
    for name in ("gaussian_weight", "bilateral_weight", "gaussian_xy_std", "bilateral_xy_std", "bilateral_rgb_std"):
        log = "log_" * name.endswith("std")
        values = {step: np.float64(flat[f"trainable.crf.{log}{name}"]) for step, flat in learned.items()}
        expected = [(step, np.exp(v) if log else v) for step, v in values.items()]
        np.testing.assert_allclose(scalars[f"crf/{name}"], expected, rtol=1e-6)
        assert expected[0][1] != expected[1][1]

    assert [step for step, _ in images["train"]] == [2, 4]
    _, example = next(reading.readable(open_dataset(config.data, config.data.train_split, seed=config.seed)))
    height, width = example.image.shape[:2]
    for step, picture in images["train"]:  # photo, truth, network, network + CRF, error map, with 6 pixels between
        kept = tmp_path / "pictures" / f"{step:08d}_train.png"
        np.testing.assert_array_equal(picture, np.asarray(Image.open(kept)))
        assert picture.shape[1] == 5 * width + 6 * 6
        np.testing.assert_array_equal(picture[-height - 6 : -6, 6 : 6 + width], example.image)
    for tag, file in {"confusion": "val_confusion.png", "best1": "overlays/val_best1.png"}.items():
        ((step, picture),) = images[f"val/{tag}"]
        assert step == 4
        np.testing.assert_array_equal(picture, np.asarray(Image.open(tmp_path / "eval" / file)))


class Recorder:
    def __init__(self):
        self.pictures, self.values = [], {}

    def picture(self, step, name, image):
        self.pictures.append((step, image.shape))

    def scalars(self, step, values):
        self.values[step] = values


def test_pictures_are_due_by_steps(monkeypatch):
    recorder = Recorder()
    settings = ConfigDict({"log": {"images_every": 10}, "checkpoint": {"every": 5}, "num_steps": 41})
    pictures = Pictures(settings, recorder, {}, None, done=12)
    monkeypatch.setattr(pictures, "_picture", lambda state: np.zeros((2, 3, 3), np.uint8))
    state = SimpleNamespace(trainable={"crf": {"gaussian_weight": np.float32(2)}})
    for step in (15, 19, 20, 25, 34, 41):
        pictures(step, state)
    assert [step for step, _ in recorder.pictures] == [20, 34, 41]
    assert sorted(recorder.values) == [15, 20, 25, 41]
    assert recorder.values[15] == {"crf/gaussian_weight": 2.0}


def test_crf_scalars_are_widths_and_means():
    found = crf_scalars({"log_bilateral_xy_std": np.log(50.0), "bilateral_weight": np.array([1.0, 3.0])})
    assert found == pytest.approx({"crf/bilateral_xy_std": 50.0, "crf/bilateral_weight": 2.0})


def test_rows_wait_for_a_full_disk(tmp_path, monkeypatch, capfd):
    """Half a row reaches the disk before it is full; when there is room again, all rows are there, once."""
    reporter = Reporter(tmp_path, 0, 30)
    reporter.scalars(1, {"train/loss": 1.0})
    room = reporting.append

    def full(path, size, data):
        room(path, size, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "append", full)
    for step in (2, 3, 4):
        reporter.scalars(step, {"train/loss": 1 / step})
    assert {"step": 1, "train/loss": 1.0} in read_record(tmp_path / "metrics.jsonl")
    monkeypatch.undo()
    reporter.flush()
    reporter.scalars(5, {"train/loss": 0.2})
    reporter.close()
    assert read_record(tmp_path / "metrics.jsonl") == [{"step": n, "train/loss": 1 / n} for n in range(1, 6)]
    err = capfd.readouterr().err
    assert err.count("metrics.jsonl: cannot be written (no space left on device)") == 1
    assert err.count("could be written again") == 1


def test_a_record_that_cannot_be_written_at_the_start_is_refused(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, "write_text", full)
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(no space left on device\); free disk"):
        Reporter(tmp_path, 0, 30)


def test_training_goes_on_without_tensorboard(tmp_path, capfd):
    class Full:
        def write_scalars(self, step, values):
            raise RuntimeError("events.out: No space left on device")

    reporter = Reporter(tmp_path, 0, 30)
    reporter._writer = Full()
    for step in (1, 2):
        reporter.scalars(step, {"train/loss": 1.0})
    reporter.close()
    assert [r["step"] for r in read_record(tmp_path / "metrics.jsonl")] == [1, 2]
    assert capfd.readouterr().err.count("TensorBoard logs cannot be written (no space left") == 1


def test_a_picture_that_cannot_be_read_is_left_out_of_the_log(tensorboard, tmp_path, capfd):
    pytest.importorskip("clu.metric_writers", reason="clu or TensorFlow is not installed")
    (tmp_path / "pictures").mkdir()
    for name in ("00000002_train.png", "note.png", "x_train.png"):
        (tmp_path / "pictures" / name).write_bytes(b"\x89PNG half")
    reporter = Reporter(tmp_path, 5, 30)
    assert reporter._writer is not None  # the log continues
    reporter.close()
    assert capfd.readouterr().err.count("the log omits this picture") == 1
