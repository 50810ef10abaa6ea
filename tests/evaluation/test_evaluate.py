import itertools
import json
import math
import re
import socket
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, Setting
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation import evaluate as module
from deeplab_jax.evaluation.evaluate import evaluate, format_results
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.metrics import trimap
from tests.evaluation.fakes import PALETTE, ColorNetwork, Example, Memory, config, network_variables, scene

NAMES = ("sky", "tree", "road", "car")
SIZES = ((40, 50), (65, 33), (70, 40), (40, 50), (64, 60))


def segmenter(**options) -> Segmenter:
    return Segmenter(
        ColorNetwork(), network_variables(), Setting(CRFParams(), bilateral="separable"), NAMES, PALETTE, **options
    )


@pytest.fixture(scope="module")
def dataset() -> Memory:
    return Memory([scene(size, seed) for seed, size in enumerate(SIZES)])


def slow_results(segment: Segmenter, dataset: Memory, width: int | None = None) -> tuple[float, float, list]:
    """Mean IoU, pixel accuracy and class IoU of the network alone, from pixel sets over the whole data set."""
    hits, unions, right, valid = np.zeros(4), np.zeros(4), 0, 0
    for example in dataset.examples:
        prediction = segment.scores([example.image])[0].argmax(-1)
        inside = example.label != 255
        if width:
            inside &= trimap.trimap(example.label, width)
        right += np.sum((prediction == example.label) & inside)
        valid += inside.sum()
        for c in range(4):
            hits[c] += np.sum((prediction == c) & (example.label == c) & inside)
            unions[c] += np.sum(((prediction == c) | (example.label == c)) & inside)
    iou = [h / u if u else None for h, u in zip(hits, unions, strict=True)]
    return float(np.mean([v for v in iou if v is not None])), right / valid, iou


def test_results_equal_the_slow_computation(dataset):
    segment = segmenter()
    (found,) = evaluate(segment, dataset, config(), progress=False)
    mean, accuracy, iou = slow_results(segment, dataset)
    assert found["mean_iou"] == pytest.approx(mean)
    assert found["pixel_accuracy"] == pytest.approx(accuracy)
    assert found["per_class_iou"] == pytest.approx(dict(zip(NAMES, iou, strict=True)))
    assert found["images"] == len(SIZES) and found["crf_iterations"] == 0
    for width in (1, 3):
        mean, accuracy, _ = slow_results(segment, dataset, width)
        assert found["trimap"][str(width)] == pytest.approx({"mean_iou": mean, "pixel_accuracy": accuracy})


def test_every_image_counts_once_whatever_batches_and_processes(dataset):
    (expected,) = evaluate(segmenter(), dataset, config(), progress=False)
    dataset.reads.clear()
    (batched,) = evaluate(segmenter(batch_size=2), dataset, config(), progress=False)
    assert sorted(dataset.reads) == list(range(len(SIZES)))
    assert batched["images"] == expected["images"]
    assert batched["mean_iou"] == pytest.approx(expected["mean_iou"], abs=1e-3)


def test_processes_take_separate_images_and_their_counts_add_up(dataset, monkeypatch):
    (expected,) = evaluate(segmenter(), dataset, config(), progress=False)
    collected = []
    monkeypatch.setattr(module, "_over_processes", lambda *counts: collected.append(counts) or counts)
    dataset.reads.clear()
    for rank in range(2):
        evaluate(segmenter(), dataset, config(), process_index=rank, process_count=2, progress=False)
    assert sorted(dataset.reads) == list(range(len(SIZES)))
    total = sum(c[0] for c in collected)
    assert sum(c[1] for c in collected) == len(SIZES)
    joined = module.summarize(total[0], 0, "none", NAMES, (1, 3), len(SIZES), "boundary")
    assert joined == expected


def test_two_queues_share_the_images(dataset):
    devices = jax.local_devices()[:1]  # one device twice: the sharing is the same as over two
    (expected,) = evaluate(segmenter(), dataset, config(), progress=False)
    (found,) = evaluate(segmenter(devices=devices * 2), dataset, config(), progress=False)
    assert found == expected


