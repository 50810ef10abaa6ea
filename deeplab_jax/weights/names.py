"""The tables of names: each framework's names for the layers conv1 ... fc8 of the released Caffe networks.

Every function takes one name from a foreign file and returns the released name (`res4b22_branch2a`, `bn_conv1`,
`conv5_3`, `fc6`, `fc1_c0`), or None if the network has no such layer.
"""

import re

# ResNet's four convolutions in a bottleneck
_KAZUTO_BRANCHES = {"shortcut": "1", "proj": "1", "reduce": "2a", "conv3x3": "2b", "increase": "2c"}
_TORCH_BRANCHES = {
    "downsample.0": ("res", "1"), "downsample.1": ("bn", "1"),
    "conv1": ("res", "2a"), "bn1": ("bn", "2a"), "conv2": ("res", "2b"), "bn2": ("bn", "2b"),
    "conv3": ("res", "2c"), "bn3": ("bn", "2c"),
}  # fmt: skip
_KERAS_BRANCHES = {"0": "1", "1": "2a", "2": "2b", "3": "2c"}

# VGG-16: convolutions per stage; torch numbers convolutions, ReLUs and pools in one sequence
_VGG_STAGES = (2, 2, 3, 3, 3)
VGG_TRUNK = tuple(f"conv{s}_{i}" for s, n in enumerate(_VGG_STAGES, 1) for i in range(1, n + 1))
_VGG_FEATURES = dict(
    zip((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), VGG_TRUNK, strict=True)
)  # torchvision's `features.N`

# torchvision's classifier.{0,3,6}, timm's pre_logits and head, Keras' fc1, fc2 and predictions
_VGG_DENSE = {
    "classifier.0": "fc6", "classifier.3": "fc7", "pre_logits.fc1": "fc6", "pre_logits.fc2": "fc7",
    "fc1": "fc6", "fc2": "fc7",
}  # fmt: skip
_IMAGENET_CLASSIFIERS = {"fc", "classifier.6", "head.fc", "predictions", "fc1000", "last_linear", "probs"}

# wrappers that training scripts and multi-scale modules prepend to every name
_PREFIXES = re.compile(r"^(module\.|model\.|backbone\.|base\.|scale\.|net\.|network\.|_orig_mod\.)+", re.IGNORECASE)


def canonical(layer: str) -> str:
    """One spelling for a residual block: ImageNet's `res4c_branch1` and DeepLab's `res4b2_branch1` are the same.

    >>> canonical("bn4b2_branch2a"), canonical("res3d_branch2c"), canonical("res2a_branch1"), canonical("fc6_1")
    ('bn4.2_branch2a', 'res3.3_branch2c', 'res2.0_branch1', 'fc6_1')
    """
    found = re.fullmatch(r"(res|bn)(\d)([a-z])(\d*)(_branch\w+|_\w+)?", layer)
    if not found:
        return layer
    kind, stage, letter, number, rest = found.groups()
    index = int(number) if number else ord(letter) - ord("a")
    return f"{kind}{stage}.{index}{rest or ''}"


def _residual(kind: str, stage: int, block: int, branch: str) -> str:
    """The released ResNet-101's name of one layer; `block` counts from 0."""
    letters = f"b{block}" if stage in (3, 4) and block > 0 else chr(ord("a") + block)
    return f"{kind}{stage}{letters}_branch{branch}"


def is_imagenet_classifier(name: str) -> bool:
    """Whether a foreign layer has the name of an image classifier, which no segmentation network uses."""
    return stripped(name) in _IMAGENET_CLASSIFIERS


def stripped(name: str) -> str:
    """A PyTorch name without the wrappers that precede all names of a network.

    >>> stripped("module.Scale.layer1.0.conv1"), stripped("backbone.conv1")
    ('layer1.0.conv1', 'conv1')
    """
    return _PREFIXES.sub("", name)


def from_caffe(name: str) -> str | None:
    """The data set's name is dropped from the classifiers, and Scale layers join their batch norm.

    >>> from_caffe("fc8_voc12_3"), from_caffe("fc8_pascal"), from_caffe("fc1_voc12_c0"), from_caffe("fc1_coco")
    ('fc8_3', 'fc8', 'fc1_c0', 'fc1')
    >>> from_caffe("scale4b22_branch2a"), from_caffe("scale_conv1"), from_caffe("fc1000")
    ('bn4b22_branch2a', 'bn_conv1', None)
    """
    if is_imagenet_classifier(name):
        return None
    found = re.fullmatch(r"fc8(?:_.*?)??(_\d+)?", name)
    if found:
        return f"fc8{found[1] or ''}"
    found = re.fullmatch(r"fc1(?:_.*?)??(_c\d+)?", name)
    if found:
        return f"fc1{found[1] or ''}"
    return re.sub(r"^scale(?=\d|_)", "bn", name)


