"""Devices that programs can be compiled for without having one, and their makers' figures."""

import contextlib
import dataclasses
import os
import re
from typing import Any

from deeplab_jax.errors import UserError

# As the driver describes a card; XLA's GPU compiler asks nothing else.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
runtime_version { major: 12 minor: 8 }
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, by its maker's data sheet.

    Attributes:
      platform: "tpu" or "gpu".
      memory: bytes.
      bandwidth: of the memory, bytes/s.
      bfloat16: FLOP/s of products of bfloat16.
      default: FLOP/s of float32 products as they are by default: bfloat16 on a TPU, TF32 on a GPU.
      highest: FLOP/s of float32 products of full precision: six passes on a TPU, no matrix units on a GPU.
      clock: Hz of the cycles that a TPU's compiler counts; 0 = it counts none.
    """

    platform: str
    memory: float
    bandwidth: float
    bfloat16: float
    default: float
    highest: float
    clock: float = 0.0


def _tpu(memory: float, bandwidth: float, peak: float, clock: float) -> Chip:
    return Chip("tpu", memory, bandwidth, peak, peak, peak / 6, clock)


CHIPS = {
    "v5e": _tpu(16e9, 819e9, 197e12, 1.5e9),
    "v5p": _tpu(95e9, 2765e9, 459e12, 1.75e9),
    "v6e": _tpu(32e9, 1640e9, 918e12, 1.75e9),
    "h100": Chip("gpu", 80e9, 3352e9, 989e12, 494e12, 67e12),
}


def prepare_environment() -> None:
    """Before JAX starts: this process computes on CPUs, and asks no network for TPUs."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "v5litepod-1"}
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # a program for what is not here cannot be read back
    flags = os.environ.get("XLA_FLAGS", "").split()
    # There is nothing to try kernels out on; products are cuBLAS's, as in training (`startup.set_xla_defaults`).
    for flag in ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false"):
        if not any(word.partition("=")[0] == flag.partition("=")[0] for word in flags):
            flags.append(flag)
    os.environ["XLA_FLAGS"] = " ".join(flags)


def chip_of(target: str) -> Chip:
    """The chip of a target such as v5e:2x4 or h100:8.

    Raises:
      UserError: another form, or another chip.
    """
    name, _, shape = target.partition(":")
    fits = re.fullmatch(r"\d+x\d+(x\d+)?" if name.startswith("v") else r"\d+", shape)
    if name not in CHIPS or not fits:
        raise UserError(f"--target={target}: give a chip and how many, as in v5e:2x4, v5p:2x2x1, v6e:16x16, h100:8")
    return CHIPS[name]


def devices_of(target: str) -> list[Any]:
    """The devices to compile for, none of which is here.

    Raises:
      UserError: the target is none, or what compiles for it is not installed.
    """
    from jax.experimental import topologies

    chip, (name, _, shape) = chip_of(target), target.partition(":")
    try:
        if chip.platform == "gpu":
            return list(
                topologies.get_topology_desc(name, "cuda", target_config=_H100, topology=f"1x1x{shape}").devices
            )
        one = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
        return list(topologies.get_topology_desc(platform="tpu", topology_name=target, **one).devices)
    except Exception as e:  # plugins that are missing raise many kinds
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f"--target={target}: cannot be compiled for here ({reason[:200]}); {missing(chip)}") from e


def missing(chip: Chip) -> str:
    """What to do where a target's compiler is not installed."""
    return f"pip install '.[aot]' brings the {chip.platform.upper()} compiler, pinned to one release of jax"


def installed(platform: str) -> bool:
    """Whether what compiles for "tpu" or "gpu" is there."""
    from importlib import util

    with contextlib.suppress(ModuleNotFoundError):
        return util.find_spec("libtpu" if platform == "tpu" else "jax_plugins.xla_cuda12") is not None
    return False
