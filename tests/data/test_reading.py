"""A file that cannot be decoded stops every reader with its name, or is skipped by all of them."""

import json
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deeplab_jax import data
from deeplab_jax.crf import CRFParams, Setting
from deeplab_jax.data import audit, reading
from deeplab_jax.data.class_weights import class_weights_for, count_pixels
from deeplab_jax.data.contact_sheet import contact_sheet
from deeplab_jax.errors import UserError
from deeplab_jax.evaluation.evaluate import evaluate, format_results
from deeplab_jax.inference.segmenter import Segmenter
from deeplab_jax.inference.tiling import padded_size
from deeplab_jax.search.scores import ScoreStore, shared_shapes
from deeplab_jax.training import observation
from tests.data.miniatures import blocks, write_image, write_label
from tests.evaluation.fakes import PALETTE, ColorNetwork, Example, Memory, network_variables
from tests.evaluation.fakes import config as evaluation_config
from tests.evaluation.submission_reader import read_submission

NAMES = ("sky", "tree", "road", "car")


@pytest.fixture
def damaged(config, tmp_path):
    """Four photographs with masks; the first photograph is a JPEG cut short, the third mask is not an image."""
    for i in range(4):
        path = write_image(tmp_path / "images" / f"p{i}.jpg", seed=i)
        write_label(tmp_path / "masks" / f"p{i}.png", blocks(i, 0, 255))
        if i == 0:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (tmp_path / "masks" / "p2.png").write_bytes(b"no picture")
    (tmp_path / "classes.txt").write_text("\n".join(NAMES))
    config.data.update(
        name="folder", images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), train_split="train",
        classes=str(tmp_path / "classes.txt"), val_fraction=0.0, on_corrupt="skip",
    )  # fmt: skip
    return config


def segmenter() -> Segmenter:
    return Segmenter(ColorNetwork(), network_variables(), Setting(CRFParams(), bilateral="separable"), NAMES, PALETTE)


def test_class_weights_leave_the_damaged_out(damaged, caplog):
    dataset = data.open_dataset(damaged.data, "train")
    with caplog.at_level(logging.WARNING):
        counts = count_pixels(dataset)
    third = np.count_nonzero(blocks(0, 1, 2) == 0)  # pixels of a stripe
    assert counts[1] == np.count_nonzero(blocks(1, 0, 255) == 1) and counts[2] == 0
    assert counts[3] == third and counts[0] == 2 * np.count_nonzero(blocks(3, 0, 255) == 0)
    assert dataset.skipped == {"p0", "p2"}
    messages = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert len(messages) == 2 and "image 'p0'" in messages[0] and "label 'p2'" in messages[1]
    assert messages[1].endswith("skipped (2 so far)")
    caplog.clear()
    count_pixels(dataset)
    assert not [r for r in caplog.records if "skipped" in r.getMessage()]  # named once
    damaged.loss.class_weights = ("sqrt",)
    weights = class_weights_for(damaged, dataset)
    assert weights[2] == 0 and weights[1] > weights[0] > 0


def test_every_reader_stops_where_it_may_not_skip(damaged):
    data.open_dataset(damaged.data, "train")  # prepared while skipping was allowed
    damaged.data.on_corrupt = "stop"
    dataset = data.open_dataset(damaged.data, "train")
    sentence = r"image 'p0': cannot be decoded .* or set config.data.on_corrupt=skip"
    with pytest.raises(UserError, match=sentence):
        count_pixels(dataset)
    with pytest.raises(UserError, match=sentence):
        evaluate(segmenter(), dataset, evaluation_config(), progress=False)
    with pytest.raises(UserError, match=r"on_corrupt=skip"):
        next(data.train_batches(dataset, damaged))
    damaged.data.on_corrupt = "maybe"
    with pytest.raises(UserError, match=r"config.data.on_corrupt=maybe: must be stop or skip"):
        data.open_dataset(damaged.data, "train")


def test_evaluation_leaves_the_damaged_out_and_counts_them(damaged, tmp_path):
    dataset = data.open_dataset(damaged.data, "train")
    whole = Memory([Example(*dataset[i]) for i in (1, 3)])
    (expected,) = evaluate(segmenter(), whole, evaluation_config(), progress=False)
    settings = evaluation_config(submission="voc", overlays=1)
    (found,) = evaluate(segmenter(), dataset, settings, tmp_path / "eval", split="train", progress=False)
    assert found == expected | {"skipped": 2} and found["images"] == 2
    assert "2 images (2 skipped), percent" in format_results([found])
    about = json.loads((tmp_path / "eval" / "train_images.json").read_text())["images"]
    assert [entry["name"] for entry in about] == ["p0", "p1", "p2", "p3"]
    assert [entry["mean_iou"] == [None] for entry in about] == [True, False, True, False]
    archive = tmp_path / "eval" / "train_submission.tgz"
    assert sorted(read_submission(archive, "voc", split="train")) == ["p1", "p3"]


