"""Keras files: legacy and Keras 3, names and order, biases and epsilon folded."""

import os
import subprocess
import sys

import h5py
import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.weights import files
from deeplab_jax.weights.names import from_keras, keras_order
from tests.weights import writers


def write(path, form, w):
    if form == "legacy":
        writers.write_keras_legacy(path, w)
    else:
        writers.write_keras3(path, w, named=form == "named")
    return path


FORMS = ["legacy", "named", "unnamed"]


@pytest.mark.parametrize("form", FORMS)
def test_resnet_computes_the_same_with_biases_and_epsilon_folded(tmp_path, form):
    w = writers.thin_resnet(biases=True)
    source = files.read(write(tmp_path / "resnet50.weights.h5", form, w))
    assert source.settings == {"preprocessing": "caffe_bgr", "stride_on": "1x1"}
    assert not source.left_out
    convs = [name for name in writers.layers_of(w) if f"{name}.weight" in w]
    assert len(convs) == 53
    assert sorted(source.arrays) == sorted(
        [f"{name}/kernel" for name in convs]
        + [f"{bn(name)}/{leaf}" for name in convs for leaf in ("mean", "var", "scale", "bias")]
    )
    x = np.random.default_rng(1).standard_normal((5, 4))
    for name in convs:
        np.testing.assert_array_equal(source.arrays[f"{name}/kernel"], w[f"{name}.weight"].transpose(2, 3, 1, 0))
        theirs = {k: w[f"{bn(name)}.{k}"].astype(np.float64) for k in ("mean", "var", "gamma", "beta")}
        bias = w[f"{name}.bias"]
        wanted = theirs["gamma"] * (x + bias - theirs["mean"]) / np.sqrt(theirs["var"] + 1.001e-5) + theirs["beta"]
        ours = {k: source.arrays[f"{bn(name)}/{k}"] for k in ("mean", "var", "scale", "bias")}
        got = ours["scale"] * (x - ours["mean"]) / np.sqrt(ours["var"] + 1e-5) + ours["bias"]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


def bn(conv):
    return "bn_conv1" if conv == "conv1" else "bn" + conv[3:]


