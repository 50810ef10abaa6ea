"""Writes weights in each published form, independently of the package's readers.

Weights are dicts as in `reference_torch`: `<Caffe layer>.<leaf>` -> array.
"""

import re
import struct

import h5py
import numpy as np


def thin_resnet(stages=(3, 4, 6, 3), biases=False, aspp=False):
    """Every layer of a ResNet, four channels wide."""
    rng = np.random.default_rng(0)
    w = {}

    def conv_bn(name, bn, side):
        w[f"{name}.weight"] = rng.standard_normal((4, 4, side, side)).astype(np.float32)
        if biases:
            w[f"{name}.bias"] = rng.standard_normal(4).astype(np.float32)
        for leaf in ("mean", "var", "gamma", "beta"):
            w[f"{bn}.{leaf}"] = rng.uniform(0.5, 2, 4).astype(np.float32)

    conv_bn("conv1", "bn_conv1", 7)
    for stage, count in enumerate(stages, 2):
        for i in range(count):
            letter = chr(ord("a") + i) if count == 3 else "a" if i == 0 else f"b{i}"
            for branch in ("1", "2a", "2b", "2c") if i == 0 else ("2a", "2b", "2c"):
                name = f"{stage}{letter}_branch{branch}"
                conv_bn(f"res{name}", f"bn{name}", 3 if branch == "2b" else 1)
    for i in range(4 if aspp else 0):
        w[f"fc1_c{i}.weight"] = rng.standard_normal((5, 4, 3, 3)).astype(np.float32)
        w[f"fc1_c{i}.bias"] = rng.standard_normal(5).astype(np.float32)
    return w


def thin_vgg():
    """Every layer of ImageNet's VGG-16, four channels wide, fc6 on its true 7x7x512."""
    rng = np.random.default_rng(0)
    w = {}
    shapes = {f"conv{s}_{i}": (4, 4, 3, 3) for s, n in enumerate((2, 2, 3, 3, 3), 1) for i in range(1, n + 1)}
    for name, shape in (shapes | {"fc6": (6, 512, 7, 7), "fc7": (6, 6, 1, 1), "fc8": (1000, 6, 1, 1)}).items():
        w[f"{name}.weight"] = rng.standard_normal(shape).astype(np.float32)
        w[f"{name}.bias"] = rng.standard_normal(shape[0]).astype(np.float32)
    return w


# --- Caffe: protobuf's wire format by hand, field numbers as in caffe.proto --------------------------------------


def varint(n):
    out = bytearray()
    while True:
        out.append((n & 0x7F) | (0x80 if n > 0x7F else 0))
        n >>= 7
        if not n:
            return bytes(out)


def field(number, value):
    """One field: an int as varint, a float as fixed32, bytes or str length-delimited."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def blob(array, legacy):
    """BlobProto: data = 5; shape = 7 { dim = 1 }, or in old files num, channels, height, width = 1..4."""
    array = np.asarray(array, "<f4")
    if legacy:
        dims = (1,) * (4 - array.ndim) + array.shape
        head = b"".join(field(i, n) for i, n in enumerate(dims, 1))
    else:
        head = field(7, field(1, b"".join(varint(n) for n in array.shape)))
    return head + field(5, array.tobytes())


V1_TYPES = {"Convolution": 4, "InnerProduct": 14, "Pooling": 17, "ReLU": 18, "ImageData": 12}


def caffe_layer(name, kind, blobs=(), legacy=False, extra=b""):
    if legacy:  # V1LayerParameter: bottom = 2, top = 3, name = 4, type = 5, blobs = 6, blobs_lr = 7
        body = field(2, "below") + field(3, name) + field(4, name) + field(5, V1_TYPES[kind])
        body += b"".join(field(6, blob(b, True)) for b in blobs) + field(7, 1.0) + field(7, 2.0)
        return field(2, body + extra)
    # LayerParameter: name = 1, type = 2, bottom = 3, top = 4, blobs = 7, convolution_param = 106
    body = field(1, name) + field(2, kind) + field(3, "below") + field(4, name)
    body += b"".join(field(7, blob(b, False)) for b in blobs)
    return field(100, body + field(106, field(1, 21) + field(4, 3)) + extra)


def write_caffe_resnet(path, w, classifier="fc1_voc12_c{}", factor=999.98, epsilon=None):
    """DeepLab v2's ResNet: Convolution, BatchNorm (sums and their factor), Scale, and the copies of other scales."""
    with open(path, "wb") as f:
        f.write(field(1, "deeplab_v2_resnet101") + caffe_layer("data", "ImageSegData"))
        for name in layers_of(w):
            if name.startswith("fc1_c"):
                f.write(caffe_layer(classifier.format(name[-1]), "Convolution", conv_blobs(w, name)))
            elif f"{name}.mean" in w:
                sums = [w[f"{name}.mean"] * np.float32(factor), w[f"{name}.var"] * np.float32(factor), [factor]]
                extra = field(139, field(1, 1) + (field(3, epsilon) if epsilon else b""))
                f.write(caffe_layer(name, "BatchNorm", sums, extra=extra))
                scale = "scale_conv1" if name == "bn_conv1" else "scale" + name[2:]
                f.write(caffe_layer(scale, "Scale", [w[f"{name}.gamma"], w[f"{name}.beta"]]))
            else:
                f.write(caffe_layer(name, "Convolution", conv_blobs(w, name)) + caffe_layer(f"{name}_relu", "ReLU"))
        for scale in ("res075", "res05"):
            for name in layers_of(w):
                f.write(caffe_layer(f"{name}_{scale}", "Convolution", [np.zeros(1)]))


