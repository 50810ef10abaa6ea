"""What every reader returns: the layers of a file under the released names, kernels as ours."""

import dataclasses
import re

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names

BN_EPSILON = 1e-5  # of our batch norm; another epsilon in the file moves into the variance

CAFFE = {"preprocessing": "caffe_bgr", "stride_on": "1x1"}
TORCH = {"preprocessing": "torch_rgb", "stride_on": "3x3"}


@dataclasses.dataclass
class Source:
    """The weights of one file.

    Attributes:
      path: the file, for messages.
      kind: what it is, in words.
      arrays: `layer/leaf` -> float32 array; leaves kernel (HWIO), bias, scale, mean, var. In a file of our own the
        full path (`backbone/conv1/kernel`, `batch_stats/backbone/bn_conv1/mean`) instead.
      settings: config.model fields that go with these weights: preprocessing, and for ResNets stride_on.
      left_out: foreign name -> reason.
      ours: whether the names are full paths of our own.
      metadata: the file's own notes.
    """

    path: str
    kind: str
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    ours: bool = False
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)

    def add(self, layer: str, leaf: str, array: np.ndarray) -> None:
        """Adds one array as float32; raises `UserError` if it holds NaN or infinity."""
        array = np.asarray(array, np.float32)
        # one reduction instead of a mask of the array's size: NaN and infinity survive the sum in float64
        if not np.isfinite(np.sum(array, dtype=np.float64)):
            raise UserError(f"{self.path}: layer '{layer}' holds values that are not finite; take another copy")
        self.arrays[f"{layer}/{leaf}"] = array

    def add_batch_norm(
        self, layer: str, mean: np.ndarray, var: np.ndarray, epsilon: float, scale=None, bias=None
    ) -> None:
        """Adds stored statistics; the difference between `epsilon` and ours goes into the variance."""
        self.add(layer, "mean", mean)
        self.add(layer, "var", np.asarray(var, np.float64) + (epsilon - BN_EPSILON))
        if scale is not None:
            self.add(layer, "scale", scale)
        if bias is not None:
            self.add(layer, "bias", bias)

    def fold_biases(self) -> None:
        """Moves biases of convolutions that a batch norm follows into its mean, where DeepLab's networks have none.

        BN(Wx + b) with stored mean m is BN(Wx) with mean m - b.
        """
        by_block = {names.canonical(k.split("/")[0]): k.split("/")[0] for k in self.arrays}
        for key in [k for k in self.arrays if re.fullmatch(r"(res\w+|conv1)/bias", k)]:
            conv = key.split("/")[0]
            partner = "bn_conv1" if conv == "conv1" else by_block.get(names.canonical(conv.replace("res", "bn", 1)))
            mean = self.arrays.get(f"{partner}/mean")
            if mean is not None and mean.shape == self.arrays[key].shape:
                self.arrays[f"{partner}/mean"] = mean - self.arrays.pop(key)

    def finish(self) -> "Source":
        """Folds biases and drops the settings that the network does not have; returns itself."""
        if not self.arrays:
            raise UserError(
                f"{self.path}: holds no layer of a VGG-16 or ResNet under a known name; is it {self.kind} of one?"
            )
        self.fold_biases()
        if any(k.startswith("conv5_3/") for k in self.arrays):
            self.settings = {k: v for k, v in self.settings.items() if k != "stride_on"}
        return self


def oihw_to_hwio(kernel: np.ndarray) -> np.ndarray:
    """[O, I, H, W], Caffe and PyTorch, -> [H, W, I, O]."""
    return np.transpose(kernel, (2, 3, 1, 0))


def dense_to_hwio(weight: np.ndarray, layer: str, flattened: str) -> np.ndarray:
    """A fully connected layer as a convolution.

    Args:
      weight: [O, I] for "chw", [I, O] for "hwc".
      layer: fc6 reads 512 channels on a square window; every other layer becomes 1x1.
      flattened: the order in which the features were flattened: "chw" (Caffe, PyTorch) or "hwc" (Keras).

    Returns:
      [H, W, I, O].
    """
    inputs = weight.shape[1] if flattened == "chw" else weight.shape[0]
    channels = 512 if layer == "fc6" and inputs % 512 == 0 else inputs
    side = round((inputs // channels) ** 0.5)
    if side * side * channels != inputs:
        raise ValueError(f"{inputs} inputs of '{layer}' are no square window of {channels} channels")
    if flattened == "chw":
        return oihw_to_hwio(weight.reshape(-1, channels, side, side))
    return weight.reshape(side, side, channels, -1)
