"""DeepLab v2's networks in PyTorch, written from their published structure; nothing of the package is used.

Weights are dicts `<released Caffe layer name>.<leaf>` -> array: `weight` [O, I, H, W], `bias`, and for batch norm
`mean`, `var`, `gamma`, `beta`. Every pool, stride and dilation is looked up as a knob, so that a test can turn each
of them and see the comparison fail.
"""

import numpy as np
import torch
import torch.nn.functional as F

VGG_STAGES = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
RESNET_STAGES = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class Knobs:
    """Hands out the published value of each setting, or the wrong one that a test asked for, and remembers all."""

    def __init__(self, wrong=None):
        self.wrong = wrong or {}
        self.seen = {}

    def __call__(self, name, value):
        self.seen[name] = value
        return self.wrong.get(name, value)


def blocks(depth):
    """(stage, block's Caffe name, whether it is the stage's first)."""
    for stage, count in enumerate(RESNET_STAGES[depth], 2):
        for i in range(count):
            letter = chr(ord("a") + i) if count == 3 else "a" if i == 0 else f"b{i}"
            yield stage, f"{stage}{letter}", i == 0


def caffe_input(rgb):
    """[B, H, W, 3] RGB 0..255 -> [B, 3, H, W] BGR minus the released mean."""
    x = rgb[..., ::-1] - np.array([104.008, 116.669, 122.675])
    return torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)


