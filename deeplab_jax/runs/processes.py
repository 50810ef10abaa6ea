"""Several processes: JAX's own distributed runtime, and the operations that training needs."""

import itertools
import os
import threading
from typing import Any

import jax
import numpy as np

from deeplab_jax import interrupts
from deeplab_jax.errors import UserError
from deeplab_jax.files import reason
from deeplab_jax.runs.peers import Watch

_LONG = 7 * 24 * 3600  # seconds
_barriers = itertools.count()
_watch: Watch | None = None
_left = False
_ended = threading.Lock()  # held by the thread that reports why this process ends
_LOST = ("gloo", "nccl", "heartbeat", "coordination service", "connection", "socket closed", "peer", "unavailable:")


class LostPeerError(UserError):
    """Another process of the job is gone.

    Attributes:
      ends_at_once: the process must not end in Python's usual way: JAX's shutdown would wait for the other one, and
        abort.
    """

    ends_at_once = True


def initialize(wanted: bool, coordinator: str = "", process_id: int = -1, num_processes: int = 0) -> None:
    """Joins the processes of a job, before the first use of a device.

    Args:
      wanted: true to join even if no known launcher is detected (Cloud TPU and Kubernetes find their peers then).
      coordinator: "host:port" of process 0, if no launcher provides it.
      process_id: this process's rank, with `coordinator`.
      num_processes: the number of processes, with `coordinator`.

    Raises:
      UserError: the flags are incomplete, or the peers cannot be reached.
    """
    if not (wanted or coordinator or launched()):
        return
    if coordinator and (process_id < 0 or num_processes < 1):
        raise UserError("--coordinator needs --process_id and --num_processes as well")
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host_timeout = heartbeat_seconds()
    arguments: dict[str, Any] = {"heartbeat_timeout_seconds": host_timeout}
    try:
        if coordinator:
            arguments |= {"coordinator_address": coordinator, "process_id": process_id, "num_processes": num_processes}
        else:
            arguments |= _told_by_launcher()
        if "coordinator_address" in arguments:
            # `peers.Watch` notices a dead process before JAX would abort this process for it.
            arguments |= _start_watch(arguments, host_timeout) | {"heartbeat_timeout_seconds": _LONG}
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as e:
        raise UserError(f"--distributed: could not join the job's processes ({str(e).splitlines()[0]})") from e


def _told_by_launcher() -> dict[str, Any]:
    """The arguments that JAX determines from a launcher; empty if this version of JAX does not provide them."""
    try:
        from jax._src.clusters import ClusterEnv

        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, None, 300)
    except (ImportError, AttributeError, TypeError):
        return {}
    names = ("coordinator_address", "num_processes", "process_id", "local_device_ids")
    return {} if None in found[:3] else dict(zip(names, found, strict=True))


def _start_watch(arguments: dict[str, Any], host_timeout: int) -> dict[str, str]:
    global _watch
    rank, count = arguments["process_id"], arguments["num_processes"]

    def on_loss(other: int) -> None:
        if _ended.acquire(blocking=False):
            interrupts.now(1, f"error: {_sentence(rank, count, f'process {other}')}\n".encode())

    _watch = Watch(arguments["coordinator_address"], rank, on_loss, host_timeout)
    return _watch.start()


def _sentence(rank: int, count: int, why: str) -> str:
    return (
        f"process {rank} of {count}: another process of the job ended ({why}); see its messages; the same command "
        "continues from the newest checkpoint"
    )


def lost_peer_error(error: Exception) -> LostPeerError:
    """The sentence for a runtime error that means that another process is gone; see `lost_peer`."""
    _ended.acquire(blocking=False)
    return LostPeerError(_sentence(jax.process_index(), jax.process_count(), str(error).splitlines()[0][:200]))


def leave() -> None:
    """Announces to the others that this process ends because all do; without this, they would end too."""
    global _left
    _left = True
    if _watch:
        _watch.leave()


def is_waited_for() -> bool:
    """Whether this is one of several processes that are not done: they would wait for each other."""
    return jax.distributed.is_initialized() and not _left


def launched() -> bool:
    """Whether a launcher that jax.distributed knows started this process as one of several.

    SLURM_NTASKS is no evidence: it is set in the whole allocation, even if no srun started this process and there
    will be no peers.
    """
    slurm = "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1
    return slurm or _number("OMPI_COMM_WORLD_SIZE") > 1


