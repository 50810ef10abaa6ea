"""Caffe files: both forms, batch norm's factor, copies of other scales, damaged files."""

import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.weights import files
from tests.weights import writers
from tests.weights.writers import caffe_layer, field

RNG = np.random.default_rng(0)


def write(path, *layers):
    path.write_bytes(field(1, "net") + b"".join(layers))
    return path


@pytest.mark.parametrize("legacy", [False, True])
def test_a_convolution_is_transposed_to_hwio(tmp_path, legacy):
    kernel, bias = RNG.standard_normal((4, 3, 5, 2)).astype(np.float32), np.arange(4, dtype=np.float32)
    path = write(tmp_path / "a.caffemodel", caffe_layer("conv1_1", "Convolution", [kernel, bias], legacy))
    source = files.read(path)
    assert source.arrays["conv1_1/kernel"].shape == (5, 2, 3, 4)
    assert source.arrays["conv1_1/kernel"][4, 1, 2, 3] == kernel[3, 2, 4, 1]
    np.testing.assert_array_equal(source.arrays["conv1_1/bias"], bias)
    assert source.settings["preprocessing"] == "caffe_bgr"


def test_batch_norm_divides_by_its_factor_and_takes_the_scale_layer(tmp_path):
    mean, var, gamma, beta = RNG.uniform(0.5, 2, (4, 6)).astype(np.float32)
    path = write(
        tmp_path / "a.caffemodel",
        caffe_layer("bn2a_branch1", "BatchNorm", [mean * 8, var * 8, [8.0]]),
        caffe_layer("scale2a_branch1", "Scale", [gamma, beta]),
        caffe_layer("bn_conv1", "BatchNorm", [mean, var, [1.0]], extra=field(139, field(3, 2e-5))),
    )
    arrays = files.read(path).arrays
    np.testing.assert_allclose(arrays["bn2a_branch1/mean"], mean)
    np.testing.assert_allclose(arrays["bn2a_branch1/var"], var)
    np.testing.assert_array_equal(arrays["bn2a_branch1/scale"], gamma)
    np.testing.assert_array_equal(arrays["bn2a_branch1/bias"], beta)
    # another epsilon: var + 2e-5 = var' + 1e-5; no Scale layer: neither scaled nor shifted
    np.testing.assert_allclose(arrays["bn_conv1/var"], var + 1e-5, rtol=1e-7)
    assert arrays["bn_conv1/scale"].tolist() == [1] * 6 and arrays["bn_conv1/bias"].tolist() == [0] * 6


def test_a_convolution_bias_ahead_of_batch_norm_is_folded_into_its_mean(tmp_path):
    """ImageNet's ResNet-50 has one on conv1."""
    bias, mean, var = np.float32([1, -2]), np.float32([0.5, 0.25]), np.float32([1, 1])
    path = write(
        tmp_path / "a.caffemodel",
        caffe_layer("conv1", "Convolution", [np.ones((2, 3, 7, 7)), bias]),
        caffe_layer("bn_conv1", "BatchNorm", [mean, var, [1.0]]),
    )
    arrays = files.read(path).arrays
    assert "conv1/bias" not in arrays
    np.testing.assert_array_equal(arrays["bn_conv1/mean"], mean - bias)


def test_copies_of_other_scales_and_the_imagenet_classifier_are_left_out(tmp_path):
    conv = np.ones((2, 3, 1, 1))
    path = write(
        tmp_path / "a.caffemodel",
        caffe_layer("res5a_branch1", "Convolution", [conv]),
        caffe_layer("res5a_branch1_res075", "Convolution", [2 * conv]),
        caffe_layer("res05_res5a_branch1", "Convolution", [3 * conv]),
        caffe_layer("fc1000", "InnerProduct", [np.ones((1000, 2)), np.ones(1000)]),
        caffe_layer("fc8", "InnerProduct", [np.ones((1000, 2)), np.ones(1000)]),
        caffe_layer("fc1_voc12_c3", "Convolution", [np.ones((21, 2, 3, 3)), np.ones(21)]),
    )
    source = files.read(path)
    assert sorted(source.arrays) == ["fc1_c3/bias", "fc1_c3/kernel", "res5a_branch1/kernel"]
    assert source.arrays["res5a_branch1/kernel"].max() == 1
    assert sorted(source.left_out) == ["fc1000", "fc8", "res05_res5a_branch1", "res5a_branch1_res075"]