@pytest.mark.parametrize("form", FORMS)
def test_vgg16(tmp_path, form):
    w = writers.thin_vgg()
    source = files.read(write(tmp_path / "vgg16.h5", form, w))
    assert source.left_out == {"predictions": "the ImageNet classifier"}
    assert source.settings == {"preprocessing": "caffe_bgr"}
    np.testing.assert_array_equal(source.arrays["conv5_3/kernel"], w["conv5_3.weight"].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(source.arrays["fc7/kernel"], w["fc7.weight"].transpose(2, 3, 1, 0))
    # Dense over flattened H, W, C is the convolution over the whole window
    features = np.random.default_rng(1).standard_normal((7, 7, 512)).astype(np.float32)
    dense = features.reshape(-1) @ w["fc6.weight"].transpose(2, 3, 1, 0).reshape(-1, 6)
    np.testing.assert_allclose(
        np.einsum("hwc,hwco->o", features, source.arrays["fc6/kernel"]), dense, rtol=1e-3, atol=1e-3
    )
    np.testing.assert_array_equal(source.arrays["fc6/bias"], w["fc6.bias"])


def test_a_model_inside_the_model_is_not_dropped_in_silence(tmp_path):
    path = write(tmp_path / "vgg16.weights.h5", "named", writers.thin_vgg())
    with h5py.File(path, "a") as f:
        f["layers/sequential/layers/dense/vars/0"] = np.zeros((4, 5), np.float32)
        f.create_group("layers/dropout/vars")
    with pytest.raises(UserError, match=r"which has no layers 'sequential'; .*--leave_out='.sequential.'"):
        files.read(path)
    assert files.read(path, "^sequential$").left_out["sequential"] == "left out by --leave_out"


def test_the_first_keras_resnet_has_caffe_names_and_another_epsilon(tmp_path):
    path = tmp_path / "resnet50_weights_tf_dim_ordering_tf_kernels_notop.h5"
    one = np.ones(4, np.float32)
    with h5py.File(path, "w") as f:
        layers = {
            "res4f_branch2a": ["res4f_branch2a_W_1:0", "res4f_branch2a_b_1:0"],
            "bn4f_branch2a": [f"bn4f_branch2a_{k}_1:0" for k in ("gamma", "beta", "running_mean", "running_std")],
        }
        for name, weights in layers.items():
            group = f.create_group(name)
            group.attrs["weight_names"] = [x.encode() for x in weights]
            for weight in weights:
                group[weight] = np.ones((1, 1, 4, 4), np.float32) if "_W_" in weight else one
    arrays = files.read(path).arrays
    np.testing.assert_allclose(arrays["bn4f_branch2a/var"], 1 + 1e-3 - 1e-5, rtol=1e-6)
    np.testing.assert_array_equal(arrays["bn4f_branch2a/mean"], 0 * one)  # mean 1 - bias 1


def test_order_names_every_layer_once():
    for convs, norms in ((13, 0), (53, 53), (104, 104)):
        order = keras_order(convs)
        assert [len(set(names)) for names in order] == [convs, norms]
        assert all(from_keras(name) for names in order for name in names)
    assert keras_order(7) == ([], [])


def test_damaged_files_give_a_sentence(tmp_path):
    whole = write(tmp_path / "whole.h5", "legacy", writers.thin_resnet((1, 1, 1, 1), biases=True))
    content = whole.read_bytes()
    rng = np.random.default_rng(0)
    contents = [content[: len(content) * i // 7] for i in range(7)] + [rng.bytes(3000), b"<html>"]
    for i, damaged in enumerate(contents):
        path = tmp_path / f"{i}.weights.h5"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{i}.weights.h5"):
            files.read(path)
    with h5py.File(whole, "w") as f:
        f.create_group("conv1_conv").attrs["weight_names"] = ["missing"]
    with pytest.raises(UserError, match="damaged"):
        files.read(whole)
    with h5py.File(whole, "w") as f:
        f["layers"] = np.ones(3)
    with pytest.raises(UserError, match="damaged"):
        files.read(whole)


KERAS = """
import sys, keras, numpy as np, h5py
from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group
folder = sys.argv[1]
network = keras.applications.ResNet50(weights=None, include_top=False, input_shape=(97, 97, 3))
rng = np.random.default_rng(0)
for layer in network.layers:
    values = [v + 0.1 * rng.uniform(size=v.shape) * (v.ndim == 1) for v in layer.get_weights()]
    layer.set_weights(values)
network.save_weights(folder + "/new.weights.h5")
with h5py.File(folder + "/legacy.h5", "w") as f:
    save_weights_to_hdf5_group(f, network)
image = np.load(folder + "/image.npy")
bgr = image[..., ::-1] - np.array([104.008, 116.669, 122.675])
np.save(folder + "/features.npy", network.predict(bgr.astype(np.float32), verbose=0))
"""


@pytest.mark.long
def test_keras_own_resnet50_gives_the_same_features(tmp_path):
    pytest.importorskip("keras", reason="Keras is not installed")
    from deeplab_jax.models import preprocess
    from deeplab_jax.models.architecture import Architecture
    from deeplab_jax.models.resnet import ResNet

    image = np.random.default_rng(0).uniform(0, 255, (1, 97, 97, 3)).astype(np.float32)
    np.save(tmp_path / "image.npy", image)
    subprocess.run([sys.executable, "-c", KERAS, str(tmp_path)], check=True, env={**os.environ, "KERAS_BACKEND": "jax"})
    theirs = np.load(tmp_path / "features.npy")
    trunk = ResNet(Architecture(backbone="resnet50", head="plain", output_stride=32))
    for name in ("new.weights.h5", "legacy.h5"):
        source = files.read(tmp_path / name)
        variables = {"params": {}, "batch_stats": {}}
        for key, value in source.arrays.items():
            layer, leaf = key.split("/")
            variables["batch_stats" if leaf in ("mean", "var") else "params"].setdefault(layer, {})[leaf] = value
        ours = trunk.apply(variables, preprocess(image, "caffe_bgr"))["last"]
        assert ours.shape == theirs.shape == (1, 4, 4, 2048)
        assert np.abs(ours - theirs).max() < 1e-4 * np.ptp(theirs)