def write_caffe_vgg(path, w, legacy, classifier="fc8_voc12", dense=False):
    """VGG-16 in either form; `dense` writes the ImageNet network's fc6..fc8 as InnerProduct layers."""
    with open(path, "wb") as f:
        f.write(field(1, "vgg") + caffe_layer("data", "ImageData", legacy=legacy))
        for name in layers_of(w):
            kind, blobs = "Convolution", conv_blobs(w, name)
            if dense and name.startswith("fc"):
                kind, blobs = "InnerProduct", [blobs[0].reshape(len(blobs[0]), -1), blobs[1]]
            if name.startswith("fc8") and not dense:
                name = classifier + name[3:]
            f.write(caffe_layer(name, kind, blobs, legacy))
            f.write(caffe_layer(f"relu_{name}", "ReLU", legacy=legacy) + caffe_layer("pool", "Pooling", legacy=legacy))


def layers_of(w):
    return list(dict.fromkeys(name.rpartition(".")[0] for name in w))


def conv_blobs(w, name):
    return [w[f"{name}.{leaf}"] for leaf in ("weight", "bias") if f"{name}.{leaf}" in w]


# --- PyTorch ------------------------------------------------------------------------------------------------------

LEAVES = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}


def block_index(letters):
    return int(letters[1:]) if letters[1:] else ord(letters) - ord("a")


def torchvision_name(layer):
    found = re.fullmatch(r"(res|bn)(\d)(\w+)_branch(\w+)", layer)
    if not found:
        return {"conv1": "conv1", "bn_conv1": "bn1"}.get(layer)
    kind, stage, letters, branch = found.groups()
    if branch == "1":
        inner = "downsample.0" if kind == "res" else "downsample.1"
    else:
        inner = ("conv" if kind == "res" else "bn") + str("abc".index(branch[1]) + 1)
    return f"layer{int(stage) - 1}.{block_index(letters)}.{inner}"


def deeplab_pytorch_name(layer):
    found = re.fullmatch(r"(res|bn)(\d)(\w+)_branch(\w+)", layer)
    if not found:
        known = {"conv1": "base.layer1.conv1.conv", "bn_conv1": "base.layer1.conv1.bn"}
        return known.get(layer) or f"base.aspp.c{layer[-1]}"
    kind, stage, letters, branch = found.groups()
    inner = {"1": "shortcut", "2a": "reduce", "2b": "conv3x3", "2c": "increase"}[branch]
    return f"base.layer{stage}.block{block_index(letters) + 1}.{inner}.{'conv' if kind == 'res' else 'bn'}"


def port_name(layer):
    """Ports of DeepLab v2's ResNet-101 with torchvision's names and the classifiers as a fifth layer."""
    return f"layer5.conv2d_list.{layer[-1]}" if layer.startswith("fc1_c") else torchvision_name(layer)


def scale_name(layer):
    """The same behind `Scale.`"""
    return f"Scale.{port_name(layer)}"