def torch_input(rgb):
    """[B, H, W, 3] RGB 0..255 -> [B, 3, H, W] divided by 255, minus ImageNet's mean, over its deviation."""
    x = (rgb / 255.0 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    return torch.from_numpy(x.astype(np.float32)).permute(0, 3, 1, 2)


def _pool(x, knob, name, stride):
    kind = knob(f"{name}.kind", "max")
    stride = knob(f"{name}.stride", stride)
    if kind == "max":
        return F.max_pool2d(x, 3, stride, 1, ceil_mode=True)
    return F.avg_pool2d(x, 3, stride, 1, ceil_mode=True)


def _conv_bn(x, w, name, stride=1, dilation=1, epsilon=1e-5):
    weight = w[f"res{name}.weight"] if name != "conv1" else w["conv1.weight"]
    conv, bn = ("conv1", "bn_conv1") if name == "conv1" else (f"res{name}", f"bn{name}")
    padding = dilation * (weight.shape[-1] // 2)
    x = F.conv2d(x, weight, w.get(f"{conv}.bias"), stride, padding, dilation)
    return F.batch_norm(x, w[f"{bn}.mean"], w[f"{bn}.var"], w[f"{bn}.gamma"], w[f"{bn}.beta"], False, 0, epsilon)


@torch.no_grad()
def resnet(x, w, depth=101, stride_on="1x1", epsilon=1e-5, wrong=None):
    """The released ResNet with ASPP-L at output stride 8.

    Returns:
      ([B, classes, h, w] scores, the knobs).
    """
    knob = Knobs(wrong)
    stride_on = knob("stride_on", stride_on)
    x = F.relu(_conv_bn(x, w, "conv1", knob("conv1.stride", 2), epsilon=epsilon))
    x = _pool(x, knob, "pool1", 2)
    for stage, name, first in blocks(depth):
        stride = knob(f"res{name}.stride", 2 if stage == 3 else 1) if first else 1
        dilation = knob(f"res{name}.dilation", {2: 1, 3: 1, 4: 2, 5: 4}[stage])
        if first and stride_on == "3x3" and stage > 3:
            # an abandoned stride on the 3x3 conv: this one still runs ahead of it
            dilation = knob(f"res{name}.dilation", {4: 1, 5: 2}[stage])
        early, late = (stride, 1) if stride_on == "1x1" else (1, stride)
        y = F.relu(_conv_bn(x, w, f"{name}_branch2a", early, epsilon=epsilon))
        y = F.relu(_conv_bn(y, w, f"{name}_branch2b", late, dilation, epsilon))
        y = _conv_bn(y, w, f"{name}_branch2c", epsilon=epsilon)
        if first:
            x = _conv_bn(x, w, f"{name}_branch1", stride, epsilon=epsilon)
        x = F.relu(x + y)
    scores = 0
    for i, rate in enumerate((6, 12, 18, 24)):
        rate = knob(f"fc1_c{i}.dilation", rate)
        scores = scores + F.conv2d(x, w[f"fc1_c{i}.weight"], w[f"fc1_c{i}.bias"], 1, rate, rate)
    return scores, knob.seen


@torch.no_grad()
def vgg(x, w, rates=(12,), pool5a=False, wrong=None):
    """VGG-16 LargeFOV (one rate; v1's has pool5a) or ASPP (four rates) at output stride 8."""
    knob = Knobs(wrong)
    for stage, (_, count) in enumerate(VGG_STAGES, 1):
        for i in range(1, count + 1):
            dilation = knob(f"conv{stage}_{i}.dilation", 2 if stage == 5 else 1)
            x = F.relu(F.conv2d(x, w[f"conv{stage}_{i}.weight"], w[f"conv{stage}_{i}.bias"], 1, dilation, dilation))
        x = _pool(x, knob, f"pool{stage}", 2 if stage <= 3 else 1)
    if knob("pool5a.kind", "average" if pool5a else "none") == "average":
        x = F.avg_pool2d(x, 3, 1, 1)
    scores = 0
    for i, rate in enumerate(rates, 1):
        suffix = f"_{i}" if len(rates) > 1 else ""
        rate = knob(f"fc6{suffix}.dilation", rate)
        y = F.relu(F.conv2d(x, w[f"fc6{suffix}.weight"], w[f"fc6{suffix}.bias"], 1, rate, rate))
        y = F.relu(F.conv2d(y, w[f"fc7{suffix}.weight"], w[f"fc7{suffix}.bias"]))
        scores = scores + F.conv2d(y, w[f"fc8{suffix}.weight"], w[f"fc8{suffix}.bias"])
    return scores, knob.seen


def three_scales(x, network, resize, scales=(1.0, 0.75, 0.5)):
    """v2's multi-scale inputs, score maps fused by max, in either convention of resizing.

    "corners": sizes (n - 1) s + 1, aligned corners, as Caffe's Interp layers. "half_pixel": what deeplab-pytorch asks
    of PyTorch, `scale_factor` and align_corners=False.

    Args:
      x: [B, 3, H, W], preprocessed.
      network: from such an image to scores.

    Returns:
      (the maximum, the maps one by one at the first one's size).
    """
    maps = []
    for s in scales:
        if resize == "half_pixel":
            scaled = F.interpolate(x, scale_factor=s, mode="bilinear", align_corners=False) if s != 1 else x
        else:
            size = [int((n - 1) * s) + 1 for n in x.shape[2:]]
            scaled = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
        maps.append(network(scaled))
    size = maps[0].shape[2:]
    finest = [F.interpolate(m, size=size, mode="bilinear", align_corners=resize == "corners") for m in maps]
    return torch.stack(finest).max(0)[0], finest


def wrong_values(seen):
    """For each knob a setting with one value that is not the published one."""
    for name, value in seen.items():
        if name.endswith(".kind"):
            yield name, {"max": "average", "average": "none", "none": "average"}[value]
        elif name == "stride_on":
            yield name, "3x3" if value == "1x1" else "1x1"
        elif name.endswith(".stride"):
            yield name, 1 if value == 2 else 2
        else:
            yield name, value * 2 if value < 3 else value // 2


def random_resnet(
    depth=101, classes=21, seed=0, conv_bias=False, first_var=5000.0, stem=64, widths=(256, 512, 1024, 2048)
):
    """Random weights, with batch-norm statistics close to the layers' outputs, so that no layer vanishes or explodes.

    `first_var` is the variance of the first convolution's output: thousands for images 0..255 minus their mean, about 1
    for images divided by their deviation.
    """
    rng = np.random.default_rng(seed)
    w = {}

    def conv_bn(conv, bn, inputs, outputs, side, var, gamma):
        w[f"{conv}.weight"] = rng.standard_normal((outputs, inputs, side, side), np.float32) * np.float32(
            np.sqrt(2 / (inputs * side * side))
        )
        if conv_bias:
            w[f"{conv}.bias"] = 0.3 * rng.standard_normal(outputs, np.float32)
        w[f"{bn}.mean"] = 0.2 * rng.standard_normal(outputs, np.float32)
        w[f"{bn}.var"] = rng.uniform(0.5 * var, 2 * var, outputs).astype(np.float32)
        w[f"{bn}.gamma"] = rng.uniform(0.5 * gamma, 1.5 * gamma, outputs).astype(np.float32)
        w[f"{bn}.beta"] = 0.2 * rng.standard_normal(outputs, np.float32)

    conv_bn("conv1", "bn_conv1", 3, stem, 7, first_var, 1.0)
    inputs = stem
    for stage, name, first in blocks(depth):
        outputs = widths[stage - 2]
        width = outputs // 4
        if first:
            conv_bn(f"res{name}_branch1", f"bn{name}_branch1", inputs, outputs, 1, 1.0, 0.7)
        conv_bn(f"res{name}_branch2a", f"bn{name}_branch2a", inputs, width, 1, 1.0, 1.0)
        conv_bn(f"res{name}_branch2b", f"bn{name}_branch2b", width, width, 3, 1.0, 1.0)
        conv_bn(f"res{name}_branch2c", f"bn{name}_branch2c", width, outputs, 1, 1.0, 0.3)
        inputs = outputs
    for i in range(4):
        w[f"fc1_c{i}.weight"] = 0.01 * rng.standard_normal((classes, widths[3], 3, 3), np.float32)
        w[f"fc1_c{i}.bias"] = rng.standard_normal(classes, np.float32)
    return w


def random_vgg(branches=1, classes=21, width=1024, fc6=3, seed=0):
    rng = np.random.default_rng(seed)
    w = {}

    def conv(name, inputs, outputs, side):
        w[f"{name}.weight"] = rng.standard_normal((outputs, inputs, side, side), np.float32) * np.float32(
            np.sqrt(2 / (inputs * side * side))
        )
        w[f"{name}.bias"] = rng.standard_normal(outputs, np.float32)

    inputs = 3
    for stage, (outputs, count) in enumerate(VGG_STAGES, 1):
        for i in range(1, count + 1):
            conv(f"conv{stage}_{i}", inputs, outputs, 3)
            inputs = outputs
    for i in range(1, branches + 1):
        suffix = f"_{i}" if branches > 1 else ""
        conv(f"fc6{suffix}", 512, width, fc6)
        conv(f"fc7{suffix}", width, width, 1)
        conv(f"fc8{suffix}", width, classes, 1)
    return w


def tensors(w):
    return {name: torch.from_numpy(value) for name, value in w.items()}
