"""Several processes: JAX's own distributed runtime, and what the loop needs of it."""

import os
from typing import Any

import jax
import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.files import reason

_LONG = 7 * 24 * 3600  # seconds
_LOST = ("gloo", "nccl", "heartbeat", "coordination service", "connection", "socket closed", "peer", "unavailable:")


class LostPeerError(UserError):
    """Another process of the job is gone.

    Attributes:
      ends_at_once: the process is not to end as Python does: JAX's shutdown would wait for the other one, and abort.
    """

    ends_at_once = True


def initialize(wanted: bool, coordinator: str = "", process_id: int = -1, num_processes: int = 0) -> None:
    """Joins the processes of a job, before the first use of a device.

    Args:
      wanted: true to join even where no known launcher is seen (Cloud TPU and Kubernetes find their peers then).
      coordinator: "host:port" of process 0, where no launcher tells it.
      process_id: this process's rank, with `coordinator`.
      num_processes: how many there are, with `coordinator`.

    Raises:
      UserError: the flags are incomplete, or the peers cannot be reached.
    """
    if not (wanted or coordinator or launched()):
        return
    if coordinator and (process_id < 0 or num_processes < 1):
        raise UserError("--coordinator needs --process_id and --num_processes as well")
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    arguments: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds()}
    if coordinator:
        arguments |= {"coordinator_address": coordinator, "process_id": process_id, "num_processes": num_processes}
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"--distributed: the job's processes could not be joined ({str(e).splitlines()[0]})") from e


def launched() -> bool:
    """Whether a launcher that jax.distributed knows started this process as one of several.

    SLURM_NTASKS tells nothing: it is set in the whole of an allocation, also where no srun started this process and
    no peer will come.
    """
    slurm = "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1
    return slurm or _number("OMPI_COMM_WORLD_SIZE") > 1


def _number(variable: str) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdigit() else 1


def heartbeat_seconds() -> int:
    """For how long a process may give no sign before the others take it for dead: DEEPLAB_HEARTBEAT_SECONDS, or 100.

    Raises:
      UserError: the variable is no whole number above 0.
    """
    text = os.environ.get("DEEPLAB_HEARTBEAT_SECONDS", "100")
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"DEEPLAB_HEARTBEAT_SECONDS={text}: must be a whole number above 0")
    return int(text)


def place(wanted: bool, coordinator: str = "", process_id: int = -1, num_processes: int = 0) -> tuple[int, int]:
    """This process's (index, count) in a job whose processes share files and use no collectives.

    They are found as `initialize` finds them, and as there a process for each GPU of a host sees its own GPU alone. To
    be called before the first use of a device.

    Args:
      wanted: true to ask JAX about peers where no known launcher is seen (Cloud TPU, Kubernetes).
      coordinator: given as for `initialize`, it only says that the other two must be.
      process_id: this process's rank, with `num_processes`.
      num_processes: how many there are.

    Raises:
      UserError: the arguments are incomplete, or `wanted` and no peers are found.
    """
    if coordinator or process_id >= 0 or num_processes:
        if process_id < 0 or num_processes < 1:
            raise UserError("--process_id and --num_processes belong together; give both")
        return process_id, num_processes
    if "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1:
        found = int(os.environ["SLURM_PROCID"]), _number("SLURM_STEP_NUM_TASKS")
        local = os.environ.get("SLURM_LOCALID", "")
    elif _number("OMPI_COMM_WORLD_SIZE") > 1:
        found = _number("OMPI_COMM_WORLD_RANK"), _number("OMPI_COMM_WORLD_SIZE")
        local = os.environ.get("OMPI_COMM_WORLD_LOCAL_RANK", "")
    elif wanted:
        return _place_by_jax()
    else:
        return 0, 1
    if local.isdigit() and "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):  # else the launcher chose one GPU
        jax.config.update("jax_cuda_visible_devices", local)
        jax.config.update("jax_rocm_visible_devices", local)
    return found


def _place_by_jax() -> tuple[int, int]:
    try:
        from jax._src.clusters import ClusterEnv  # which jax.distributed.initialize asks as well

        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        cluster = next((kind for kind in kinds if kind.is_env_present()), None)
        if cluster is not None:
            return cluster.get_process_id(), cluster.get_process_count()
    except Exception as e:  # whatever a metadata server, or another release of JAX, makes of the question
        raise UserError(f"--distributed: JAX cannot say which process this is ({reason(e)}); give "
                        "--process_id and --num_processes") from e  # fmt: skip
    raise UserError("--distributed: no launcher is seen; give --process_id and --num_processes")


def is_first() -> bool:
    """Whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here, however slowly it was set up.

    This is the coordination service's barrier; the collectives of the devices, which on CPUs give up after 30 seconds
    of waiting for a peer to connect, begin after it.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.sync_global_processes(name, timeout=_LONG, processes=set(range(jax.process_count())))


def from_first(number: int) -> int:
    """Process 0's number, in every process; they wait for each other."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def lost_peer(error: Exception) -> bool:
    """Whether an error of the runtime says that another process of the job is gone."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in _LOST)


def any_process(flag: bool, *, ask: bool) -> bool:
    """Whether the flag is set in any process.

    Args:
      flag: this process's.
      ask: the processes meet here, and learn of each other's flags; without it, several take it for unset.
    """
    if jax.process_count() == 1:
        return flag
    if not ask:
        return False
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
