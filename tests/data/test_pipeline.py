import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from deeplab_jax import data
from deeplab_jax.errors import UserError
from tests.data.miniatures import blocks, make_camvid, write_image, write_label


@pytest.fixture
def camvid(config, tmp_path):
    config.data.update(name="camvid", dir=str(make_camvid(tmp_path / "camvid", train=10)), train_split="train")
    config.data.update(scales=(0.5, 1.5), continuous_scale=True, brightness=0.2)
    return config


def _take(config, steps, first_step=0, **kwargs):
    batches = data.train_batches(data.open_dataset(config.data, "train"), config, first_step=first_step, **kwargs)
    taken = [next(batches) for _ in range(steps)]
    batches.close()
    return taken


def _assert_equal(a, b):
    for one, other in zip(a, b, strict=True):
        for key in ("image", "label", "valid", "index"):
            np.testing.assert_array_equal(one[key], other[key])


def test_shapes_and_types(camvid):
    batch = _take(camvid, 1)[0]
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        "image": ((4, 33, 49, 3), "uint8"),
        "label": ((4, 33, 49), "uint8"),
        "valid": ((4, 33, 49), "bool"),
        "index": ((4,), "int32"),
    }
    assert (batch["label"][~batch["valid"]] == 255).all()


def test_batches_do_not_depend_on_workers_cache_or_start(camvid):
    reference = _take(camvid, 5)
    camvid.data.workers = 5
    camvid.data.cache_decoded_mb = 0
    _assert_equal(_take(camvid, 5), reference)
    _assert_equal(_take(camvid, 2, first_step=3), reference[3:])
    camvid.seed = 1
    assert any((a["image"] != b["image"]).any() for a, b in zip(_take(camvid, 5), reference))


def test_networks_that_take_each_images_own_light_learn_from_even_light(camvid):
    """The photographs' darkness does not matter, and jitter comes after it."""
    camvid.data.update(scales=(1.0,), continuous_scale=False, brightness=0.0)
    raw = Path(camvid.data.dir)
    camvid.model.preprocessing = "own_rgb"
    bright = _take(camvid, 3)
    camvid.data.brightness = 0.4
    jittered = _take(camvid, 3)
    means = lambda batches: np.array([image.mean() for batch in batches for image in batch["image"]])  # noqa: E731
    assert means(bright).std() < means(jittered).std()
    for path in (raw / "train").iterdir():
        with Image.open(path) as image:
            dark = np.asarray(image) // 2
        Image.fromarray(dark).save(path)
    camvid.data.brightness = 0.0
    difference = lambda batches: np.abs(bright[0]["image"].astype(int) - batches[0]["image"]).mean()  # noqa: E731
    assert difference(_take(camvid, 1)) < 3
    camvid.model.preprocessing = "torch_rgb"
    assert difference(_take(camvid, 1)) > 20


def test_processes_split_the_batch(camvid):
    whole = _take(camvid, 3)
    parts = [_take(camvid, 3, process_index=p, process_count=2) for p in range(2)]
    for n, batch in enumerate(whole):
        for key, value in batch.items():
            np.testing.assert_array_equal(np.concatenate([part[n][key] for part in parts]), value)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_micro_batches_hold_the_same_examples_whatever_the_processes(camvid, processes):
    camvid.batch_size, camvid.optimizer.accumulate = 8, 2
    whole = _take(camvid, 2)
    parts = [_take(camvid, 2, process_index=p, process_count=processes) for p in range(processes)]
    for n, batch in enumerate(whole):
        for key, value in batch.items():
            # each process's rows are split into micro-batches in order; micro-batch m consists of all processes' parts
            # of it
            micro = [part[n][key].reshape(2, -1, *value.shape[1:]) for part in parts]
            np.testing.assert_array_equal(np.concatenate(micro, axis=1).reshape(value.shape), value)
    with pytest.raises(UserError, match=r"batch_size=8: must be divisible by the 8 processes times .*accumulate=2"):
        data.train_batches(data.open_dataset(camvid.data, "train"), camvid, process_count=8)


