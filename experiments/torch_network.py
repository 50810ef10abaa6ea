"""The peer of the speed benchmarks: atrous ResNet-101 with ASPP-L in PyTorch, channels-last, batch norm frozen."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

STAGES = ((3, 256, 1, 1), (4, 512, 2, 1), (23, 1024, 1, 2), (3, 2048, 1, 4))  # blocks, width, stride, rate
RATES = (6, 12, 18, 24)


class Norm(nn.Module):
    """Batch norm from stored statistics, affine frozen."""

    def __init__(self, channels: int):
        super().__init__()
        for name, value in (("scale", 1.0), ("bias", 0.0), ("mean", 0.0), ("var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.batch_norm(x, self.mean, self.var, self.scale, self.bias, False, 0.0, 1e-5)


class Unit(nn.Module):
    """Convolution and norm."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1, rate: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, rate * (side // 2), rate, bias=False)
        self.norm = Norm(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))


class Block(nn.Module):
    """A bottleneck, its stride on the first 1x1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int, rate: int):
        super().__init__()
        width = outputs // 4
        self.shortcut = Unit(inputs, outputs, 1, stride) if inputs != outputs or stride > 1 else None
        self.a, self.b, self.c = Unit(inputs, width, 1, stride), Unit(width, width, 3, 1, rate), Unit(width, outputs, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.c(F.relu(self.b(F.relu(self.a(x)))))
        return F.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class DeepLab(nn.Module):
    """[B, 3, H, W] BGR minus the mean -> [B, classes, h, w]."""

    def __init__(self, classes: int = 21):
        super().__init__()
        self.stem = Unit(3, 64, 7, 2)
        names, blocks, inputs = [], [], 64
        for number, (count, width, stride, rate) in enumerate(STAGES, 2):
            for i in range(count):
                names.append(f"{number}{'abc'[i] if count == 3 else 'a' if i == 0 else f'b{i}'}")
                blocks.append(Block(inputs, width, stride if i == 0 else 1, rate))
                inputs = width
        self.names, self.blocks = names, nn.Sequential(*blocks)
        self.head = nn.ModuleList(nn.Conv2d(2048, classes, 3, 1, rate, rate) for rate in RATES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1, ceil_mode=True)
        x = self.blocks(x)
        return sum(branch(x) for branch in self.head)

    def load(self, variables: dict) -> "DeepLab":
        """Takes over the variables of the JAX network, so that both compute the same."""

        def unit(target: Unit, conv: str, norm: str) -> None:
            tensor(target.conv.weight, params["backbone"][conv]["kernel"])
            for name in ("scale", "bias"):
                tensor(getattr(target.norm, name), params["backbone"][norm][name])
            for name in ("mean", "var"):
                tensor(getattr(target.norm, name), variables["batch_stats"]["backbone"][norm][name])

        params = variables["params"]
        unit(self.stem, "conv1", "bn_conv1")
        for name, block in zip(self.names, self.blocks, strict=True):
            for part, branch in ((block.shortcut, "1"), (block.a, "2a"), (block.b, "2b"), (block.c, "2c")):
                if part is not None:
                    unit(part, f"res{name}_branch{branch}", f"bn{name}_branch{branch}")
        for i, branch in enumerate(self.head):
            tensor(branch.weight, params["head"][f"fc1_c{i}"]["kernel"])
            tensor(branch.bias, params["head"][f"fc1_c{i}"]["bias"])
        return self.to(memory_format=torch.channels_last)


@torch.no_grad()
def tensor(target: torch.Tensor, value) -> None:
    """Copies an array into a tensor; kernels [k, k, C, D] become [D, C, k, k]."""
    value = np.asarray(value)
    target.copy_(torch.from_numpy(np.array(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value)))


def network_input(images: np.ndarray) -> torch.Tensor:
    """[B, H, W, 3] RGB 0..255 -> [B, 3, H, W] BGR minus the released mean, channels-last."""
    x = torch.from_numpy(np.ascontiguousarray(images[..., ::-1])).float() - torch.tensor([104.008, 116.669, 122.675])
    return x.permute(0, 3, 1, 2)


def compiled(function, warm_up) -> tuple[object | None, str]:
    """`torch.compile` of a function, tried once by `warm_up(compiled function)`; None and why where it cannot."""
    try:
        fast = torch.compile(function)
        warm_up(fast)
    except Exception as e:  # no compiler, or one that inductor cannot use: eager is the peer then
        return None, f"torch.compile left out: {str(e).splitlines()[0][:120]}"
    return fast, ""
