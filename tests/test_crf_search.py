"""`crf_search`: coarse to fine, resumable, lattices shared, results that other commands accept."""

import copy
import shutil
import threading
import types

import jax
import numpy as np
import pytest
from PIL import Image

import deeplab_jax.data
from deeplab_jax import crf
from deeplab_jax.config import load_config
from deeplab_jax.crf.params import WEIGHT_FIELDS
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.runs.job import Job
from deeplab_jax.search import grid
from deeplab_jax.search.grid import Candidate
from deeplab_jax.search.learning import learn_weights
from deeplab_jax.search.scores import CRFScorer, ScoreStore
from deeplab_jax.search.workdir import search_workdir
from tests.command_line import call
from tests.toy_workdir import NAMES, photograph, toy_config, write_toy_workdir

GRID = dict(grid.GRIDS["v2"]) | {"normalization": ("after",)}


class Images:
    """A held-out split of small pictures whose truth the network finds roughly."""

    class_names, num_classes, fingerprint = NAMES, 4, "images"
    palette = voc_palette()

    def __init__(self, segment, widths=(33,) * 5):
        self.examples = []
        for n, width in enumerate(widths):
            image = photograph((25, width), n)
            label = segment(image, 6).labels
            label[0] = 255
            self.examples.append(deeplab_jax.data.Example(image, label, f"image {n}"))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]

    def record(self, i):
        return {"name": self.examples[i].name.encode()}

    def group_of(self, name):
        return f"drive {int(name[-1]) % 2}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = write_toy_workdir(tmp_path_factory.mktemp("toy") / "w")
    return workdir, Images(deeplab_jax.load(workdir))


