"""Transfers a file's layers to a network's variables: matching by name, decimated and slimmed fc6, a report."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights.names import canonical
from deeplab_jax.weights.source import Source

NO_SUCH_LAYER = "the network has no such layer"

Path = tuple[str, ...]  # ("params", "backbone", "conv1", "kernel")


@dataclasses.dataclass
class Report:
    """The report of a conversion or an initialization.

    Attributes:
      source: the file and its kind.
      matched: leaves of the network that were taken from the file.
      left_out: name in the file -> why it was not used.
      missing: leaf of the network -> why it keeps its random value.
      notes: settings that belong to the weights, and layers that were adapted.
    """

    source: str
    matched: list[str] = dataclasses.field(default_factory=list)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: dict[str, str] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> list[str]:
        """The report as text, one line for each reason."""
        lines = [f"weights from {self.source}: {len(self.matched)} arrays matched"]
        lines += [f"  {note}" for note in self.notes]
        for title, group in (("left out", self.left_out), ("missing, initialized randomly", self.missing)):
            by_reason = defaultdict(list)
            for name, reason in group.items():
                by_reason[reason].append(name)
            for reason, found in by_reason.items():
                shown = ", ".join(found[:6]) + (f" and {len(found) - 6} more" if len(found) > 6 else "")
                lines.append(f"  {title}: {shown} ({reason})")
        return lines


def full_name(path: Path) -> str:
    """A variable's name in converted safetensors: parameters without their collection, everything else with it.

    >>> full_name(("params", "backbone", "conv1", "kernel")), full_name(("batch_stats", "backbone", "bn_conv1", "mean"))
    ('backbone/conv1/kernel', 'batch_stats/backbone/bn_conv1/mean')
    """
    return "/".join(path[1:] if path[0] == "params" else path)


class Shaped(Protocol):
    """An array, or the shape of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def transfer(source: Source, targets: Mapping[Path, Shaped], seed: int = 0) -> tuple[dict[Path, np.ndarray], Report]:
    """Finds the values of a network's variables in a file.

    Layers are matched by name. An fc6 of another size is decimated (v1 section 3.2), fc6 and fc7 of more filters than
    the network's are slimmed to a random subset, and the branches of VGG's ASPP all start from the one fc6 and fc7
    of an ImageNet network.

    Args:
      source: the result of a reader.
      targets: path -> array, or anything with `.shape`.
      seed: of the random subset.

    Returns:
      ({path: float32 array} for the variables found, the report).

    Raises:
      UserError: the trunk is incomplete, a layer of it has another shape, or the file has more layers of a trunk.
    """
    report = Report(f"{source.path} ({source.kind})", left_out=dict(source.left_out))
    report.notes += [f"config.model.{k}={v}" for k, v in source.settings.items()]
    by_key = {_key(name, source.ours): name for name in source.arrays}
    arrays = {key: source.arrays[name] for key, name in by_key.items()}
    fully_connected = _FullyConnected(arrays, seed)
    found, used = {}, set()
    for path, target in targets.items():
        name, key, shape = full_name(path), _key(full_name(path), True), tuple(target.shape)
        layer, leaf = path[-2:] if len(path) > 2 else ("", path[-1])
        value, reason = arrays.get(key), "not in the file"
        if re.fullmatch(r"fc[67](_\d+)?", layer) and (value is None or value.shape != shape):
            key, value, reason = fully_connected.fit(layer, leaf, shape)
        if value is not None and value.shape != shape:
            reason = _shape_reason(layer, value.shape, shape)
            value = None
        if value is None:
            report.missing[name] = reason
        else:
            found[path] = value
            report.matched.append(name)
        used.add(key)
    for key, name in by_key.items():
        if key not in used:
            report.left_out[name] = NO_SUCH_LAYER
    report.notes += fully_connected.notes()
    _check_trunk(source, report)
    _check_depth(source, report)
    report.missing = {k: v for k, v in report.missing.items() if not k.startswith("crf/")} | {
        k: "the CRF starts from its configured parameters" for k in report.missing if k.startswith("crf/")
    }
    return found, report


def _check_depth(source: Source, report: Report) -> None:
    """ResNet-50's layers are also in ResNet-101, with equal names and shapes: only the unused ones distinguish them."""
    rest = [name for name, why in report.left_out.items() if why == NO_SUCH_LAYER and is_trunk(name)]
    if rest:
        raise UserError(
            f"{source.path}: {len(rest)} arrays of its trunk have no place in the network ({', '.join(rest[:3])}"
            f"{', ...' if len(rest) > 3 else ''}); choose the config of the file's network"
        )


