"""Published files converted, and the networks' scores against the same networks in PyTorch."""

import jax
import numpy as np
import pytest

from deeplab_jax.configs import base
from deeplab_jax.models import create_model
from deeplab_jax.weights import contents, conversion, files, initial
from tests.weights import writers

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from tests.weights import reference_torch as reference  # noqa: E402

torch.set_num_threads(1)  # idle OpenMP threads spin, which two test workers on two cores do not need

TOLERANCE = 1e-4  # of the scores' range
VGG = {"backbone": "vgg16", "head": "largefov", "head_rates": (12,)}
VGG_ASPP = {"backbone": "vgg16", "head": "aspp", "head_rates": (6, 12, 18, 24)}


def model_config(**changes):
    config = base.get_config().model
    config.update(changes)
    return config


def photograph(size, seed=1):
    """[1, size, size, 3] RGB 0..255 with structure at several scales."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (1, size // 16 + 1, size // 16 + 1, 3)).repeat(16, 1).repeat(16, 2)
    noise = 40 * rng.standard_normal((1, size, size, 3))
    return np.clip(coarse[:, :size, :size] + noise, 0, 255).round().astype(np.uint8)


def converted(src, model, tmp_path):
    """Converts a file and loads it into a network of the file's number of classes; returns (apply, variables)."""
    source = files.read(src)
    classes = contents.classes_of(source)
    out = tmp_path / "converted.safetensors"
    conversion.convert(source, model, out)
    model.update(initial.recorded_settings(out))
    network = create_model(model, classes)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 65, 65, 3), np.float32))
    fresh = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    variables, report = initial.load_initial(out, model, fresh)
    assert not report.missing
    src.unlink()
    out.unlink()
    return jax.jit(lambda v, x: network.apply(v, x)[0]), variables


def difference(ours, theirs):
    """Largest difference over the range of the scores; infinite for another shape."""
    theirs = theirs.permute(0, 2, 3, 1).numpy()
    if ours.shape != theirs.shape:
        return np.inf
    return float(np.abs(ours - theirs).max() / np.ptp(theirs))


def check_network(apply, variables, run, size=97, only=None):
    """Compares the scores, then turns the reference's pools, strides and dilations one by one: each is noticed.

    At 97 pixels the score map has 13 positions, so that halving a rate of 24 or 18 still reaches into it.
    """
    image = photograph(size)
    ours = np.asarray(apply(variables, image))
    theirs, knobs = run(image, None)
    assert difference(ours, theirs) < TOLERANCE
    turned = {name: value for name, value in reference.wrong_values(knobs) if only is None or name in only}
    assert only is None or set(turned) == set(only)
    for name, value in turned.items():
        assert difference(ours, run(image, {name: value})[0]) > 10 * TOLERANCE, f"{name}={value} goes unnoticed"
    return knobs


@pytest.fixture(scope="module")
def resnet101(tmp_path_factory):
    """ResNet-101 ASPP-L written as a caffemodel and converted."""
    tmp = tmp_path_factory.mktemp("resnet101")
    w = reference.random_resnet()
    writers.write_caffe_resnet(tmp / "train2_iter_20000.caffemodel", w)
    apply, variables = converted(tmp / "train2_iter_20000.caffemodel", model_config(), tmp)
    weights = reference.tensors(w)
    return apply, variables, lambda x, wrong: reference.resnet(reference.caffe_input(x), weights, wrong=wrong)


def test_resnet101_aspp_caffemodel(resnet101):
    knobs = check_network(*resnet101, only=("pool1.kind", "stride_on", "res4b11.dilation", "fc1_c3.dilation"))
    assert sum(name.endswith("dilation") for name in knobs) == 33 + 4


@pytest.mark.long
def test_every_setting_of_resnet101_is_noticed(resnet101):
    check_network(*resnet101)