def test_every_example_once_per_epoch(camvid):
    dataset = data.open_dataset(camvid.data, "train")
    batches = data.train_batches(dataset, camvid)  # 10 examples, batches of 4: epochs end within batches
    order = [batches.position(n) for n in range(40)]
    for epoch in range(4):
        assert sorted(order[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert order[:10] != order[10:20]


def test_indivisible_batch_and_wrong_settings(camvid):
    dataset = data.open_dataset(camvid.data, "train")
    with pytest.raises(UserError, match=r"batch_size=4: must be divisible by the 3 processes"):
        data.train_batches(dataset, camvid, process_count=3)
    camvid.data.scales = (0.5, 1.0, 1.5)
    with pytest.raises(UserError, match=r"continuous_scale, give two"):
        data.train_batches(dataset, camvid)


def _break(path):
    path.write_bytes(path.read_bytes()[:-400])


def test_corrupt_image_stops_with_its_name_or_is_skipped(camvid, tmp_path):
    name = "A_train004"
    _break(tmp_path / "camvid" / "train" / f"{name}.png")
    with pytest.raises(UserError, match=rf"{name}.png: cannot be decoded"):
        data.open_dataset(camvid.data, "train")
    camvid.data.on_corrupt = "skip"
    batches = data.train_batches(data.open_dataset(camvid.data, "train"), camvid)
    for _ in range(3):
        assert next(batches)["image"].shape == (4, 33, 49, 3)
    assert batches.skipped == {name}
    batches.close()
    camvid.data.on_corrupt = "stop"  # the records are there now, the damage is still found
    with pytest.raises(UserError, match=rf"{name}.*on_corrupt=skip"):
        _take(camvid, 3)


def test_prefetch_keeps_order():
    assert list(data.prefetch(iter(range(7)), lambda n: n * n)) == [n * n for n in range(7)]


def test_an_epoch_without_tensorflow(camvid, tmp_path):
    code = f"""
import sys
from deeplab_jax import config as configs, data
config = configs.load_config("base", ["data.name=camvid", "data.dir={tmp_path / "camvid"}", "batch_size=5",
    "data.cache_dir={tmp_path / "other"}", "data.train_split=train", "data.crop=33,49"])
batches = data.train_batches(data.open_dataset(config.data, "train"), config)
for _ in range(2):
    next(batches)
batches.close()
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_exif_is_honored(config, tmp_path):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter
    write_image(tmp_path / "images" / "a.jpg", 24, 32, exif=exif)
    write_label(tmp_path / "masks" / "a.png", blocks(0, 1, height=32, width=24))
    config.data.update(name="folder", images=str(tmp_path / "images"), masks=str(tmp_path / "masks"), val_fraction=0.0)
    example = data.open_dataset(config.data, "train")[0]
    assert example.image.shape == (32, 24, 3) and example.label.shape == (32, 24)


def test_first_steps_on_smaller_photographs(camvid):
    reference = _take(camvid, 4)
    camvid.num_steps = 4
    camvid.data.stages = ((0.5, (17, 25), (0.25, 0.75)),)
    batches = _take(camvid, 4)
    assert [b["image"].shape for b in batches] == [(4, 17, 25, 3)] * 2 + [(4, 33, 49, 3)] * 2
    _assert_equal(batches[2:], reference[2:])  # from then on, the same as without them
    _assert_equal(_take(camvid, 2, first_step=1), batches[1:3])  # resumed across the change
    for a, b in zip(batches[:2], reference[:2]):
        np.testing.assert_array_equal(a["index"], b["index"])
        assert (a["label"][~a["valid"]] == 255).all()


@pytest.mark.parametrize("shares", [(0.05, 0.55, 0.3, 0.1), (0.05, 0.65, 0.2, 0.1), (0.05, 0.8, 0.05, 0.1)])
def test_shares_of_stages_may_sum_to_one(camvid, shares):
    camvid.num_steps = 100
    camvid.data.stages = tuple((share, (17, 25), (0.25, 0.75)) for share in shares)
    assert [stage.end for stage in data.stages(camvid)][-2:] == [100, 100]


@pytest.mark.parametrize(
    ("stages", "sentence"),
    [
        (((0.5, (17, 25), (0.5,)),), r"config\.data\.stages\[0\]: scales: with continuous_scale, give two numbers"),
        (((0.5, (17, 25), (0.0, 0.5)),), r"config\.data\.stages\[0\]: scales=.*all above 0"),
        (((0.5, (17,), (0.25, 0.75)),), r"config\.data\.stages\[0\]: crop=.*height and width"),
        (((0.5, (17, 25), (0.25, 17.0)),), r"config\.data\.stages\[0\]: scales=.*between 0\.01 and 16$"),
        (((0.5, (17, 16385), (0.25, 0.75)),), r"config\.data\.stages\[0\]: crop=.*between 1 and 16384$"),
        (((1.5, (17, 25), (0.25, 0.75)),), r"config\.data\.stages=.*at most 1 in total"),
        (((0.6, (17, 25), (0.25, 0.75)),) * 2, r"config\.data\.stages=.*at most 1 in total"),
        ((0.5, (17, 25), (0.25, 0.75)), r"config\.data\.stages=.*needs entries \(share of the steps"),
        (((0.5, (17, 25)),), r"config\.data\.stages=.*needs entries \(share of the steps"),
    ],
)
def test_impossible_first_steps_are_refused(camvid, stages, sentence):
    camvid.data.stages = stages
    with pytest.raises(UserError, match=sentence):
        _take(camvid, 1)