def deeplab_pytorch_old_name(layer):
    """Before its names changed: `scale.`, `proj`, and the classifiers counted by numbers alone."""
    name = deeplab_pytorch_name(layer).replace("base.", "scale.").replace("shortcut", "proj")
    return name.replace("aspp.c", "aspp.stages.")


def state_dict(w, rename):
    out = {}
    for name, array in w.items():
        layer, _, leaf = name.rpartition(".")
        if rename(layer):
            out[f"{rename(layer)}.{LEAVES.get(leaf, leaf)}"] = array
    return out


VGG_FEATURES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def torchvision_vgg(w):
    """ImageNet VGG-16: features.N and classifier.{0,3,6}, Linear over flattened C, H, W."""
    convs = [name for name in layers_of(w) if name.startswith("conv")]
    out = {}
    for number, name in [*zip(VGG_FEATURES, convs, strict=True), (0, "fc6"), (3, "fc7"), (6, "fc8")]:
        where = "features" if name.startswith("conv") else "classifier"
        weight = w[f"{name}.weight"]
        out[f"{where}.{number}.weight"] = weight if where == "features" else weight.reshape(len(weight), -1)
        out[f"{where}.{number}.bias"] = w[f"{name}.bias"]
    return out


# --- Keras --------------------------------------------------------------------------------------------------------


def keras_name(layer):
    found = re.fullmatch(r"(res|bn)(\d)(\w+)_branch(\w+)", layer)
    if found:
        kind, stage, letters, branch = found.groups()
        number = {"1": 0, "2a": 1, "2b": 2, "2c": 3}[branch]
        return f"conv{stage}_block{block_index(letters) + 1}_{number}_{'conv' if kind == 'res' else 'bn'}"
    found = re.fullmatch(r"conv(\d)_(\d)", layer)
    if found:
        return f"block{found[1]}_conv{found[2]}"
    return {"conv1": "conv1_conv", "bn_conv1": "conv1_bn", "fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}[layer]


def keras_layers(w):
    """Layers in Keras' order with its arrays: HWIO kernels, Dense over flattened H, W, C, gamma beta mean variance."""
    names = layers_of(w)
    # in a block with a shortcut Keras has the shortcut third: 2a, 2b, shortcut, 2c
    for name in [n for n in names if n.startswith("res") and n.endswith("branch1")]:
        i = names.index(name)
        names[i : i + 6] = [*names[i + 2 : i + 6], *names[i : i + 2]]
    for name in names:
        if f"{name}.mean" in w:
            yield keras_name(name), "batch_normalization", [w[f"{name}.{k}"] for k in ("gamma", "beta", "mean", "var")]
            continue
        kernel = w[f"{name}.weight"].transpose(2, 3, 1, 0)
        kind = "conv2d"
        if name.startswith("fc"):
            kind, kernel = "dense", kernel.reshape(-1, kernel.shape[-1])
        yield keras_name(name), kind, [kernel, w[f"{name}.bias"]]


def write_keras_legacy(path, w):
    leaves = {"batch_normalization": ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")}
    with h5py.File(path, "w") as f:
        layers = list(keras_layers(w))
        f.attrs["layer_names"] = [name.encode() for name, _, _ in layers]
        f.create_group("pool1_pad").attrs["weight_names"] = np.array([], "S1")
        for name, kind, arrays in layers:
            group = f.create_group(name)
            weights = [f"{name}/{leaf}" for leaf in leaves.get(kind, ("kernel:0", "bias:0"))]
            group.attrs["weight_names"] = [x.encode() for x in weights]
            for weight, array in zip(weights, arrays, strict=True):
                group[weight] = array


def write_keras3(path, w, named):
    """`layers/<class>_<n>/vars/<i>`; newer versions put the layer's name in an attribute."""
    counts = {}
    with h5py.File(path, "w") as f:
        f.create_group("layers/activation/vars")
        f.create_group("vars")
        for name, kind, arrays in keras_layers(w):
            n = counts[kind] = counts.get(kind, -1) + 1
            group = f.create_group(f"layers/{kind}_{n}/vars" if n else f"layers/{kind}/vars")
            if named:
                group.attrs["name"] = name
            for i, array in enumerate(arrays):
                group[str(i)] = array