def test_a_split_of_damaged_files_is_refused(damaged, tmp_path):
    for i in range(4):
        (tmp_path / "images" / f"p{i}.jpg").write_bytes(b"no picture")
    dataset = data.open_dataset(damaged.data, "train")
    for read in (count_pixels, lambda ds: evaluate(segmenter(), ds, evaluation_config(), progress=False)):
        with pytest.raises(UserError, match=r"folder split 'train': every image is corrupt"):
            read(dataset)


def test_scores_of_a_search_leave_the_damaged_out(damaged, tmp_path):
    dataset = data.open_dataset(damaged.data, "train")
    made, said = [], []

    def network():
        made.append(1)
        scores = lambda images: [np.zeros((*images[0].shape[:2], 4), np.float32)]  # noqa: E731
        return SimpleNamespace(plan=len, scores=scores, devices=jax.local_devices()[:1])

    for n in range(2):  # the second time, all that can be computed is there
        store = ScoreStore(tmp_path / "scores", dataset, [0, 1, 2, 3], {"step": 1})
        store.complete(network, said.append)
        assert store.indices == [1, 3] and len(made) == 1, n
    log_probs, image, label = store[1]
    np.testing.assert_array_equal(image, dataset[3].image)
    np.testing.assert_array_equal(label, blocks(3, 0, 255))
    assert log_probs.shape == (24, 32, 4)
    assert said[-1] == "2 images cannot be decoded and are left out; 2 remain"


def test_pictures_show_the_first_that_can_be_decoded(damaged, monkeypatch):
    dataset = data.open_dataset(damaged.data, "train")
    shown = []

    def labels(images, counts):
        shown.extend(images)
        return [[np.zeros(images[0].shape[:2], np.uint8) for _ in counts]]

    monkeypatch.setattr(observation, "create_segmenter", lambda *a, **k: SimpleNamespace(labels=labels))
    recorded = []
    reporter = SimpleNamespace(picture=lambda step, name, image: recorded.append((step, image.shape[2])))
    damaged.log.images_every = 10
    pictures = observation.Pictures(damaged, reporter, {"class_names": NAMES, "palette": PALETTE}, dataset, 0)
    pictures(10, SimpleNamespace(trainable={}, variables=dict))
    assert recorded == [(10, 3)]
    np.testing.assert_array_equal(shown[0], dataset[1].image)


def test_the_check_warns_where_files_are_skipped(damaged):
    builder, sources = audit.sources_of(damaged.data, ("train",))
    result = audit.audit(builder, sources)
    found = {f.kind: f for f in result.findings}
    assert not result.errors
    assert found["skipped image"].count == 1 and found["skipped image"].examples[0].endswith("p0.jpg")
    assert found["skipped label"].count == 1 and found["skipped label"].examples[0].endswith("p2.png")
    assert contact_sheet(damaged, 2).shape[2] == 3  # nothing stops it
    damaged.data.on_corrupt = "stop"
    result = audit.audit(*audit.sources_of(damaged.data, ("train",)))
    assert {f.kind for f in result.errors} == {"unreadable image", "unreadable label"}


def test_a_damaged_mask_does_not_hide_the_classes(damaged):
    damaged.data.classes = ""
    assert data.open_dataset(damaged.data, "train").class_names == ("0", "1", "2", "3")


def test_readable_gives_numbers_and_examples(damaged):
    dataset = data.open_dataset(damaged.data, "train")
    assert [(i, e.name) for i, e in reading.readable(dataset)] == [(1, "p1"), (3, "p3")]


def test_sizes_are_known_before_anything_is_decoded(damaged):
    dataset = data.open_dataset(damaged.data, "train")
    sizes = reading.known_sizes(dataset, range(len(dataset)))
    whole = {i: example.image.shape[:2] for i, example in reading.readable(dataset)}
    assert [dataset.size(i) for i in whole] == list(whole.values())
    assert len(sizes) >= len(whole) and set(whole.values()) <= set(sizes)  # a damaged one may still have its header
    shape = shared_shapes(SimpleNamespace(dataset=dataset, indices=range(len(dataset))), 8)
    assert all(shape(size) == (padded_size(size[0], 8), padded_size(size[1], 8)) for size in whole.values())
    assert shape((400, 300)) == (padded_size(400, 8), padded_size(300, 8))  # and another has its own
    assert reading.known_sizes(SimpleNamespace(), range(3)) == []