def test_search_of_a_workdir(trained, monkeypatch):
    workdir, images = trained
    monkeypatch.setattr(deeplab_jax.data, "open_dataset", lambda *_: images)
    axes = GRID | {"bilateral_weight": (2.0, 4.0), "bilateral_xy_std": (6.0, 12.0), "bilateral_rgb_std": (10.0,)}
    axes |= {"gaussian_weight": (2.0,), "gaussian_xy_std": (1.5,)}
    lines = []
    arguments = {"passes": 1, "iterations": 4, "say": lines.append}
    preset, table = search_workdir(toy_config(), workdir, axes, **arguments)
    assert lines[0].startswith("warning: the CRF's parameters are searched on the evaluation split 'val', so that the ")
    assert lines[1] == "searching on 5 of 5 images of split 'val'" and "network: 5 of 5 images" in lines
    assert "network alone" in table and "best" in table
    unseen = table.splitlines()[-1]
    assert (
        unseen.startswith("mean_iou gained on a group that the search did not see: drive 0 +") and "drive 1" in unseen
    )
    saved = crf.read_preset(workdir / "crf_preset.json")
    assert saved == preset and saved.iterations == 4 and saved.source.startswith("crf_search: mean_iou ")
    assert (preset.params.bilateral_weight, preset.params.bilateral_xy_std) == (4.0, 12.0)  # those of the truth
    config = toy_config()
    config.crf.preset = str(workdir / "crf_preset.json")
    found = crf.setting_from_config(config.crf)
    assert (found.params, found.normalization) == (preset.params, "after")
    with Image.open(workdir / "crf_search/heatmap.png") as picture:
        assert picture.width > 400
    assert len((workdir / "crf_search/table.csv").read_text().splitlines()) == 1 + 1 + 4
    scores = np.load(workdir / "crf_search/scores/000000.npy")
    assert scores.dtype == np.float16 and scores.shape == (25, 33, 4)

    lines.clear()  # again: the network is not needed, nothing is measured
    monkeypatch.setattr(CRFScorer, "count", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr("deeplab_jax.search.workdir.create_segmenter", lambda *_, **__: pytest.fail("computed again"))
    assert search_workdir(toy_config(), workdir, axes, **arguments)[1] == table

    other = copy.copy(images)  # the same number of other images, as of another list or share: nothing is taken over
    other.examples = [e._replace(name=f"another {e.name}") for e in images.examples]
    monkeypatch.setattr(deeplab_jax.data, "open_dataset", lambda *_: other)
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        search_workdir(toy_config(), workdir, axes, **arguments)


def test_void_images_are_refused_before_anything_is_measured(trained, monkeypatch):
    workdir, images = trained
    void = copy.copy(images)
    void.examples = [e._replace(label=np.full_like(e.label, 255)) for e in images.examples]
    monkeypatch.setattr(deeplab_jax.data, "open_dataset", lambda *_: void)
    with pytest.raises(UserError, match=r"split 'val': the images of the search have no labels, or only void ones"):
        search_workdir(toy_config(), workdir, GRID, passes=1, iterations=1, say=str)


@pytest.mark.long
def test_processes_that_share_the_images_find_what_one_finds(trained, tmp_path, monkeypatch):
    """Two processes, as threads, with two devices each, on photographs of two sizes."""
    workdir, _ = trained
    images = Images(deeplab_jax.load(workdir), (41, 49) * 2 + (41,))
    monkeypatch.setattr(deeplab_jax.data, "open_dataset", lambda *_: images)
    monkeypatch.setenv("DEEPLAB_HEARTBEAT_SECONDS", "2")
    axes = GRID | {"bilateral_weight": (2.0, 4.0), "bilateral_xy_std": (6.0,), "bilateral_rgb_std": (10.0,)}
    axes |= {"gaussian_weight": (2.0,), "gaussian_xy_std": (1.5,)}
    options = {"passes": 2, "iterations": 2, "say": lambda line: None}
    for name in ("one", "two"):
        shutil.copytree(workdir, tmp_path / name, ignore=shutil.ignore_patterns("crf_*"))
    expected = search_workdir(toy_config(), tmp_path / "one", axes, **options)
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1] * 2)
    measured, found = [], {}
    count = CRFScorer.count
    monkeypatch.setattr(CRFScorer, "count", lambda self, i, s: measured.extend((i, x) for x in s) or count(self, i, s))

    def run(index: int) -> None:
        job = Job(index, 2)
        with job.meeting(tmp_path / "two/crf_search/.processes"):
            found[index] = search_workdir(toy_config(), tmp_path / "two", axes, **options, job=job)
            found[index] += (job.conclude({}, len),)

    threads = [threading.Thread(target=run, args=(k,)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert found == dict.fromkeys((0, 1), (*expected, 2))
    assert len(measured) == len(set(measured))  # each setting on each image once
    files = [sorted(p.relative_to(tmp_path / w) for p in (tmp_path / w).rglob("*")) for w in ("one", "two")]
    assert files[0] == files[1]
    for name in ("crf_preset.json", "crf_search/table.txt", "crf_search/table.csv", "crf_search/heatmap.png"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    lines = [(tmp_path / w / "crf_search/results.jsonl").read_text().splitlines() for w in ("one", "two")]
    assert sorted(lines[0]) == sorted(lines[1])


@pytest.mark.parametrize(("bilateral", "difference"), [("auto", 2), ("permutohedral", 0)])
def test_counts_are_mean_fields(bilateral, difference, trained):
    workdir, images = trained
    segmenter = deeplab_jax.load(workdir).segmenter
    store = ScoreStore(workdir / "again", images, [0, 1], {})
    store.complete(lambda: segmenter, say=str)
    settings = [
        Candidate(w, 12.0, 10.0, g, 1.5, n)
        for w, g, n in ((4.0, 2.0, "after"), (2.0, 1.0, "after"), (4.0, 2.0, "none"))
    ]
    found = dict(CRFScorer(store, iterations=3, bilateral=bilateral).count(1, [None, *settings]))
    log_probs, image, label = store[1]
    for setting in settings:
        options = {"normalization": setting.normalization, "bilateral": bilateral}
        q = crf.mean_field(-log_probs, image, setting.params, 3, **options)
        right = (np.asarray(q).argmax(-1) == label)[label != 255]
        counts = found[setting]["mean_iou"]
        assert abs(counts.hit.sum() - right.sum()) <= difference and counts.truth.sum() == right.size
        assert 0 < found[setting]["trimap"].truth.sum() < right.size
    assert found[None]["mean_iou"].hit.sum() == (log_probs.argmax(-1) == label)[label != 255].sum()


@pytest.mark.long
def test_learned_weights_make_the_labels_likelier(trained, tmp_path):
    workdir, images = trained
    store = ScoreStore(tmp_path / "scores", images, range(5), {})
    store.complete(lambda: deeplab_jax.load(workdir).segmenter, say=str)
    start = Candidate(1.0, 12.0, 10.0, 1.0, 1.5, "after")
    lines = []
    learned = learn_weights(store, start, passes=3, say=lines.append)
    assert learned == learn_weights(store, start, passes=3, say=str)
    assert learned.widths == start.widths and len(lines) == 3
    weights = np.array([learned.bilateral_weight, learned.gaussian_weight])
    assert weights.shape == (2, 4) and (weights >= 0).all() and weights.std(1).min() > 0.01

    def likelihood(setting: Candidate) -> float:
        total = 0.0
        for i in range(5):
            log_probs, image, label = (x[::2, ::2] for x in store[i])
            params = setting.params.replace(**{n: np.float32(getattr(setting, n)) for n in WEIGHT_FIELDS})
            log_q = np.asarray(crf.mean_field(-log_probs, image, params.at_stride(2), 5, return_log=True))
            total += log_q[label < 4][np.arange((label < 4).sum()), label[label < 4]].mean()
        return total / 5

    assert likelihood(learned) > likelihood(start) + 0.02
    first, last = (float(line.split()[-1]) for line in (lines[0], lines[-1]))
    assert last < first and last == pytest.approx(-likelihood(learned), abs=0.02)


def test_a_learned_setting_is_kept_in_preset_and_table(trained, monkeypatch):
    workdir, images = trained
    monkeypatch.setattr(deeplab_jax.data, "open_dataset", lambda *_: images)
    weak = {"bilateral_weight": (0.5,), "bilateral_xy_std": (12.0,), "bilateral_rgb_std": (10.0,)}
    axes = GRID | weak | {"gaussian_weight": (0.5,), "gaussian_xy_std": (1.5,)}
    config = toy_config()
    config.crf.update({"bilateral_weight": 0.5, "gaussian_weight": 0.5})  # its own weights made the truth
    preset, table = search_workdir(config, workdir, axes, passes=1, learn=2, iterations=4, say=str)
    assert "weights learned per class, mean_iou" in preset.source and ".." in table
    assert np.shape(preset.params.bilateral_weight) == (4,)
    with monkeypatch.context() as patch:  # again: nothing is learned twice
        patch.setattr("deeplab_jax.search.workdir.learn_weights", lambda *_, **__: pytest.fail("learned again"))
        again = search_workdir(config, workdir, axes, passes=1, learn=2, iterations=4, say=str)
        assert again[1] == table
        with pytest.raises(pytest.fail.Exception, match="learned again"):
            search_workdir(config, workdir, axes, passes=1, learn=3, iterations=4, say=str)
    saved = crf.read_preset(workdir / "crf_preset.json").params
    np.testing.assert_array_equal(saved.gaussian_weight, preset.params.gaussian_weight)
    segment = deeplab_jax.load(workdir, crf=workdir / "crf_preset.json")
    image = photograph((25, 33))
    expected = crf.mean_field(
        -np.log(np.maximum(deeplab_jax.load(workdir)(image, 0).marginals, 1e-20)), image, saved, 4
    )
    assert (segment(image).labels != np.asarray(expected).argmax(-1)).mean() < 0.01


@pytest.mark.long
def test_the_multiple_that_made_the_truth_is_found(trained, monkeypatch):
    workdir, images = trained
    segment, uneven = deeplab_jax.load(workdir), np.float32([3, 3, 9, 3])

    def truth(example):
        unary = -np.log(np.maximum(segment(example.image, 0).marginals, 1e-20))
        params = crf.CRFParams(uneven, 12.0, 10.0, 0.5, 1.5)
        return example._replace(label=np.asarray(crf.mean_field(unary, example.image, params, 4)).argmax(-1))

    uneven_images = Images(segment)
    uneven_images.examples = [truth(example) for example in images.examples]
    uneven_images.fingerprint = "uneven"
    monkeypatch.setattr(deeplab_jax.data, "open_dataset", lambda *_: uneven_images)
    axes = {"bilateral_weight": (3.0, 5.0), "bilateral_xy_std": (12.0,), "bilateral_rgb_std": (10.0,)}
    axes |= {"gaussian_weight": (0.5,), "gaussian_xy_std": (1.5,), "thin_factor": (1.0, 3.0)}
    axes |= {"normalization": ("symmetric",)}
    preset, table = search_workdir(toy_config(), workdir, axes, passes=1, thin=[NAMES[2]], iterations=4, say=str)
    np.testing.assert_array_equal(preset.params.bilateral_weight, uneven)
    assert f"{NAMES[2]} x 3, mean_iou" in preset.source and "thin" in table.splitlines()[0]
    saved = crf.read_preset(workdir / "crf_preset.json").params
    np.testing.assert_array_equal(saved.bilateral_weight, uneven)
    alike, _ = search_workdir(toy_config(), workdir, axes, passes=1, iterations=4, say=str)  # none named
    assert alike.params.bilateral_weight in (3.0, 4.0, 5.0)  # 4 is the config's own
    with pytest.raises(UserError, match="thin class 'wire'"):
        search_workdir(toy_config(), workdir, axes, passes=1, thin=["wire"], iterations=4, say=str)


def test_the_config_says_what_is_searched_and_flags_take_precedence(tmp_path, monkeypatch):
    asked = {}

    def search_workdir(config, workdir, axes, **options):
        asked.update(options, axes=axes)
        return types.SimpleNamespace(source="found"), ""

    monkeypatch.setattr("deeplab_jax.search.workdir.search_workdir", search_workdir)
    command = ["--config", "shapes", "--workdir", str(tmp_path)]
    command += ["--config.search.grid.bilateral_weight=4,2", "--config.search.thin=sign,", "--config.search.passes=1"]
    command += ["--config.search.objective=both", "--config.search.images=7", "--config.search.learn=3"]
    done = call("crf_search", *command)
    assert done.returncode == 0, done.stderr
    config = load_config("shapes").search.grid
    expected = {name: tuple(values) for name, values in config.items()} | {"bilateral_weight": (2.0, 4.0)}
    assert asked["axes"] == expected | {"normalization": ("after",)}
    found = {name: asked[name] for name in ("thin", "passes", "objective", "images", "learn")}
    assert found == {"thin": ("sign",), "passes": 1, "objective": "both", "images": 7, "learn": 3}

    flags = ["--bilateral_weight=5", "--grid=v1", "--thin=", "--passes=2", "--objective=trimap", "--images=9"]
    assert call("crf_search", *command, *flags, "--learn=0", "--normalization=symmetric").returncode == 0
    axes = {**expected, **grid.GRIDS["v1"], "bilateral_weight": (5.0,), "normalization": ("symmetric",)}
    assert asked["axes"] == axes
    found = {name: asked[name] for name in ("thin", "passes", "objective", "images", "learn")}
    assert found == {"thin": [], "passes": 2, "objective": "trimap", "images": 9, "learn": 0}
