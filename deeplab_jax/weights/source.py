"""The result of every reader: the layers of a file under the released names, kernels as HWIO."""

import dataclasses
import re

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names

BN_EPSILON = 1e-5  # of this package's batch norm; a different epsilon in the file moves into the variance


NOT_WANTED = "left out by --leave_out"


@dataclasses.dataclass
class Source:
    """The weights of one file.

    Attributes:
      path: the file, for messages.
      kind: its kind, for messages.
      arrays: `layer/leaf` -> float32 array; leaves kernel (HWIO), bias, scale, mean, var. In a file of
        `convert_weights` the full path (`backbone/conv1/kernel`, `batch_stats/backbone/bn_conv1/mean`) instead.
      settings: config.model fields that go with these weights: preprocessing, resize, and for ResNets stride_on.
      open: config.model fields that these weights need and the file does not reveal.
      left_out: foreign name -> reason.
      leave_out: a regular expression; matching layers are left out, by the file's names or the released ones.
      ours: whether the names are full paths of this package.
      metadata: the file's own metadata.
    """

    path: str
    kind: str
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    settings: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    open: tuple[str, ...] = ()
    leave_out: str = ""
    ours: bool = False
    metadata: dict[str, str] = dataclasses.field(default_factory=dict)
    _unknown: list[str] = dataclasses.field(default_factory=list)

    def add(self, layer: str, leaf: str, array: np.ndarray) -> None:
        """Adds one array as float32; raises `UserError` if it holds NaN, infinity, or negative variances."""
        bare = layer.rpartition("/")[2] if self.ours else layer  # head/fc1_c0 is fc1_c0 in the released files
        if self.leave_out and (re.search(self.leave_out, layer) or re.search(self.leave_out, bare)):
            self.left_out[layer] = NOT_WANTED
            return
        if f"{layer}/{leaf}" in self.arrays:
            raise UserError(
                f"{self.path}: holds '{layer}' twice, like two networks in one file; save only one of them, or "
                "leave the other's layers out with --leave_out=REGEX"
            )
        array = np.asarray(array, np.float32)
        # one reduction instead of a mask of the array's size: NaN and infinity survive the sum in float64
        if not np.isfinite(np.sum(array, dtype=np.float64)):
            raise UserError(f"{self.path}: layer '{layer}' holds values that are not finite; use another copy")
        if leaf == "var" and (array <= -BN_EPSILON).any():
            raise UserError(f"{self.path}: batch norm '{layer}' holds negative variances; use another copy")
        self.arrays[f"{layer}/{leaf}"] = array

    def leave(self, name: str, reason: str | None) -> None:
        """Records a foreign layer that is not used; without a reason, and unless left out on request, it is an error.

        The error is raised by `finish`, which names all such layers at once.
        """
        if self.leave_out and re.search(self.leave_out, name):
            self.left_out[name] = NOT_WANTED
        elif reason is None:
            self._unknown.append(name)
        else:
            self.left_out[name] = reason

    def add_batch_norm(
        self, layer: str, mean: np.ndarray, var: np.ndarray, epsilon: float, scale=None, bias=None
    ) -> None:
        """Adds stored statistics; the difference between `epsilon` and `BN_EPSILON` moves into the variance."""
        self.add(layer, "mean", mean)
        self.add(layer, "var", np.asarray(var, np.float64) + (epsilon - BN_EPSILON))
        if scale is not None:
            self.add(layer, "scale", scale)
        if bias is not None:
            self.add(layer, "bias", bias)

    def fold_biases(self) -> None:
        """Moves biases of convolutions before a batch norm into its mean, because DeepLab's networks have none.

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
        """Folds biases and drops the settings that the network does not have; returns itself.

        Raises:
          UserError: there is no known layer, or an unknown one that may not be left out.
        """
        if not self.arrays:
            raise UserError(
                f"{self.path}: holds no layer of a VGG-16 or ResNet under a known name; give the weights of one of "
                "them, under the names of torchvision, timm, Keras, Caffe or a port of DeepLab v2"
            )
        if self._unknown:
            shown = ", ".join(f"'{name}'" for name in self._unknown[:3])
            more = f" and {len(self._unknown) - 3} more" if len(self._unknown) > 3 else ""
            raise UserError(
                f"{self.path}: reads as {self.kind}, which has no layers {shown}{more}; it is another network, or, if "
                "those layers are not needed, leave them out with "
                f"--leave_out='^{re.escape(self._unknown[0])}$'"
            )
        self.fold_biases()
        if any(k.startswith("conv5_3/") for k in self.arrays):
            self.settings = {k: v for k, v in self.settings.items() if k != "stride_on"}
            self.open = tuple(k for k in self.open if k != "stride_on")
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
        raise ValueError(f"{inputs} inputs of '{layer}' are not a square window of {channels} channels")
    if flattened == "chw":
        return oihw_to_hwio(weight.reshape(-1, channels, side, side))
    return weight.reshape(side, side, channels, -1)
