"""`--model NAME`, shared by the commands that accept a shipped model instead of a run."""

from absl import flags

from deeplab_jax.errors import UserError


def define(what: str = "a model that the package ships, such as camvid, instead of --workdir") -> None:
    """Defines the flag; without a value (`--model`) the command lists the models."""
    flags.DEFINE_string("model", None, f"{what}; without a name: lists them")


def listed(values: flags.FlagValues) -> bool:
    """Lists the shipped models and returns True if `--model` requests it."""
    if values.model is None or values.model:
        return False
    from deeplab_jax.weights import box

    print(box.table())
    return True


def source(values: flags.FlagValues) -> str:
    """The model for `deeplab_jax.load`: the folder of `--workdir`, or the name of `--model`.

    Raises:
      UserError: neither or both are given, `--workdir` is not a run's folder, or no shipped model has that name.
    """
    from pathlib import Path

    from deeplab_jax.weights import box

    if bool(values.workdir) == bool(values.model):
        raise UserError("give either --workdir W, the folder of a training run, or --model NAME (--model lists them)")
    if values.model:
        return str(box.require(values.model))
    if not (Path(values.workdir) / box.CONFIG).is_file():
        raise UserError(f"--workdir={values.workdir}: is not a training workdir (it has no {box.CONFIG})")
    return values.workdir