def test_files_are_written(tmp_path):
    settings = config(crf_iterations=(0, 1), overlays=2, trimap_widths=(2,))
    alike = Memory([scene((30, 32), seed) for seed in range(5)])  # one size: its programs are compiled once
    results = evaluate(segmenter(), alike, settings, tmp_path, split="mine", progress=False)
    assert json.loads((tmp_path / "mine.json").read_text()) == results
    assert [r["bilateral"] for r in results] == ["none", "separable"]
    about = json.loads((tmp_path / "mine_images.json").read_text())
    assert [i["name"] for i in about["images"]] == [f"scene_{i}" for i in range(5)]
    scores = [i["mean_iou"][-1] for i in about["images"]]
    kinds = {kind: [p["index"] for p in about["pictures"] if p["kind"] == kind] for kind in ("worst", "best", "sample")}
    order = np.argsort(scores).tolist()
    assert kinds == {"worst": order[:2], "best": order[::-1][:2], "sample": [0, 4]}
    for picture in about["pictures"]:
        for file in (picture["overlay"], picture["photo"], picture["truth"], *picture["labels"].values()):
            assert (tmp_path / file).is_file()
    assert (tmp_path / "mine_confusion.png").is_file() and (tmp_path / "mine_trimap.png").is_file()
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(".")]
    other = tmp_path / "overlays" / "mine_too_best2.png"  # of another split
    other.write_bytes(b"")
    settings.eval.overlays = 1  # pictures of an earlier evaluation, with more of them, do not stay
    evaluate(segmenter(), alike, settings, tmp_path, split="mine", progress=False)
    overlays = {p.name for p in (tmp_path / "overlays").glob("*.png")}
    assert overlays == {"mine_best1.png", "mine_worst1.png", "mine_sample1.png", other.name}
    assert len(list((tmp_path / "overlays" / "parts").glob("*.png"))) == 3 * 4


def test_limit_takes_the_first_images(dataset):
    (found,) = evaluate(segmenter(), dataset, config(limit=2), progress=False)
    (expected,) = evaluate(segmenter(), Memory(dataset.examples[:2]), config(), progress=False)
    assert found == expected and found["images"] == 2


def test_unlabelled_images_only_make_a_submission(tmp_path):
    from tests.evaluation.submission_reader import read_submission

    examples = [Example(scene((40, 50), i).image, None, f"2008_00000{i}") for i in range(3)]
    settings = config(submission="voc")
    assert evaluate(segmenter(), Memory(examples), settings, tmp_path, split="test", progress=False) == []
    found = read_submission(tmp_path / "test_submission.tgz", "voc")
    assert sorted(found) == ["2008_000000", "2008_000001", "2008_000002"]
    assert found["2008_000000"].shape == (40, 50)
    assert format_results([]).startswith("no labels")


def test_mistakes_are_named(dataset):
    with pytest.raises(UserError, match="trimap_source is 'edge'"):
        evaluate(segmenter(), dataset, config(trimap_source="edge"), progress=False)
    with pytest.raises(UserError, match="split 'val' has no images"):
        evaluate(segmenter(), Memory([]), config(), progress=False)
    wrong = scene((40, 50))
    with pytest.raises(UserError, match="bad: the label is 40x40 but the photograph is 50x40"):
        evaluate(segmenter(), Memory([Example(wrong.image, wrong.label[:, :40], "bad")]), config(), progress=False)
    with pytest.raises(UserError, match="bad: the label holds class id 9, but there are 4"):
        label = np.full((40, 50), 9, np.uint8)
        evaluate(segmenter(), Memory([Example(wrong.image, label, "bad")]), config(), progress=False)


def test_a_class_that_occurs_nowhere_is_null():
    example = Example(np.zeros((40, 50, 3), np.uint8), np.full((40, 50), 255, np.uint8), "void")
    settings = config(trimap_widths=())
    (found,) = evaluate(segmenter(), Memory([example]), settings, progress=False)
    assert set(found["per_class_iou"].values()) == {None}
    json.dumps(found, allow_nan=False)


