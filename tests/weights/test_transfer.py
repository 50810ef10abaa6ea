"""Matching a file's layers with a network: decimation, slimming, branches, classifiers, missing layers."""

import functools

import numpy as np
import pytest

from deeplab_jax.configs import base
from deeplab_jax.errors import UserError
from deeplab_jax.models import layers
from deeplab_jax.weights import conversion, source, transfer

ASPP = {"backbone": "vgg16", "head": "aspp"}
LARGE_FOV = {"backbone": "vgg16", "head": "largefov", "head_rates": (12,)}
FC = {"backbone": "vgg16", "head": "fc", "head_rates": (4,)}


@functools.cache
def shapes(classes=21, **changes):
    config = base.get_config().model
    config.update(changes)
    return conversion.network_shapes(config, classes)


def empty_source(targets, ours=True, **extra):
    """A source with every array of a network, of zeros that need no memory."""
    arrays = {transfer.full_name(path): np.broadcast_to(np.float32(0), t.shape) for path, t in targets.items()}
    if not ours:
        arrays = {"/".join(name.split("/")[-2:]): a for name, a in arrays.items()}
    return source.Source("file", "a test", arrays={**arrays, **extra}, ours=ours)


def imagenet_vgg(fc6=7, width=4096):
    """ImageNet's VGG-16 whose fc6 and fc7 hold, at each weight, a number that identifies its position."""
    trunk = {p: t for p, t in shapes(**LARGE_FOV).items() if p[1] == "backbone"}
    vgg = empty_source(trunk, ours=False)
    filters = np.arange(width, dtype=np.float32)
    place = np.arange(fc6 * fc6, dtype=np.float32).reshape(fc6, fc6, 1, 1) * 10_000
    vgg.arrays["fc6/kernel"] = np.broadcast_to(place, (fc6, fc6, 512, width)) + filters
    vgg.arrays["fc6/bias"] = filters
    vgg.arrays["fc7/kernel"] = np.broadcast_to(filters[:, None] * 10_000, (1, 1, width, width))
    vgg.arrays["fc7/bias"] = filters
    return vgg


def test_epsilon_is_the_one_of_our_batch_norm():
    assert source.BN_EPSILON == layers.BATCH_NORM_EPSILON


def test_every_array_of_resnet101_is_matched_by_either_naming():
    targets = shapes()
    for ours in (True, False):
        found, report = transfer.transfer(empty_source(targets, ours), targets)
        assert len(found) == len(targets) and not report.missing and not report.left_out
    assert sum(int(np.prod(a.shape)) for p, a in found.items() if p[:2] == ("params", "head")) == 1_548_372


def test_imagenet_names_of_blocks_match_deeplabs():
    targets = shapes(backbone="resnet50")
    letters = {f"b{i}": chr(ord("a") + i) for i in range(1, 6)}
    imagenet = empty_source(targets, ours=False)
    for name in list(imagenet.arrays):
        for stage in "34":
            for ours, theirs in letters.items():
                for kind in ("res", "bn"):
                    if name.startswith(f"{kind}{stage}{ours}_"):
                        renamed = name.replace(f"{stage}{ours}_", f"{stage}{theirs}_", 1)
                        imagenet.arrays[renamed] = imagenet.arrays.pop(name)
    assert "res4f_branch2c/kernel" in imagenet.arrays
    assert not transfer.transfer(imagenet, targets)[1].missing


@pytest.mark.parametrize(("side", "kept"), [(4, [0, 2, 4, 6]), (3, [0, 3, 6])])
def test_fc6_is_decimated(side, kept):
    targets = shapes(**FC, head_kernel=side, head_width=32)
    found, report = transfer.transfer(imagenet_vgg(width=32), targets)
    kernel = found["params", "head", "fc6", "kernel"]
    assert kernel.shape == (side, side, 512, 32)
    wanted = [[(y * 7 + x) * 10_000 + 5 for x in kept] for y in kept]
    np.testing.assert_array_equal(kernel[:, :, 0, 5], wanted)
    np.testing.assert_array_equal(found["params", "head", "fc6", "bias"], np.arange(32))
    assert set(report.missing) == {"head/fc8/kernel", "head/fc8/bias"}
    assert any("fc6: [7, 7, 512, 32]" in note for note in report.notes)