@pytest.mark.long
def test_resnet101_aspp_at_321(resnet101):
    apply, variables, run = resnet101
    image = photograph(321)
    theirs, _ = run(image, None)
    assert tuple(theirs.shape) == (1, 21, 41, 41)
    assert difference(np.asarray(apply(variables, image)), theirs) < TOLERANCE


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """vgg16_20M's form: `layers`, blobs of four numbers. v1's network has the average pool5a."""
    tmp = tmp_path_factory.mktemp("vgg")
    w = reference.random_vgg()
    writers.write_caffe_vgg(tmp / "vgg16_20M.caffemodel", w, legacy=True, classifier="fc8_pascal")
    apply, variables = converted(tmp / "vgg16_20M.caffemodel", model_config(**VGG, pool5a=True), tmp)
    weights = reference.tensors(w)

    def run(x, wrong):
        return reference.vgg(reference.caffe_input(x), weights, (12,), pool5a=True, wrong=wrong)

    return apply, variables, run


def test_vgg_largefov_legacy_caffemodel(vgg):
    only = ("pool5a.kind", "pool1.kind", "pool4.stride", "conv5_1.dilation", "fc6.dilation")
    knobs = check_network(*vgg, only=only)
    assert len(knobs) > len(only)


@pytest.mark.long
def test_every_setting_of_vgg_largefov_is_noticed_and_321_pixels_too(vgg):
    apply, variables, run = vgg
    check_network(*vgg)
    image = photograph(321)
    assert difference(np.asarray(apply(variables, image)), run(image, None)[0]) < TOLERANCE


@pytest.mark.long
def test_vgg_aspp_caffemodel(tmp_path):
    w = reference.random_vgg(branches=4)
    writers.write_caffe_vgg(tmp_path / "aspp.caffemodel", w, legacy=False)
    apply, variables = converted(tmp_path / "aspp.caffemodel", model_config(**VGG_ASPP), tmp_path)
    weights = reference.tensors(w)

    def run(x, wrong):
        return reference.vgg(reference.caffe_input(x), weights, (6, 12, 18, 24), wrong=wrong)

    check_network(apply, variables, run)
    image = photograph(321)
    assert difference(np.asarray(apply(variables, image)), run(image, None)[0]) < TOLERANCE


def test_torchvision_resnet50_keeps_its_own_preprocessing_and_stride(tmp_path):
    """An ImageNet trunk: RGB over 255, stride on the 3x3 convs; its head is missing and keeps its values."""
    w = reference.random_resnet(50, first_var=1.0)
    state = writers.state_dict(w, writers.torchvision_name) | {"fc.weight": np.zeros((1000, 2048), np.float32)}
    torch.save(reference.tensors(state), tmp_path / "resnet50.pth")
    model = model_config(backbone="resnet50")
    out = tmp_path / "resnet50.safetensors"
    conversion.convert(files.read(tmp_path / "resnet50.pth"), model, out)
    assert initial.recorded_settings(out) == {"preprocessing": "torch_rgb", "stride_on": "3x3"}
    model.update(initial.recorded_settings(out))
    network = create_model(model, 21)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 65, 65, 3), np.float32))
    fresh = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    for i in range(4):
        layer = fresh["params"]["head"][f"fc1_c{i}"]
        layer["kernel"] = w[f"fc1_c{i}.weight"].transpose(2, 3, 1, 0)
        layer["bias"] = w[f"fc1_c{i}.bias"]
    variables, report = initial.load_initial(out, model, fresh)
    assert set(report.missing) == {f"head/fc1_c{i}/{leaf}" for i in range(4) for leaf in ("kernel", "bias")}
    weights = reference.tensors(w)

    def run(x, wrong):
        return reference.resnet(reference.torch_input(x), weights, 50, stride_on="3x3", wrong=wrong)

    only = ("stride_on", "res3a.stride", "res4a.dilation", "res4b2.dilation", "res5c.dilation")
    check_network(jax.jit(lambda v, x: network.apply(v, x)[0]), variables, run, only=only)