def test_table_has_a_column_for_each_iteration_count():
    entry = {
        "crf_iterations": 0,
        "mean_iou": 0.5,
        "pixel_accuracy": 0.75,
        "mean_accuracy": 0.6,
        "frequency_weighted_iou": 0.55,
        "per_class_iou": {"sky": 0.5, "car": None},
        "trimap": {"3": {"mean_iou": 0.25, "pixel_accuracy": 0.3}},
        "images": 2,
    }
    table = format_results([entry, entry | {"crf_iterations": 10, "mean_iou": 0.625}])
    lines = {cells[0]: cells[1:] for cells in (re.split(r"\s{2,}", line) for line in table.splitlines())}
    assert lines["mean IoU"] == ["50.00", "62.50"]
    assert lines["IoU car"] == ["-", "-"]
    assert lines["trimap 3 px: mean IoU"] == ["25.00", "25.00"]
    assert "CRF off" in table and "CRF x10" in table
    assert len({len(line) for line in table.splitlines()}) == 1


def test_work_in_threads_is_bounded_and_fails_loudly():
    taken = itertools.count()
    items = (next(taken) for _ in range(100))
    results = module._in_threads(lambda i: i, items, workers=2)
    next(results)
    assert next(taken) <= 5
    results.close()

    def fail(_):
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        list(module._in_threads(fail, iter(range(3)), workers=2))


@pytest.mark.long
def test_counts_of_two_real_processes_add_up(tmp_path):
    """Also counts beyond 32 bits, which JAX alone would cut."""
    script = textwrap.dedent("""
        import sys, jax, numpy as np
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        rank = int(sys.argv[1])
        jax.distributed.initialize(sys.argv[2], 2, rank)
        from deeplab_jax.evaluation.evaluate import _over_processes
        mine = np.full((2, 1), np.nan); mine[rank] = 0.25 + rank
        names = ["one", ""] if rank == 0 else ["", "two"]
        mine_filters = np.array([2, 0] if rank == 0 else [0, 1], np.int8)
        total, images, scores, names, filters = _over_processes(
            np.full((1, 1, 2, 2), 2**33 + rank), 1, mine, names, mine_filters)
        assert filters.tolist() == [2, 1]
        assert (total == 2**34 + 1).all() and total.dtype == np.int64, total
        assert images == 2 and scores.ravel().tolist() == [0.25, 1.25] and names == ["one", "two"]
    """)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-c", script]
    pair = [subprocess.Popen([*command, str(r), address], stderr=subprocess.PIPE, text=True) for r in range(2)]
    try:
        outcomes = [(p.communicate(timeout=240)[1], p.returncode) for p in pair]
    finally:
        for process in pair:
            process.kill()
    assert [code for _, code in outcomes] == [0, 0], outcomes


def test_not_a_number_becomes_null():
    assert module._number(math.nan) is None and module._number(0.5) == 0.5


class Stepped(Segmenter):
    """Predicts class 1 without CRF and, after n iterations, class 2 or 3 (for 10); nothing is computed."""

    def labels(self, images, iterations):
        classes = {0: 1, 1: 2, 10: 3}
        return [[np.full(image.shape[:2], classes[n], np.uint8) for n in iterations] for image in images]


def stepped() -> Stepped:
    return Stepped(ColorNetwork(), network_variables(), Setting(CRFParams(), bilateral="separable"), NAMES, PALETTE)


def halves() -> Memory:
    """Three images of which a quarter, a half and three quarters are class 1; the rest is class 3."""
    examples = []
    for i in range(3):
        label = np.full((40, 48), 3, np.uint8)
        label[:, : 12 * (i + 1)] = 1
        examples.append(Example(np.zeros((40, 48, 3), np.uint8), label, f"2008_00000{i}"))
    return Memory(examples)