def test_slimming_keeps_a_random_subset_that_fc7_reads():
    targets = shapes(**LARGE_FOV)
    vgg = imagenet_vgg(fc6=3)
    found, _ = transfer.transfer(vgg, targets, seed=3)
    fc6, fc7 = (found["params", "head", name, "kernel"] for name in ("fc6", "fc7"))
    kept = found["params", "head", "fc6", "bias"]
    assert fc6.shape == (3, 3, 512, 1024) and fc7.shape == (1, 1, 1024, 1024)
    assert len(set(kept.tolist())) == 1024 and (np.diff(kept) > 0).all()
    np.testing.assert_array_equal(fc6[0, 0, 0], kept)  # filters and biases are the same subset
    np.testing.assert_array_equal(fc7[0, 0, :, 0] / 10_000, kept)  # and fc7 reads that subset
    assert set(kept.tolist()) != set(found["params", "head", "fc7", "bias"].tolist())
    again, _ = transfer.transfer(vgg, targets, seed=3)
    other, _ = transfer.transfer(vgg, targets, seed=4)
    np.testing.assert_array_equal(again["params", "head", "fc6", "bias"], kept)
    assert not np.array_equal(other["params", "head", "fc6", "bias"], kept)


def test_aspp_branches_all_start_from_the_one_fc6():
    found, report = transfer.transfer(imagenet_vgg(fc6=3, width=1024), shapes(**ASPP))
    for i in range(1, 5):
        np.testing.assert_array_equal(found["params", "head", f"fc6_{i}", "bias"], np.arange(1024))
    assert {name.split("/")[1] for name in report.missing} == {f"fc8_{i}" for i in range(1, 5)}
    slimmed, _ = transfer.transfer(imagenet_vgg(fc6=3, width=2048), shapes(**ASPP))
    biases = {tuple(slimmed["params", "head", f"fc6_{i}", "bias"].tolist()) for i in range(1, 5)}
    assert len(biases) == 4  # each branch draws its own filters
    for i in range(1, 5):
        kept = slimmed["params", "head", f"fc6_{i}", "bias"]
        np.testing.assert_array_equal(slimmed["params", "head", f"fc7_{i}", "kernel"][0, 0, :, 0] / 10_000, kept)


def test_a_classifier_of_other_classes_keeps_its_random_values():
    found, report = transfer.transfer(empty_source(shapes(91)), shapes(21))
    assert ("params", "head", "fc1_c0", "kernel") not in found
    assert len(report.missing) == 8
    assert set(report.missing.values()) == {"the classifier: the file has 91 classes, the network 21"}
    assert "missing, initialized randomly: head/fc1_c0/" in str(report)


def test_an_incomplete_trunk_is_an_error():
    targets = shapes()
    incomplete = empty_source(targets)
    del incomplete.arrays["backbone/res4b22_branch2b/kernel"]
    with pytest.raises(UserError, match=r"1 arrays of the trunk .*res4b22_branch2b/kernel: not in the file"):
        transfer.transfer(incomplete, targets)
    resnet50 = empty_source(shapes(backbone="resnet50"))
    with pytest.raises(UserError, match="of the trunk do not come"):
        transfer.transfer(resnet50, targets)
    statistics = empty_source(targets)
    del statistics.arrays["batch_stats/backbone/bn_conv1/var"]
    with pytest.raises(UserError, match="bn_conv1/var"):
        transfer.transfer(statistics, targets)


def test_what_the_network_does_not_have_is_left_out():
    resnet101 = empty_source(shapes(), **{"head/fc9/kernel": np.zeros((1, 1, 1, 1), np.float32)})
    _, report = transfer.transfer(resnet101, shapes())
    assert report.left_out == {"head/fc9/kernel": "the network has no such layer"}
    assert len(report.matched) == len(shapes())
