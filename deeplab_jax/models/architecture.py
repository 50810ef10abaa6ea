"""The fields of `config.model`, checked once and hashable: the description that all network code reads."""

import dataclasses
from typing import Any

import jax.numpy as jnp

HEADS = ("aspp", "fc", "largefov", "plain")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One network of the DeepLab family; the fields are those of `config.model` (see configs/base.py)."""

    backbone: str = "resnet101"
    head: str = "aspp"
    head_rates: tuple[int, ...] = (6, 12, 18, 24)
    head_width: int = 0
    head_kernel: int = 3
    output_stride: int = 8
    scales: tuple[float, ...] = (1.0,)
    msc: bool = False
    pool5a: bool = False
    base_pools: bool = False
    freeze_trunk: bool = False
    freeze_network: bool = False
    batch_norm: str = "frozen"
    stride_on: str = "1x1"
    preprocessing: str = "caffe_bgr"
    resize: str = "corners"
    dropout: float = 0.5
    widths: tuple[int, ...] = (64, 128, 192, 192)
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    fine_branch: int = 0
    dtype: str = "float32"
    matmul_precision: str = "default"
    remat: bool = False

    @classmethod
    def from_config(cls, config: Any) -> "Architecture":
        """Reads the fields of `config.model` (attributes; absent ones keep their default), without checking them."""
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            value: Any = getattr(config, field.name, field.default)
            values[field.name] = tuple(value) if isinstance(field.default, tuple) else value
        return cls(**values)

    def check(self) -> None:
        """Raises ValueError with a sentence for the first field that suits no backbone."""
        choices = {
            "head": HEADS,
            "output_stride": (8, 16, 32),
            "batch_norm": ("frozen", "trained"),
            "stride_on": ("1x1", "3x3"),
            "preprocessing": ("caffe_bgr", "torch_rgb", "own_rgb"),
            "resize": ("corners", "half_pixel"),
            "dtype": ("float32", "bfloat16"),
            "matmul_precision": ("default", "high", "highest"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"config.model.{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}"
                )
        if not self.scales or max(self.scales) != self.scales[0] or min(self.scales) <= 0:
            raise ValueError(f"config.model.scales={self.scales} must be positive and begin with the largest")
        if self.head in ("fc", "largefov") and len(self.head_rates) != 1:
            raise ValueError(
                f"config.model.head_rates={self.head_rates}: head '{self.head}' has one branch; give one rate"
            )
        small = self.backbone == "resnet_small"  # whose head has a branch without a rate
        if self.head == "aspp" and not self.head_rates and not small:
            raise ValueError("config.model.head_rates=(): head 'aspp' needs at least one rate, as in (6, 12, 18, 24)")
        if self.head_kernel != 3 and (small or (self.backbone == "vgg16" and self.head == "aspp")):
            raise ValueError(
                f"config.model.head_kernel={self.head_kernel}: {self.backbone} with head '{self.head}' has 3x3 "
                "kernels; leave it at 3"
            )
        if self.head != "plain":
            _ = self.rates

    @property
    def size_extra(self) -> int:
        """Pixels by which an image's side must exceed a multiple of the output stride to suit align-corners upsampling.

        At sides 8 k + 1, score i belongs to pixel 8 i, and the last score to the last pixel. After v1 DeepLab's 2x2
        pools it belongs to 8 i + 1/2, and there are k + 1 scores at 8 k + 2 (306 in training, 514 in test: v1 section
        3).
        """
        return 2 if self.base_pools else 1

    @property
    def rates(self) -> tuple[int, ...]:
        """Atrous rates of the head at this output stride.

        `head_rates` are those of stride 8, the papers'. At 16 they are halved and at 32 quartered, so that the head
        covers the same pixels.

        Raises:
          ValueError: half or a quarter of a rate is not a whole number.
        """
        part = self.output_stride // 8
        if any(rate % part for rate in self.head_rates):
            raise ValueError(
                f"config.model.head_rates={self.head_rates} are those of output stride 8; at "
                f"{self.output_stride} they are divided by {part}, so give multiples of {part}"
            )
        return tuple(rate // part for rate in self.head_rates)

    @property
    def frozen_batch_norm(self) -> bool:
        return self.batch_norm == "frozen"

    @property
    def compute_dtype(self) -> Any:
        return jnp.dtype(self.dtype)
