"""The kind of a PyTorch state dict, determined from all of its names and shapes, and the settings that it implies.

Several networks share torchvision's layer names and differ in properties that no name reveals: how images are prepared
and where a block's stride is. The rest of the file distinguishes them; if it does not, the settings stay open.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names

CAFFE = {"preprocessing": "caffe_bgr", "stride_on": "1x1", "resize": "corners"}
DEEPLAB_PYTORCH = {"preprocessing": "caffe_bgr", "stride_on": "1x1", "resize": "half_pixel"}
KERAS = {"preprocessing": "caffe_bgr", "stride_on": "1x1"}
TORCH = {"preprocessing": "torch_rgb", "stride_on": "3x3"}

_OTHER_HEAD = re.compile(r"^(aux_)?classifier\.|^(aspp|decoder|fc\d?|reduce|concat)\.?")

Shapes = Mapping[str, Mapping[str, tuple[int, ...]]]  # layer -> leaf -> shape


@dataclasses.dataclass(frozen=True)
class Kind:
    """One family of files.

    Attributes:
      name: for messages.
      settings: config.model fields that it implies.
      rename: a layer's name, without wrappers -> the released name, or None.
      needless: such a name -> why the layer is not needed, or None if it may be needed.
      open: config.model fields that the weights need and the file does not reveal.
    """

    name: str
    settings: Mapping[str, str]
    rename: Callable[[str], str | None]
    needless: Callable[[str], str | None] = lambda name: None
    open: tuple[str, ...] = ()


def recognise(path: str, layers: Shapes) -> Kind:
    """The kind of a state dict.

    Args:
      path: the file, for messages.
      layers: name -> leaf -> shape, wrappers included.

    Raises:
      UserError: a VGG with batch normalization, or ResNets of another form (ResNeXt, wide, basic blocks).
    """
    shapes = {names.stripped(layer): leaves for layer, leaves in layers.items()}
    if any(re.fullmatch(r"layer\d\.block\d+\.reduce\.conv", name) for name in shapes):
        return _deeplab_pytorch(shapes)
    if any(re.fullmatch(r"features\.\d+", name) for name in shapes):
        return _vgg(path, shapes)
    return _resnet(path, shapes)


def _deeplab_pytorch(shapes: Shapes) -> Kind:
    if any(re.match(r"aspp\.(imagepool|stages\.\w+\.conv)", name) for name in shapes):
        name, why = "a deeplab-pytorch checkpoint of DeepLab v3", "the head of DeepLab v3, which is not DeepLab v2's"

        def trunk(layer: str) -> str | None:
            return None if _OTHER_HEAD.match(layer) else names.from_deeplab_pytorch(layer)

        return Kind(name, DEEPLAB_PYTORCH, trunk, lambda layer: why if _OTHER_HEAD.match(layer) else None)
    if _whole_image(shapes, "fc"):
        rename = lambda layer: None if layer == "fc" else names.from_deeplab_pytorch(layer)  # noqa: E731
        return Kind("a deeplab-pytorch checkpoint", DEEPLAB_PYTORCH, rename, _classifier_of_images(shapes))
    version = " (DeepLabV1: one 1x1 classifier)" if "fc" in shapes else ""
    return Kind(f"a deeplab-pytorch checkpoint{version}", DEEPLAB_PYTORCH, names.from_deeplab_pytorch)


def _vgg(path: str, shapes: Shapes) -> Kind:
    if any(re.fullmatch(r"features\.\d+", name) and "running_mean" in leaves for name, leaves in shapes.items()):
        raise UserError(f"{path}: is a VGG-16 with batch normalization (vgg16_bn); DeepLab's has none")
    if any(_classes(shapes, layer) == 1000 for layer in ("classifier.6", "head.fc")):
        settings = {"preprocessing": "torch_rgb"}
        return Kind("a torchvision or timm checkpoint", settings, names.from_torch_vgg, _classifier_of_images(shapes))
    name = "a VGG-16 under torchvision's names, without its ImageNet classifier"
    return Kind(name, {}, names.from_torch_vgg, _classifier_of_images(shapes), ("preprocessing",))


def _resnet(path: str, shapes: Shapes) -> Kind:
    _check_bottlenecks(path, shapes)
    heads = [h for h in ("layer6", "layer5") if f"{h}.conv2d_list.0" in shapes]
    if heads:
        return _port(shapes, heads)
    if any(re.match(r"classifier\.", name) for name in shapes):
        system = "DeepLabv3" if any(name.startswith("classifier.0.convs") for name in shapes) else "FCN"
        why = f"the head of torchvision's {system}, which is not DeepLab v2's"
        return Kind(
            f"a torchvision {system} checkpoint",
            TORCH,
            names.from_torch_resnet,
            lambda layer: why if re.match(r"(aux_)?classifier\.", layer) else None,
        )
    images = _classifier_of_images(shapes)
    if any(_classes(shapes, layer) == 1000 for layer in ("fc", "head.fc", "last_linear")):
        return Kind("a torchvision or timm checkpoint", TORCH, names.from_torch_resnet, images)
    name = "a ResNet under torchvision's names, without a classifier that would identify it"
    return Kind(name, {}, names.from_torch_resnet, images, ("preprocessing", "stride_on"))


def _port(shapes: Shapes, heads: list[str]) -> Kind:
    """Ports of DeepLab v2's ResNet-101; with two such layers the first classifies res4, only in training."""
    head, images = heads[0], _classifier_of_images(shapes)

    def needless(layer: str) -> str | None:
        if len(heads) > 1 and layer.startswith("layer5."):
            return "a second classifier, on the stage before the last, which serves only training"
        return images(layer)

    name = f"a PyTorch port of DeepLab v2's ResNet-101 ({head}.conv2d_list)"
    return Kind(name, CAFFE, lambda layer: names.from_port(layer, head), needless)


def _check_bottlenecks(path: str, shapes: Shapes) -> None:
    """Raises UserError for networks that share torchvision's names but are not among DeepLab's."""
    conv = shapes.get("layer1.0.conv2", {}).get("weight", ())
    first = shapes.get("layer1.0.conv1", {}).get("weight", ())
    if "layer1.0.conv1" in shapes and "layer1.0.conv3" not in shapes:
        raise UserError(
            f"{path}: is a ResNet of basic blocks (ResNet-18 or 34); DeepLab's are ResNet-50 and ResNet-101"
        )
    if len(conv) == 4 and len(first) == 4 and (conv[1] != conv[0] or first[0] != conv[1]):
        raise UserError(f"{path}: its 3x3 convolutions have groups (ResNeXt); DeepLab's are ResNet-50 and ResNet-101")


def _classes(shapes: Shapes, layer: str) -> int | None:
    """Outputs of a layer, None if it is absent."""
    weight = shapes.get(layer, {}).get("weight")
    return weight[0] if weight else None


def _whole_image(shapes: Shapes, layer: str) -> bool:
    """Whether a layer classifies whole images: it is dense, or has ImageNet's 1000 classes."""
    weight = shapes.get(layer, {}).get("weight", ())
    return len(weight) == 2 or (len(weight) == 4 and weight[0] == 1000)


def _classifier_of_images(shapes: Shapes) -> Callable[[str], str | None]:
    def needless(layer: str) -> str | None:
        if not names.is_imagenet_classifier(layer) or not _whole_image(shapes, layer):
            return None
        classes = _classes(shapes, layer)
        return "the ImageNet classifier" if classes == 1000 else f"an image classifier ({classes} classes)"

    return needless
