"""A file is recognised by the whole set of its names and shapes, or refused; nothing is dropped silently."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from deeplab_jax.configs import base
from deeplab_jax.errors import UserError
from deeplab_jax.weights import box, contents, conversion, files, recorded_settings
from deeplab_jax.weights.torch import from_state_dict
from tests.weights import writers

CAFFE = {"preprocessing": "caffe_bgr", "stride_on": "1x1", "resize": "corners"}
TORCH = {"preprocessing": "torch_rgb", "stride_on": "3x3"}
ONES = np.ones((4, 4, 1, 1), np.float32)


@pytest.fixture(scope="module")
def resnet():
    """ResNet-101 with its four classifiers, four channels wide."""
    return writers.thin_resnet((3, 4, 23, 3), aspp=True)


def read(state, **options):
    return from_state_dict("port.pth", state, **options)


def check(source, w, without=()):
    """Every array of `w` arrived under its released name, and no other."""
    leaves = {"weight": "kernel", "gamma": "scale", "beta": "bias"}
    wanted = {}
    for name, array in w.items():
        layer, _, leaf = name.rpartition(".")
        if not layer.startswith(tuple(without)):
            wanted[f"{layer}/{leaves.get(leaf, leaf)}"] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    assert sorted(source.arrays) == sorted(wanted)
    for name, array in wanted.items():
        np.testing.assert_array_equal(source.arrays[name], array, err_msg=name)


@pytest.mark.parametrize("prefix", ["", "module.", "Scale.", "module.Scale."])
def test_ports_with_torchvisions_names_keep_their_head_and_caffes_settings(resnet, prefix):
    state = {prefix + k: v for k, v in writers.state_dict(resnet, writers.port_name).items()}
    source = read(state)
    check(source, resnet)
    assert source.settings == CAFFE and not source.left_out and not source.open
    assert (contents.backbone_of(source), contents.head_of(source)) == (
        "resnet101",
        ("aspp", "ASPP of 4 branches, 5 classes"),
    )


def test_a_port_with_two_heads_keeps_the_one_on_the_last_stage(resnet):
    state = writers.state_dict(resnet, writers.port_name)
    state = {k.replace("layer5.", "layer6."): v for k, v in state.items()}
    state |= {f"layer5.conv2d_list.{i}.weight": np.zeros((5, 4, 3, 3), np.float32) for i in range(4)}
    source = read(state)
    check(source, resnet)
    assert sorted(source.left_out) == [f"layer5.conv2d_list.{i}" for i in range(4)]
    assert "serves only training" in source.left_out["layer5.conv2d_list.0"]


def test_deeplab_pytorchs_deeplabv1_has_one_classifier_of_its_classes(resnet):
    state = {k: v for k, v in writers.state_dict(resnet, writers.deeplab_pytorch_name).items() if "aspp" not in k}
    classifier = np.arange(84, dtype=np.float32).reshape(21, 4, 1, 1)
    state = {k.removeprefix("base."): v for k, v in state.items()} | {
        "fc.weight": classifier,
        "fc.bias": np.ones(21, np.float32),
    }
    source = read(state)
    np.testing.assert_array_equal(source.arrays["fc1/kernel"], classifier.transpose(2, 3, 1, 0))
    assert contents.head_of(source) == ("plain", "one 1x1 classifier, 21 classes")
    assert source.settings == CAFFE | {"resize": "half_pixel"}
    state["fc.weight"], state["fc.bias"] = np.zeros((1000, 4), np.float32), np.zeros(1000, np.float32)
    imagenet = read(state)
    assert imagenet.left_out == {"fc": "the ImageNet classifier"} and contents.head_of(imagenet) is None


@pytest.mark.parametrize(
    ("head", "named"),
    [
        ({"classifier.0.convs.0.0.weight": ONES, "aux_classifier.4.weight": ONES}, "DeepLabv3"),
        ({"classifier.0.weight": ONES, "classifier.4.weight": ONES, "classifier.1.running_mean": ONES[0]}, "FCN"),
    ],
)
def test_torchvisions_segmentation_networks_give_their_trunk(resnet, head, named):
    trunk = {f"backbone.{k}": v for k, v in writers.state_dict(resnet, writers.torchvision_name).items()}
    source = read(trunk | head)
    check(source, resnet, without=["fc1"])
    assert source.settings == TORCH and named in source.kind
    assert all(reason == f"the head of torchvision's {named}, which is not DeepLab v2's" for reason in
               source.left_out.values())  # fmt: skip
    assert sorted(source.left_out) == sorted({k.rpartition(".")[0] for k in head})


def test_a_trunk_that_does_not_tell_its_settings_asks(tmp_path, resnet):
    state = writers.state_dict(resnet, writers.torchvision_name)
    source = read(state)
    assert source.settings == {} and source.open == ("preprocessing", "stride_on")
    model = base.get_config().model
    with pytest.raises(UserError, match=r"--preprocessing=torch_rgb .* --stride_on=3x3"):
        conversion.convert(source, model, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="stride_on cannot be determined") as e:
        conversion.convert(read(state), model, tmp_path / "w.safetensors", overrides={"preprocessing": "caffe_bgr"})
    assert "config.model.preprocessing" not in str(e.value)
    vgg = {k: v for k, v in writers.torchvision_vgg(writers.thin_vgg()).items() if k.startswith("features")}
    assert read(vgg).open == ("preprocessing",)
    classified = read(state | {"fc.weight": np.zeros((1000, 4), np.float32)})
    assert classified.settings == TORCH and not classified.open
    finetuned = read(state | {"fc.weight": np.zeros((7, 4), np.float32)})  # seven classes do not reveal its origin
    assert finetuned.open and finetuned.left_out == {"fc": "an image classifier (7 classes)"}


def test_layers_that_are_neither_taken_nor_needless_are_named(resnet):
    state = writers.state_dict(resnet, writers.port_name) | {"fpn.inner.weight": ONES, "fpn.outer.weight": ONES}
    with pytest.raises(UserError, match=r"no layers 'fpn\.inner', 'fpn\.outer'; .*--leave_out='\^fpn\\\.inner\$'"):
        read(state)
    source = read(state, leave_out="^fpn")
    assert source.left_out == dict.fromkeys(["fpn.inner", "fpn.outer"], "left out by --leave_out")
    with pytest.raises(UserError, match=r"'layer1\.0\.conv1'"):
        read(state | {"layer1.0.conv1.weight_g": ONES}, leave_out="^fpn")


def test_two_networks_in_one_file_are_refused(resnet):
    state = writers.state_dict(resnet, writers.port_name)
    both = {f"model.{k}": v for k, v in state.items()} | {f"module.{k}": 2 * v for k, v in state.items()}
    with pytest.raises(UserError, match="holds 'conv1' twice"):
        read(both)


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ({"layer1.0.conv1": (8, 4, 1, 1), "layer1.0.conv2": (8, 2, 3, 3), "layer1.0.conv3": (4, 8, 1, 1)}, "ResNeXt"),
        ({"layer1.0.conv1": (4, 4, 3, 3), "layer1.0.conv2": (4, 4, 3, 3)}, "basic blocks"),
        ({"resnet.encoder.stages.0.convolution": (4, 4, 3, 3)}, "no layer of a VGG-16 or ResNet"),
    ],
)
def test_other_networks_are_refused(layers, says):
    with pytest.raises(UserError, match=says):
        read({f"{k}.weight": np.zeros(shape, np.float32) for k, shape in layers.items()})


@pytest.fixture
def narrow(monkeypatch):
    """The published ResNets, with one block a stage and a second one where ResNet-101 is deeper than ResNet-50."""
    from deeplab_jax.models import resnet

    monkeypatch.setattr(resnet, "BOTTLENECKS", {"resnet101": (1, 1, 2, 1), "resnet50": (1, 1, 1, 1)})
    monkeypatch.setattr(resnet, "BOTTLENECK_WIDTHS", (8, 8, 8, 8))
    monkeypatch.setattr(resnet, "STEM_WIDTH", 8)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("head", ["plain", "aspp"])
def test_a_head_is_never_lost_in_conversion(tmp_path, head):
    """The file's classifiers have another head's names."""
    model = base.get_config().model
    model.head = head
    arrays = zeros(model)
    source = files.read(write(tmp_path / "all.safetensors", arrays))
    other = base.get_config().model
    other.head = "aspp" if head == "plain" else "plain"
    lost = "head/fc1/kernel" if head == "plain" else "head/fc1_c0/kernel"
    with pytest.raises(UserError, match=f"{lost}.*its head is {head} .* the config's is {other.head}"):
        conversion.convert(source, other, tmp_path / "w.safetensors")
    bare = files.read(tmp_path / "all.safetensors", leave_out="^(fc1|fc8)")  # what the error advises
    assert not [name for name in bare.arrays if name.startswith("head/")] and len(bare.arrays) < len(source.arrays)
    trunk = files.read(tmp_path / "all.safetensors", leave_out="^head/")
    report = conversion.convert(trunk, other, tmp_path / "w.safetensors")
    assert all(name.startswith("head/") for name in report.missing) and report.missing
    assert recorded_settings(tmp_path / "w.safetensors") == {"preprocessing": "caffe_bgr"}


@pytest.mark.usefixtures("narrow")
def test_a_deeper_trunk_is_not_cut(tmp_path):
    """All of ResNet-50's layers are among ResNet-101's, of the same shapes."""
    source = files.read(write(tmp_path / "all.safetensors", zeros(base.get_config().model)))
    shallow = base.get_config().model
    shallow.backbone = "resnet50"
    with pytest.raises(UserError, match="arrays of its trunk have no place in the network"):
        conversion.convert(source, shallow, tmp_path / "w.safetensors")


def zeros(model):
    from deeplab_jax.weights import transfer

    targets = conversion.network_shapes(model, 21)
    return {transfer.full_name(path): np.broadcast_to(np.float32(0), t.shape) for path, t in targets.items()}


def write(path, arrays):
    files.write(path, arrays, {"preprocessing": "caffe_bgr"})
    return path


def test_statistics_that_no_image_gives_under_the_preprocessing_are_doubted():
    kernel = np.full((7, 7, 3, 2), 0.1, np.float32)
    limit = ((49 * 0.1 / np.array([0.229, 0.224, 0.225])).sum()) ** 2 / 4
    source = read({"fc.weight": np.zeros((1000, 4), np.float32), "conv1.weight": kernel.transpose(3, 2, 0, 1)})
    for var, doubted in ((0.9 * limit, False), (1.1 * limit, True)):
        source.arrays["bn_conv1/var"] = np.array([1, var], np.float32)
        assert bool(conversion._doubts(source)) == doubted


def test_describe_says_what_a_file_is(resnet):
    text = "\n".join(contents.describe(read(writers.state_dict(resnet, writers.scale_name))))
    for part in (
        "port.pth: a PyTorch port of DeepLab v2's ResNet-101 (layer5.conv2d_list)",
        "backbone: resnet101",
        "head: aspp (ASPP of 4 branches, 5 classes)",
        "config.model.preprocessing = caffe_bgr",
        "config.model.stride_on = 1x1",
        "config.model.resize = corners",
        "--config voc_aspp_l",
    ):
        assert part in text
    open_text = "\n".join(contents.describe(read(writers.state_dict(resnet, writers.torchvision_name))))
    assert "head: none" in open_text and "config.model.stride_on cannot be determined from the file" in open_text


def test_torchvision_safetensors(tmp_path, resnet):
    state = writers.state_dict(resnet, writers.torchvision_name) | {"fc.weight": np.zeros((1000, 4), np.float32)}
    state |= {"bn1.num_batches_tracked": np.array(3)}
    path = tmp_path / "resnet101-cd907fc2.safetensors"
    save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    source = files.read(path)
    check(source, resnet, without=["fc1"])
    assert source.settings == TORCH and source.left_out == {"fc": "the ImageNet classifier"}


def test_an_npz_of_a_state_dict(tmp_path, resnet):
    np.savez(tmp_path / "port.npz", **writers.state_dict(resnet, writers.port_name))
    check(files.read(tmp_path / "port.npz"), resnet)


def test_a_file_without_known_layers_is_told_what_to_give(tmp_path):
    np.savez(tmp_path / "other.npz", a=np.ones(3, np.float32))
    with pytest.raises(UserError) as error:
        files.read(tmp_path / "other.npz")
    assert str(error.value) == (
        f"{tmp_path}/other.npz: holds no layer of a VGG-16 or ResNet under a known name; give the weights of one of "
        "them, under the names of torchvision, timm, Keras, Caffe or a port of DeepLab v2"
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vgg16.npy", "pickle"),
        ("deeplab_resnet.ckpt", "TensorFlow checkpoints are not read"),
        ("model.ckpt-20000.data-00000-of-00001", "TensorFlow checkpoints are not read"),
        ("model.ckpt-20000.index", "TensorFlow checkpoints are not read"),
        ("weights.pkl", "not opened"),
    ],
)
def test_what_is_not_read_gets_a_sentence(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"\x80\x04N.")
    with pytest.raises(UserError, match=says):
        files.read(tmp_path / name)


def test_the_describe_command_needs_neither_config_nor_out(tmp_path, resnet, monkeypatch, capsys):
    from types import SimpleNamespace

    from deeplab_jax import convert_weights

    path = tmp_path / "port.npz"
    np.savez(path, **writers.state_dict(resnet, writers.port_name), **{"fpn.weight": ONES})
    flags = {"describe": True, "config": None, "out": None, "leave_out": "^fpn"}
    monkeypatch.setattr(convert_weights, "FLAGS", SimpleNamespace(**flags))
    convert_weights.main([str(path)])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: a PyTorch port") and "left out: fpn (left out by --leave_out)" in printed
    flags["describe"] = False
    monkeypatch.setattr(convert_weights, "FLAGS", SimpleNamespace(**flags))
    with pytest.raises(UserError, match="--out is missing"):
        convert_weights.main([str(path)])


def test_loose_tensors_are_named_whole_and_can_be_left_out(resnet):
    state = writers.state_dict(resnet, writers.port_name)
    for name in ("pixel_mean", "module.pixel_mean"):
        loose = {k.replace("", "module.", 1) if "." in name else k: v for k, v in state.items()} | {name: np.ones(3)}
        advice = re.escape(f"--leave_out='^{re.escape(name)}$'")
        with pytest.raises(UserError, match=f"which has no layers '{re.escape(name)}'; .*{advice}"):
            read(loose)
        source = read(loose, leave_out=f"^{re.escape(name)}$")
        check(source, resnet)
        assert source.left_out == {name: "left out by --leave_out"}


def test_weights_of_whole_numbers_are_refused(resnet, tmp_path):
    state = writers.state_dict(resnet, writers.port_name)
    name = next(k for k in state if k.endswith(".weight"))
    bad = state | {name: np.ones_like(state[name], np.int8), "bn1.num_batches_tracked": np.int64(3)[None]}
    save_file(bad, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", **bad)
    for suffix in ("safetensors", "npz"):
        with pytest.raises(UserError, match=f"w.{suffix}: '{re.escape(name)}' holds whole numbers, no weights"):
            files.read(tmp_path / f"w.{suffix}")


def test_normalization_without_statistics_and_negative_variances_are_named(resnet):
    state = writers.state_dict(resnet, writers.port_name)
    norm = next(name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean"))
    group = {k: v for k, v in state.items() if not k.startswith(f"{norm}.running")}
    with pytest.raises(UserError, match=f"layer '{norm}' is a normalization without stored statistics"):
        read(group)
    with pytest.raises(UserError, match="holds negative variances; use another copy"):
        read(state | {f"{norm}.running_var": -state[f"{norm}.running_var"]})


def test_configs_of_one_shape_are_named_together(resnet):
    lines = contents.describe(read(writers.state_dict(resnet, writers.port_name)))
    assert "  a config of this network: --config voc_aspp_l or voc_aspp_s" in lines
    assert lines[-1].startswith("  which one cannot be determined from the file")
    shipped = contents.describe(files.read(box.require("camvid") / "model.safetensors"))
    assert "  head: aspp (ASPP of 4 branches with a fine branch, 11 classes)" in shipped
