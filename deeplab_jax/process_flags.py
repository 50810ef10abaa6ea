"""The flags that make a command one of several processes."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from deeplab_jax.runs.job import Job


def define(coordinator: str = "host:port of process 0, if no launcher provides it") -> None:
    """Defines `--distributed`, `--coordinator`, `--process_id` and `--num_processes`.

    Args:
      coordinator: help text of `--coordinator`.
    """
    flags.DEFINE_bool("distributed", False, "join the processes of a job (automatic under SLURM and Open MPI)")
    flags.DEFINE_string("coordinator", "", coordinator)
    flags.DEFINE_integer("process_id", -1, "rank of this process, if no launcher provides it")
    flags.DEFINE_integer("num_processes", 0, "number of processes, if no launcher provides it")


def define_for_shares() -> None:
    """The same for a command whose processes share its files and need no coordinator."""
    define("not needed here; accepted as in main's command line")


def job(values: flags.FlagValues) -> "Job":
    """This process's place in its job; a single process without the flags and without a launcher.

    Raises:
      UserError: the flags are incomplete, or no peers are found.
    """
    from deeplab_jax.runs.job import Job
    from deeplab_jax.runs.processes import place

    return Job(*place(values.distributed, values.coordinator, values.process_id, values.num_processes))