def _number(variable: str, default: int = 1) -> int:
    value = os.environ.get(variable, "")
    return int(value) if value.isdecimal() else default


def heartbeat_seconds() -> int:
    """How long a process may be silent before the others consider it dead: DEEPLAB_HEARTBEAT_SECONDS, or 100.

    Raises:
      UserError: the variable is not a whole number above 0.
    """
    text = os.environ.get("DEEPLAB_HEARTBEAT_SECONDS", "100")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"DEEPLAB_HEARTBEAT_SECONDS={text}: must be a whole number above 0")
    return int(text)


def place(wanted: bool, coordinator: str = "", process_id: int = -1, num_processes: int = 0) -> tuple[int, int]:
    """This process's (index, count) in a job whose processes share files and use no collectives.

    They are found in the same way as by `initialize`. If a launcher starts several on a host, each sees only the GPU
    with its number there. Call it before the first use of a device.

    Args:
      wanted: true to ask JAX about peers if no known launcher is detected (Cloud TPU, Kubernetes).
      coordinator: accepted as in `initialize`; it only requires the other two.
      process_id: this process's rank, with `num_processes`.
      num_processes: the number of processes.

    Raises:
      UserError: the arguments are incomplete, or `wanted` and no peers are found.
    """
    if coordinator or process_id >= 0 or num_processes:
        if process_id < 0 or num_processes < 1:
            raise UserError("--process_id and --num_processes must be given together")
        return process_id, num_processes
    if "SLURM_PROCID" in os.environ and _number("SLURM_STEP_NUM_TASKS") > 1:
        found = int(os.environ["SLURM_PROCID"]), _number("SLURM_STEP_NUM_TASKS")
        local, here = os.environ.get("SLURM_LOCALID", ""), os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")
    elif _number("OMPI_COMM_WORLD_SIZE") > 1:
        found = _number("OMPI_COMM_WORLD_RANK"), _number("OMPI_COMM_WORLD_SIZE")
        local, here = (os.environ.get(f"OMPI_COMM_WORLD_LOCAL_{name}", "") for name in ("RANK", "SIZE"))
    elif wanted:
        return _place_by_jax()
    else:
        return 0, 1
    several = any(part.partition("(")[0] != "1" for part in here.split(","))  # "8(x4)": 8 on each of 4 hosts
    if several and local.isdecimal() and "," in os.environ.get("CUDA_VISIBLE_DEVICES", ","):  # else one GPU is chosen
        jax.config.update("jax_cuda_visible_devices", local)
        jax.config.update("jax_rocm_visible_devices", local)
    return found


def _place_by_jax() -> tuple[int, int]:
    try:
        from jax._src.clusters import ClusterEnv  # also used by jax.distributed.initialize

        kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
        cluster = next((kind for kind in kinds if kind.is_env_present()), None)
        if cluster is not None:
            return cluster.get_process_id(), cluster.get_process_count()
    except Exception as e:  # whatever a metadata server, or another release of JAX, raises
        raise UserError(f"--distributed: JAX cannot determine which process this is ({reason(e)}); give "
                        "--process_id and --num_processes") from e  # fmt: skip
    raise UserError("--distributed: no launcher is detected; give --process_id and --num_processes")


def is_first() -> bool:
    """Whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process arrives, however slow its set-up was.

    This is the coordination service's barrier; the collectives of the devices, which on CPUs give up after 30 seconds
    of waiting for a peer to connect, begin after it.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        unique = f"{name} {next(_barriers)}"  # all processes reach the same barriers in the same order
        multihost.sync_global_processes(unique, timeout=_LONG, processes=set(range(jax.process_count())))


def from_first(number: int) -> int:
    """Process 0's number, in every process; they wait for each other."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    barrier("from_first")  # process 0 may have read or written for longer than the devices' time-out
    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def lost_peer(error: Exception) -> bool:
    """Whether a runtime error means that another process of the job is gone."""
    return jax.process_count() > 1 and any(word in str(error).lower() for word in _LOST)


def any_process(flag: bool, *, ask: bool) -> bool:
    """Whether the flag is set in any process.

    Args:
      flag: this process's flag.
      ask: whether the processes meet here and exchange their flags; without it, several processes return False.
    """
    if jax.process_count() == 1:
        return flag
    if not ask:
        return False
    from jax.experimental import multihost_utils

    barrier("any_process")
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))
