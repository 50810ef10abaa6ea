"""The network in a source: trunk, head, classes, and the lines that `convert_weights --describe` prints."""

import re
from collections.abc import Callable

from deeplab_jax.weights.names import canonical
from deeplab_jax.weights.source import Source

# (trunk, head) -> the shipped configs with layers of these shapes
_CONFIGS = {
    ("resnet101", "aspp"): ("voc_aspp_l", "voc_aspp_s"),
    ("resnet101", "plain"): ("voc_resnet101",),
    ("resnet101", "largefov"): ("voc_largefov",),
    ("vgg16", "aspp"): ("voc_vgg16_aspp_l", "voc_vgg16_aspp_s"),
    ("vgg16", "largefov"): ("voc_vgg16_largefov", "voc_vgg16_v2_largefov"),
}


def backbone_of(source: Source) -> str | None:
    """ "vgg16", "resnet50", "resnet101" or "resnet_small" by the layers present; None for any other trunk."""
    layers = {canonical(layer) for layer in _layers(source)}
    if "conv5_3" in layers:
        return "vgg16"
    if "res2.0_branch2c" not in layers:
        return "resnet_small" if "res2.0_branch2b" in layers else None
    blocks = sum(re.fullmatch(r"res4\.\d+_branch2a", layer) is not None for layer in layers)
    return {6: "resnet50", 23: "resnet101"}.get(blocks)


def head_of(source: Source) -> tuple[str, str] | None:
    """(`config.model.head`, in words) of the classifier in a file; None if it has none, like ImageNet networks."""
    kernels = {name.split("/")[-2]: array.shape for name, array in source.arrays.items() if name.endswith("/kernel")}
    branches = [name for name in kernels if re.fullmatch(r"fc1_c\d+|fc8_\d+", name)]
    classes = classes_of(source)
    wide = [name for name in kernels if re.fullmatch(r"aspp_(c\d+|1x1)", name)]  # of `resnet_small`
    if wide:
        fine = " with a fine branch" if "fine" in kernels else ""
        return "aspp", f"ASPP of {len(wide)} branches{fine}, {classes} classes"
    if branches:
        return "aspp", f"ASPP of {len(branches)} branches, {classes} classes"
    if "fc1" in kernels:
        side = kernels["fc1"][0]
        head = "plain" if side == 1 else "largefov"
        return head, f"one {side}x{side} classifier, {classes} classes"
    if "fc8" in kernels:
        fc6 = kernels.get("fc6")
        if fc6 is None:
            return "plain", f"one classifier, {classes} classes"
        head = "largefov" if fc6[0] == 3 else "fc"
        return head, f"fc6 {fc6[0]}x{fc6[1]} of {fc6[3]} filters, fc7, fc8 of {classes} classes"
    return None


def classes_of(source: Source) -> int | None:
    """Number of classes of the classifier in a file, None if it has none."""
    for name, array in source.arrays.items():
        if re.search(r"(^|/)(fc8|fc1)(_c?\d+)?/kernel$", name):
            return array.shape[-1]
    return None


def describe(source: Source) -> list[str]:
    """A description of a file, in lines: kind, trunk, head, settings, size, omitted layers, and a matching config."""
    backbone, head = backbone_of(source), head_of(source)
    backbone = source.metadata.get("backbone", backbone) if source.ours else backbone
    lines = [f"{source.path}: {source.kind}", f"  backbone: {backbone or 'unknown'}"]
    if head is None:
        imagenet = any(name.startswith("fc6/") for name in source.arrays)
        lines.append(f"  head: none{', only the fully connected layers of an ImageNet network' if imagenet else ''}")
    else:
        lines.append(f"  head: {head[0]} ({head[1]})")
    for setting, value in source.settings.items():
        lines.append(f"  config.model.{setting} = {value}, implied by the kind of file")
    lines += [f"  {sentence}" for sentence in questions(source)]
    values = sum(array.size for array in source.arrays.values())
    lines.append(f"  {len(source.arrays)} arrays, {values:,} values")
    lines += _by_reason(source.left_out, lambda shown, reason: f"  left out: {shown} ({reason})")
    configs = _CONFIGS.get((backbone or "", head[0] if head else "aspp"), ())
    if configs:
        lines.append(f"  a config of this network: --config {' or '.join(configs)}")
    if len(configs) > 1:
        lines.append("  which one cannot be determined from the file: they differ in atrous rates or pools alone")
    return lines


def questions(source: Source) -> list[str]:
    """One sentence for each setting that the weights need and the file leaves open."""
    flags = {
        "preprocessing": "--preprocessing=torch_rgb (RGB, divided by 255, mean and deviation: torchvision, timm) or "
        "--preprocessing=caffe_bgr (BGR minus the mean: ports of Caffe networks)",
        "stride_on": "--stride_on=3x3 (torchvision, timm) or --stride_on=1x1 (ports of Caffe networks)",
    }
    return [f"config.model.{name} cannot be determined from the file: give {flags[name]}" for name in source.open]


def _by_reason(left_out: dict[str, str], line: Callable[[str, str], str]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(name)
    return [
        line(", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else ""), reason)
        for reason, found in reasons.items()
    ]


def _layers(source: Source) -> set[str]:
    return {name.split("/")[-2] for name in source.arrays if "/" in name}