def test_the_order_of_the_counts_does_not_matter(tmp_path, capsys):
    """The most CRF iterations rank the images and are sent to the test server."""
    from tests.evaluation.submission_reader import read_submission

    found = {}
    for name, counts in (("up", (0, 10)), ("down", (10, 0, 10))):
        settings = config(crf_iterations=counts, overlays=1, submission="voc")
        results = evaluate(stepped(), halves(), settings, tmp_path / name, split="val", process_index=0)
        found[name] = results, (tmp_path / name / "val_images.json").read_text()
        confusion = (tmp_path / name / "val_confusion.png").read_bytes()
        found[name] += (confusion,)
        archive = tmp_path / name / "val_submission.tgz"
        assert all((labels == 3).all() for labels in read_submission(archive, "voc", "val").values())
        assert f"for the test server: {archive}" in capsys.readouterr().err
    assert found["up"] == found["down"]
    assert [r["crf_iterations"] for r in found["down"][0]] == [0, 10]
    about = json.loads(found["down"][1])
    assert about["crf_iterations"] == [0, 10]
    ranked = {p["kind"]: p["index"] for p in about["pictures"] if p["kind"] in ("best", "worst")}
    assert ranked == {"best": 0, "worst": 2}  # by the CRF's class 3; by the network's class 1 it would be the reverse


def test_no_or_negative_counts_are_refused(dataset):
    for counts in ((), (-1, 10)):
        with pytest.raises(UserError, match=r"config.eval.crf_iterations=.*needs numbers of at least 0"):
            evaluate(stepped(), dataset, config(crf_iterations=counts), progress=False)


def test_the_filter_that_auto_chose_is_recorded(monkeypatch):
    """Exact for small images and the lattice for large ones; both, with a comma, where a set has both."""
    from deeplab_jax.crf import kernels
    from deeplab_jax.inference import segmenter as inference

    used = []

    def mean_field(unary, image, params, *, bilateral, **options):
        used.append(bilateral)
        return jax.nn.softmax(-unary)

    monkeypatch.setattr(inference.crf, "mean_field", mean_field)
    monkeypatch.setitem(kernels.EXACT_UP_TO, "cpu", 65 * 65)
    small, large = scene((40, 50)), scene((70, 50))  # padded to 65 x 65 and 97 x 65
    for examples, recorded in (
        ([small], "exact"), ([large, large], "permutohedral"), ([small, large], "permutohedral,exact"),
    ):  # fmt: skip
        used.clear()
        auto = Segmenter(ColorNetwork(), network_variables(), Setting(CRFParams()), NAMES, PALETTE)
        results = evaluate(auto, Memory(examples), config(crf_iterations=(0, 1)), progress=False)
        assert [r["bilateral"] for r in results] == ["none", recorded]
        assert set(used) == set(recorded.split(","))


def test_the_table_shows_a_few_of_many_trimaps(dataset):
    results = evaluate(stepped(), dataset, config(trimap_widths=tuple(range(1, 41))), progress=False)
    assert list(results[0]["trimap"]) == [str(w) for w in range(1, 41)]
    shown = [line.split()[1] for line in format_results(results).splitlines() if line.startswith("trimap")]
    assert shown == ["1", "2", "3", "5", "10", "20", "40"] * 2
    # A band holds all narrower ones: of the widest, as many pixels are right as the definition counts.
    widest = results[0]["trimap"]["40"]["pixel_accuracy"]
    inside = [trimap.trimap(e.label, 40) for e in dataset.examples]
    right = sum(np.sum((e.label == 1) & i) for e, i in zip(dataset.examples, inside, strict=True))
    assert widest == pytest.approx(right / sum(map(np.sum, inside)))


def test_the_report_calls_counts_what_they_are(tmp_path):
    """Off only if the fewest iterations are 0."""
    from deeplab_jax.pages.report import build_report

    (tmp_path / "config.json").write_text("{}")
    for counts, fewest, most, before in (((10, 1), "×1", "×10", "0.0"), ((10, 0), "off", "on", "12.5")):
        evaluate(stepped(), halves(), config(crf_iterations=counts, overlays=1), tmp_path / "eval", progress=False)
        page = build_report(tmp_path)
        assert f"CRF {fewest} to the left of the line, {most} to the right" in page
        # The best image is a quarter class 1, the rest class 3: IoU 0, 0, 0 after one; 1/4, 0 without; 0, 3/4 after 10.
        assert f"<span>{fewest} {before}</span><span>{most} 37.5</span>" in page