def is_trunk(name: str) -> bool:
    """Whether an array of a source (its full name, or `layer/leaf` under the released names) belongs to the trunk.

    >>> is_trunk("res4b22_branch2a/kernel"), is_trunk("batch_stats/backbone/bn_conv1/mean"), is_trunk("fc6/kernel")
    (True, True, False)
    """
    bare = name.removeprefix("batch_stats/")
    return bare.startswith("backbone/") or re.match(r"(res|bn)\d|bn_conv1|conv\d", bare) is not None


def _key(name: str, full: bool) -> tuple[str, ...]:
    """The key that two names of one variable share: layer and leaf; the full name for the CRF's variables."""
    parts = name.split("/")
    if full and ("crf" in parts or len(parts) < 2):
        return tuple(parts)
    return canonical(parts[-2]), parts[-1]


def _shape_reason(layer: str, here: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    if layer.startswith(("fc8", "fc1")) and here[:-1] == wanted[:-1]:
        return f"the classifier: the file has {here[-1]} classes, the network {wanted[-1]}"
    return f"shape {list(here)} in the file, {list(wanted)} in the network"


def _check_trunk(source: Source, report: Report) -> None:
    trunk = {k: v for k, v in report.missing.items() if k.removeprefix("batch_stats/").startswith("backbone/")}
    if trunk:
        shown = "; ".join(f"{k}: {v}" for k, v in list(trunk.items())[:3])
        raise UserError(
            f"{source.path}: {len(trunk)} arrays of the trunk do not come from this file ({shown}"
            f"{'; ...' if len(trunk) > 3 else ''}); choose the config of the file's network"
        )


class _FullyConnected:
    """fc6 and fc7 of an ImageNet VGG-16, adapted to DeepLab's sizes."""

    def __init__(self, arrays: Mapping[tuple[str, ...], np.ndarray], seed: int):
        self._arrays = arrays
        self._seed = seed
        self._changes: dict[str, str] = {}

    def fit(self, layer: str, leaf: str, shape: tuple[int, ...]) -> tuple[tuple[str, str], np.ndarray | None, str]:
        """The value of `layer/leaf` in the requested shape.

        Returns:
          (the key it comes from, the array or None, why there is none).
        """
        base, _, branch = layer.partition("_")
        key = (layer, leaf) if (layer, leaf) in self._arrays else (base, leaf)
        value = self._arrays.get(key)
        if value is None:
            return key, None, "not in the file"
        before, wanted = value.shape, shape
        if leaf == "kernel":
            rows, columns = (decimated(have, want) for have, want in zip(value.shape[:2], shape[:2]))
            if rows is None or columns is None:
                return key, None, _shape_reason(layer, before, wanted)
            value = value[np.ix_(rows, columns)]
            if base == "fc7":
                value = value[:, :, self._subset(f"fc6_{branch}", value.shape[2], shape[2])]
        if value.shape[-1] >= shape[-1]:
            value = value[..., self._subset(layer, value.shape[-1], shape[-1])]
        if value.shape != shape:
            return key, None, _shape_reason(layer, before, wanted)
        if leaf == "kernel" and value.shape != before:
            self._changes[layer] = f"{list(before)} -> {list(shape)}"
        return key, value, ""

    def _subset(self, layer: str, have: int, want: int) -> np.ndarray:
        """Filters that a slimmed layer keeps: a random subset, its own for each layer and branch."""
        if want >= have:
            return np.arange(have)
        named = re.fullmatch(r"fc(\d)_?(\d*)", layer)
        assert named is not None, "only fc6 and fc7 are slimmed"
        number, branch = named.groups()
        generator = np.random.default_rng([self._seed, int(number), int(branch or 0)])
        return np.sort(generator.choice(have, want, replace=False))

    def notes(self) -> list[str]:
        return [
            f"{layer}: {change}, decimated in space and slimmed to a random subset (seed {self._seed}) where smaller"
            for layer, change in self._changes.items()
        ]


def decimated(have: int, want: int) -> np.ndarray | None:
    """Positions of a kernel that simple decimation keeps (v1 section 3.2): 7 -> 4 is 0, 2, 4, 6 and 7 -> 3 is 0, 3, 6.

    None if `want` positions are not evenly spaced in `have`.

    >>> decimated(7, 4), decimated(7, 3), decimated(7, 5)
    (array([0, 2, 4, 6]), array([0, 3, 6]), None)
    """
    if want == have:
        return np.arange(have)
    if want < 2 or have < want or (have - 1) % (want - 1):
        return None
    return np.arange(0, have, (have - 1) // (want - 1))
