"""The flags that make a command one of several processes."""

from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from deeplab_jax.runs.job import Job


def define(coordinator: str = "host:port of process 0, where no launcher tells it") -> None:
    """Defines `--distributed`, `--coordinator`, `--process_id` and `--num_processes`.

    Args:
      coordinator: what the second one means to the command.
    """
    flags.DEFINE_bool("distributed", False, "join the processes of a job (automatic under SLURM and Open MPI)")
    flags.DEFINE_string("coordinator", "", coordinator)
    flags.DEFINE_integer("process_id", -1, "rank of this process, where no launcher tells it")
    flags.DEFINE_integer("num_processes", 0, "number of processes, where no launcher tells it")


def define_for_shares() -> None:
    """The same for a command whose processes share its files and need no coordinator."""
    define("not needed here; as in main's command line, whose other flags mean the same")


def job(values: flags.FlagValues) -> "Job":
    """This process's place in its job; alone without the flags and without a launcher.

    Raises:
      UserError: the flags are incomplete, or no peers are found.
    """
    from deeplab_jax.runs.job import Job
    from deeplab_jax.runs.processes import place

    return Job(*place(values.distributed, values.coordinator, values.process_id, values.num_processes))