def from_torch_resnet(name: str) -> str | None:
    """torchvision's ResNet names, which timm and most ports of DeepLab v2 share.

    >>> from_torch_resnet("layer3.22.bn2"), from_torch_resnet("layer1.0.downsample.0"), from_torch_resnet("bn1")
    ('bn4b22_branch2b', 'res2a_branch1', 'bn_conv1')
    """
    found = re.fullmatch(r"layer([1-4])\.(\d+)\.(.+)", name)
    if found and found[3] in _TORCH_BRANCHES:
        kind, branch = _TORCH_BRANCHES[found[3]]
        return _residual(kind, int(found[1]) + 1, int(found[2]), branch)
    return {"conv1": "conv1", "bn1": "bn_conv1"}.get(name)


def from_port(name: str, head: str = "layer5") -> str | None:
    """Ports of DeepLab v2's ResNet-101 that keep torchvision's names and add the four classifiers as one more layer.

    >>> from_port("layer5.conv2d_list.3"), from_port("layer4.2.conv3")
    ('fc1_c3', 'res5c_branch2c')
    """
    found = re.fullmatch(rf"{head}\.conv2d_list\.(\d+)", name)
    return f"fc1_c{found[1]}" if found else from_torch_resnet(name)


def from_torch_vgg(name: str) -> str | None:
    """torchvision's and timm's VGG-16.

    >>> from_torch_vgg("features.28"), from_torch_vgg("classifier.0"), from_torch_vgg("pre_logits.fc2")
    ('conv5_3', 'fc6', 'fc7')
    """
    found = re.fullmatch(r"features\.(\d+)", name)
    if found:
        return _VGG_FEATURES.get(int(found[1]))
    return _VGG_DENSE.get(name)


def from_deeplab_pytorch(name: str) -> str | None:
    """kazuto1011/deeplab-pytorch, all generations of its names (`shortcut` or `proj`, `aspp.c0` or `aspp.stages.0`).

    >>> from_deeplab_pytorch("layer2.block1.reduce.conv"), from_deeplab_pytorch("layer4.block23.proj.bn")
    ('res2a_branch2a', 'bn4b22_branch1')
    >>> [from_deeplab_pytorch(name) for name in ("aspp.c3", "aspp.stages.c0", "aspp.stages.1", "fc")]
    ['fc1_c3', 'fc1_c0', 'fc1_c1', 'fc1']
    """
    found = re.fullmatch(r"layer([2-5])\.block(\d+)\.(\w+)\.(conv|bn)", name)
    if found and found[3] in _KAZUTO_BRANCHES:
        kind = "res" if found[4] == "conv" else "bn"
        return _residual(kind, int(found[1]), int(found[2]) - 1, _KAZUTO_BRANCHES[found[3]])
    found = re.fullmatch(r"aspp\.(?:stages\.)?c?(\d+)", name)
    if found:
        return f"fc1_c{found[1]}"
    return {"layer1.conv1.conv": "conv1", "layer1.conv1.bn": "bn_conv1", "fc": "fc1"}.get(name)


def from_keras(name: str) -> str | None:
    """Keras applications; the first Keras ResNet-50 used Caffe's own names, which pass through.

    >>> from_keras("block5_conv3"), from_keras("conv4_block6_0_bn"), from_keras("conv1_conv"), from_keras("fc2")
    ('conv5_3', 'bn4b5_branch1', 'conv1', 'fc7')
    >>> from_keras("res4f_branch2a")
    'res4f_branch2a'
    """
    found = re.fullmatch(r"block([1-5])_conv([1-3])", name)
    if found:
        return f"conv{found[1]}_{found[2]}"
    found = re.fullmatch(r"conv([2-5])_block(\d+)_([0-3])_(conv|bn)", name)
    if found:
        kind = "res" if found[4] == "conv" else "bn"
        return _residual(kind, int(found[1]), int(found[2]) - 1, _KERAS_BRANCHES[found[3]])
    if re.fullmatch(r"(res|bn)\d[a-z]\d*_branch\d[a-c]?|conv1|bn_conv1", name):
        return name
    return {"conv1_conv": "conv1", "conv1_bn": "bn_conv1", **_VGG_DENSE}.get(name)


def keras_order(convs: int) -> tuple[list[str], list[str]]:
    """Keras' names of a network's convolutions and batch norms in the order in which it saves them.

    Early Keras 3 files hold only names like `conv2d_7`: the order alone identifies the layers. In a block with a
    shortcut Keras lists the shortcut third.

    Args:
      convs: convolutions in the file: 13 (VGG-16), 53 (ResNet-50) or 104 (ResNet-101).

    Returns:
      (convolutions, batch norms), empty for any other number.
    """
    if convs == len(VGG_TRUNK):
        return [f"block{s}_conv{i}" for s, n in enumerate(_VGG_STAGES, 1) for i in range(1, n + 1)], []
    depth = {53: (3, 4, 6, 3), 104: (3, 4, 23, 3)}.get(convs)
    if depth is None:
        return [], []
    order = ["conv1"]
    for stage, blocks in enumerate(depth, 2):
        for block in range(1, blocks + 1):
            order += [f"conv{stage}_block{block}_{i}" for i in ("1203" if block == 1 else "123")]
    return [f"{name}_conv" for name in order], [f"{name}_bn" for name in order]
