"""PyTorch checkpoints: the three conventions, both containers, and nothing unpickled but tensors."""

import pickle
import sys
import zipfile

import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.weights import files
from deeplab_jax.weights.torch import from_state_dict
from tests.weights import writers

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
torch.set_num_threads(1)  # idle OpenMP threads spin


@pytest.fixture
def resnet():
    return writers.thin_resnet(aspp=True)


def as_tensors(state):
    return {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()}


def check(source, w, skip_head=False):
    """Every array of `w` arrived under its released name."""
    leaves = {"weight": "kernel", "gamma": "scale", "beta": "bias"}
    wanted = {}
    for name, array in w.items():
        layer, _, leaf = name.rpartition(".")
        if not (skip_head and layer.startswith("fc1")):
            wanted[f"{layer}/{leaves.get(leaf, leaf)}"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    assert sorted(source.arrays) == sorted(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(source.arrays[name], array, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_torchvision_resnet_pth(tmp_path, resnet, prefix):
    state = {prefix + k: v for k, v in writers.state_dict(resnet, writers.torchvision_name).items()}
    state[f"{prefix}fc.weight"], state[f"{prefix}bn1.num_batches_tracked"] = np.ones((1000, 4), np.float32), np.int64(3)
    path = tmp_path / "resnet50.pth"
    tensors = as_tensors({k: np.asarray(v) for k, v in state.items()})
    torch.save({"epoch": 3, "state_dict": tensors} if prefix else tensors, path)
    source = files.read(path)
    check(source, resnet, skip_head=True)
    assert source.settings == {"preprocessing": "torch_rgb", "stride_on": "3x3"}
    assert source.left_out == {f"{prefix}fc": "the ImageNet classifier"}


def test_timm_resnet_safetensors_needs_no_torch(tmp_path, resnet, monkeypatch):
    from safetensors.torch import save_file

    path = tmp_path / "model.safetensors"
    save_file(as_tensors(writers.state_dict(resnet, writers.torchvision_name)), path, metadata={"format": "pt"})
    monkeypatch.setitem(sys.modules, "torch", None)
    check(files.read(path), resnet, skip_head=True)
    pth = tmp_path / "model.pth"
    pth.write_bytes(b"x")
    with pytest.raises(UserError, match="pip install torch"):
        files.read(pth)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_safetensors(tmp_path, dtype):
    from safetensors.torch import save_file

    weight = torch.arange(27 * 2, dtype=getattr(torch, dtype)).reshape(2, 3, 3, 3)
    path = tmp_path / "half.safetensors"
    save_file({"features.0.weight": weight}, path)
    kernel = files.read(path).arrays["conv1_1/kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, weight.float().numpy().transpose(2, 3, 1, 0))


@pytest.mark.parametrize("generation", ["base", "scale", "numbers"])
def test_deeplab_pytorch_checkpoint(tmp_path, resnet, generation):
    """`aspp.c0`, before that `aspp.stages.c0`, before that `aspp.stages.0`."""
    names = {"base": writers.deeplab_pytorch_name}.get(generation, writers.deeplab_pytorch_old_name)
    state = writers.state_dict(resnet, names)
    if generation == "scale":
        state = {k.replace("stages.", "stages.c"): v for k, v in state.items()}
    path = tmp_path / "deeplabv2_resnet101_msc-vocaug-20000.pth"
    torch.save(as_tensors(state), path)
    source = files.read(path)
    check(source, resnet)
    assert source.settings == {"preprocessing": "caffe_bgr", "stride_on": "1x1", "resize": "half_pixel"}


@pytest.mark.parametrize("timm", [False, True])
def test_imagenet_vgg16(tmp_path, timm):
    w = writers.thin_vgg()
    state = writers.torchvision_vgg(w)
    if timm:
        for number, name in ((0, "pre_logits.fc1"), (3, "pre_logits.fc2"), (6, "head.fc")):
            weight = state.pop(f"classifier.{number}.weight")
            shape = {0: (6, 512, 7, 7), 3: (6, 6, 1, 1), 6: weight.shape}[number]  # timm keeps fc6, fc7 as convs
            state[f"{name}.weight"] = weight.reshape(shape)
            state[f"{name}.bias"] = state.pop(f"classifier.{number}.bias")
    path = tmp_path / "vgg16-397923af.pth"
    torch.save(as_tensors(state), path)
    source = files.read(path)
    check(source, {k: v for k, v in w.items() if not k.startswith("fc8")})
    assert source.settings == {"preprocessing": "torch_rgb"}
    features = np.random.default_rng(1).standard_normal((512, 7, 7)).astype(np.float32)
    dense = torch.nn.functional.linear(
        torch.from_numpy(features.reshape(-1)), torch.from_numpy(w["fc6.weight"]).reshape(6, -1)
    )
    by_convolution = np.einsum("chw,hwco->o", features, source.arrays["fc6/kernel"])
    np.testing.assert_allclose(by_convolution, dense.numpy(), rtol=1e-3, atol=1e-4)


def test_vgg_with_batch_norm_is_refused(tmp_path):
    ones = np.ones(64, np.float32)
    state = {"features.0.weight": np.ones((64, 3, 3, 3), np.float32), "features.1.weight": ones}
    state |= {"features.1.running_mean": ones, "features.1.running_var": ones, "features.1.bias": ones}
    with pytest.raises(UserError, match="vgg16_bn"):
        from_state_dict(tmp_path / "vgg16_bn.pth", state)


class Malicious:
    """Unpickling this would write a file."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return (open, (self.marker, "w"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"state_dict": Malicious(marker)}, path)
    with pytest.raises(UserError, match="is not unpickled"):
        files.read(path)
    assert not marker.exists()


def test_a_whole_module_is_refused_in_our_own_words(tmp_path):
    path = tmp_path / "module.pth"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(UserError) as error:
        files.read(path)
    assert str(error.value) == (
        f"{path}: holds more than tensors (torch.nn.modules.linear.Linear), and is not unpickled, since that can run "
        "any code; save its weights alone with torch.save(network.state_dict(), ...)"
    )
    path.write_bytes(b"<html>")
    with pytest.raises(UserError) as error:
        files.read(path)
    assert str(error.value) == (
        f"{path}: is damaged, or holds more than tensors, and is not unpickled; download or save it again"
    )
    torch.save({"conv1.weight": torch.eye(4).to_sparse()}, path)
    with pytest.raises(
        UserError, match=r"are not plain arrays \(sparse, quantized or without values\); save dense ones$"
    ):
        files.read(path)


def test_damaged_files_give_a_sentence(tmp_path):
    whole = tmp_path / "whole.pth"
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7)}, whole)
    content = whole.read_bytes()
    rng = np.random.default_rng(0)
    contents = [content[: len(content) * i // 7] for i in range(7)] + [rng.bytes(n) for n in (1, 50, 3000)]
    for i, damaged in enumerate([*contents, b"<html>", b"\x80\x02}q\x00."]):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{i}.pth"):
            files.read(path)
    for content in (torch.ones(3), {"a": 3}, {"state_dict": 5}, ["x"]):
        torch.save(content, whole)
        with pytest.raises(UserError, match=r"whole\.pth"):
            files.read(whole)


def test_damaged_safetensors_give_a_sentence(tmp_path):
    from safetensors.numpy import save_file

    whole = tmp_path / "whole.safetensors"
    save_file({"conv1.weight": np.ones((4, 3, 7, 7), np.float32)}, whole)
    content = whole.read_bytes()
    contents = [content[: len(content) * i // 7] for i in range(7)] + [
        np.random.default_rng(0).bytes(200),
        b"\xff" * 64,
    ]
    for i, damaged in enumerate(contents):
        path = tmp_path / f"{i}.safetensors"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{i}.safetensors"):
            files.read(path)


def nested(where, state):
    """The state dict as a training script saves it, with an optimizer and counters around."""
    inner = as_tensors(state)
    for key in reversed(where):
        inner = {key: inner, "epoch": 3, "best": 0.5}
    moments = {i: {"exp_avg": torch.ones(2), "step": torch.ones(())} for i in range(2)}
    return inner | {"optimizer": {"state": moments, "param_groups": [{"lr": 0.1}]}, "lr_scheduler": {"last": 3}}


@pytest.mark.parametrize(
    "where",
    [("model",), ("state_dict",), ("module",), ("net",), ("model", "state_dict"), ("student",), ("a", "b", "c")],
)
def test_a_nested_state_dict_is_found(tmp_path, resnet, where):
    path = tmp_path / "checkpoint.pth"
    torch.save(nested(where, writers.state_dict(resnet, writers.deeplab_pytorch_name)), path)
    check(files.read(path), resnet)


def test_of_several_networks_the_named_one_is_taken_or_none(tmp_path, resnet):
    state = writers.state_dict(resnet, writers.deeplab_pytorch_name)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": as_tensors(state), "ema": as_tensors({k: 0 * v for k, v in state.items()})}, path)
    check(files.read(path), resnet)
    torch.save({"generator": as_tensors(state), "discriminator": as_tensors(state)}, path)
    with pytest.raises(UserError, match=r"several networks \(generator, discriminator\)"):
        files.read(path)


def test_other_state_dicts_of_a_checkpoint_are_named(tmp_path, resnet):
    state = as_tensors(writers.state_dict(resnet, writers.port_name))
    head = {"conv.weight": torch.zeros(5, 4, 1, 1), "conv.bias": torch.zeros(5)}
    torch.save({"model": state, "head": head}, tmp_path / "w.pth")
    source = files.read(tmp_path / "w.pth")
    check(source, resnet)
    assert source.left_out == {"head": "another state dict than the network's"}
    (tmp_path / "w.pth").rename(tmp_path / "epoch=3.ckpt")  # as PyTorch Lightning names its checkpoints
    check(files.read(tmp_path / "epoch=3.ckpt"), resnet)


def test_dicts_that_share_a_child_are_walked_once(tmp_path):
    inner: dict = {}
    for _ in range(4):
        inner = {f"k{n}": inner for n in range(300)}
    torch.save(inner, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no state dict"):
        files.read(tmp_path / "w.pth")


@pytest.mark.parametrize("zipped", (True, False))
def test_a_pickle_that_allocates_is_not_loaded(tmp_path, monkeypatch, zipped):
    class Large:
        def __reduce__(self):
            return bytearray, (1 << 40,)

    torch.save({"x": Large()}, tmp_path / "w.pth", _use_new_zipfile_serialization=zipped)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"w\.pth: holds more than tensors \(bytearray\), and is not unpickled"):
        files.read(tmp_path / "w.pth")
    if zipped:  # a harmless pickle before it hides nothing
        with zipfile.ZipFile(tmp_path / "w.pth") as before, zipfile.ZipFile(tmp_path / "two.pth", "w") as after:
            after.writestr("archive/a.pkl", pickle.dumps([]))
            for name in before.namelist():
                after.writestr(name, before.read(name))
        with pytest.raises(UserError, match=r"two\.pth: holds more than tensors \(bytearray\)"):
            files.read(tmp_path / "two.pth")
