"""Several processes: JAX's own distributed runtime, and what the loop needs of it."""

import os

import jax
import numpy as np

from deeplab_jax.errors import UserError

# Set by the launchers that jax.distributed knows; a job of one task needs no runtime.
_LAUNCHERS = {"SLURM_NTASKS": "SLURM", "OMPI_COMM_WORLD_SIZE": "Open MPI"}


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
    launched = any(int(os.environ.get(name, "1") or 1) > 1 for name in _LAUNCHERS)
    if not (wanted or coordinator or launched):
        return
    if coordinator and (process_id < 0 or num_processes < 1):
        raise UserError("--coordinator needs --process_id and --num_processes as well")
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    arguments = {"heartbeat_timeout_seconds": int(os.environ.get("DEEPLAB_HEARTBEAT_SECONDS", "100"))}
    if coordinator:
        arguments |= {"coordinator_address": coordinator, "process_id": process_id, "num_processes": num_processes}
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError) as e:
        raise UserError(f"--distributed: the job's processes could not be joined ({str(e).splitlines()[0]})") from e


def is_first() -> bool:
    """Whether this is process 0, the only one that writes."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until every process is here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


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