@pytest.mark.parametrize("legacy", [False, True])
def test_fc6_as_inner_product_is_the_convolution_over_the_whole_window(tmp_path, legacy):
    weight = RNG.standard_normal((5, 512 * 49)).astype(np.float32)
    features = RNG.standard_normal((512, 7, 7)).astype(np.float32)
    path = write(
        tmp_path / "a.caffemodel",
        caffe_layer("fc6", "InnerProduct", [weight, np.zeros(5)], legacy),
        caffe_layer("fc7", "InnerProduct", [weight[:, :4096], np.zeros(5)], legacy),
    )
    arrays = files.read(path).arrays
    assert arrays["fc6/kernel"].shape == (7, 7, 512, 5) and arrays["fc7/kernel"].shape == (1, 1, 4096, 5)
    by_convolution = np.einsum("chw,hwco->o", features, arrays["fc6/kernel"])
    np.testing.assert_allclose(by_convolution, weight @ features.reshape(-1), rtol=1e-3, atol=1e-3)


def test_double_precision_blobs(tmp_path):
    values = RNG.standard_normal(3)
    double = field(7, field(1, writers.varint(3))) + field(8, values.astype("<f8").tobytes())
    kernel = writers.blob(np.ones((3, 3, 1, 1)), False)
    layer = field(1, "conv1_1") + field(2, "Convolution") + field(7, kernel) + field(7, double)
    arrays = files.read(write(tmp_path / "a.caffemodel", field(100, layer))).arrays
    np.testing.assert_allclose(arrays["conv1_1/bias"], values, rtol=1e-6)


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (field(100, field(1, "conv1") + field(7, field(7, field(1, b"\x05")) + field(5, b"\0" * 8))), "2 values for"),
        (field(100, field(1, "conv1") + field(7, field(5, b"\0" * 7))), "damaged"),
        (caffe_layer("bn_conv1", "BatchNorm", [[1.0], [1.0], [0.0]]), "factor is 0"),
        (caffe_layer("bn_conv1", "BatchNorm", [[1.0]]), "damaged"),
        (caffe_layer("conv1", "Convolution", [[np.nan]]), "damaged"),
        (caffe_layer("conv1", "Convolution", [np.full((1, 1, 1, 1), np.nan)]), "not finite"),
        (caffe_layer("pool", "Pooling"), "holds no layer"),
        (caffe_layer("fc6", "InnerProduct", [np.ones((3, 1024))]), "not a square window"),
    ],
)
def test_damaged_layers_are_named(tmp_path, layer, says):
    with pytest.raises(UserError, match=says) as e:
        files.read(write(tmp_path / "a.caffemodel", layer))
    assert "a.caffemodel" in str(e.value)


def test_truncated_and_garbage_files_give_a_sentence(tmp_path):
    whole = caffe_layer("conv1_1", "Convolution", [np.ones((4, 3, 3, 3)), np.ones(4)]) + caffe_layer(
        "conv1_2", "Convolution", [np.ones((4, 4, 3, 3)), np.ones(4)], legacy=True
    )
    contents = [whole[:n] for n in (1, 5, 30, 100, len(whole) // 2, len(whole) - 1)]
    contents += [RNG.bytes(n) for n in (1, 10, 1000, 5000)] + [b"", b"<html>not found</html>", b"\xff" * 100]
    for i, content in enumerate(contents):
        path = tmp_path / f"{i}.caffemodel"
        path.write_bytes(content)
        # a file cut between layers reads as a smaller network: its trunk is incomplete, which conversion notices
        try:
            source = files.read(path)
        except UserError as e:
            assert str(path) in str(e)
        else:
            assert set(source.arrays) < {f"conv1_{i}/{leaf}" for i in "12" for leaf in ("kernel", "bias")}


def test_flipped_bytes_never_escape_as_another_exception(tmp_path):
    whole = bytearray(caffe_layer("conv1_1", "Convolution", [np.ones((2, 3, 1, 1)), np.ones(2)]))
    path = tmp_path / "a.caffemodel"
    for position in range(len(whole)):
        damaged = whole.copy()
        damaged[position] ^= 0x55
        path.write_bytes(bytes(damaged))
        try:
            files.read(path)
        except UserError:
            continue
