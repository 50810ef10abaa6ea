"""Checkpoints that are either whole or not counted: orbax writes them, digests prove them.

A checkpoint is `checkpoints/<step>/`, written by orbax to a temporary name and renamed, and then `digests/<step>.json`
with the SHA-256 of each of its files. Only a checkpoint whose digests match is ever read; a kill at any moment leaves
either the whole pair or something that the next run removes.

Process 0 alone writes, without the others: orbax's own barriers between processes are not used.
"""

import hashlib
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from ml_collections import ConfigDict

from deeplab_jax.config import recorded_config
from deeplab_jax.console import say as say_on_stderr
from deeplab_jax.errors import UserError
from deeplab_jax.files import write_json


class CheckpointWriteError(UserError):
    """A checkpoint could not be written, most often for want of disk space; the ones before it are untouched."""


class Checkpoints:
    """The checkpoints of one workdir: the newest `keep` and the best.

    Args:
      workdir: the run's folder.
      keep: how many of the newest to keep, at least 1.
      read_only: nothing is created, changed or deleted, as beside a training that is still running; the processes of a
        job but the first are so in any case.

    Raises:
      UserError: the workdir cannot be written.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, read_only: bool = False):
        self.workdir = Path(workdir)
        self.keep = max(keep, 1)
        self._folder = self.workdir.absolute() / "checkpoints"
        self._digests = self.workdir / "digests"
        self._unwritten_best: dict | None = None  # a mark that a full disk did not take
        self._said = False  # that it did not
        absl_logging.set_verbosity(absl_logging.ERROR)  # orbax tells of every array at INFO
        self._manager = None
        if read_only or jax.process_index() > 0:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._digests.mkdir(parents=True, exist_ok=True)
            self._manager = _manager(self._folder, cleanup_tmp_directories=True)
            for left in [*self._digests.glob("*.tmp*"), *self.workdir.glob("best.tmp*")]:  # by a kill
                left.unlink()
        except OSError as e:
            raise UserError(f"{self.workdir}: cannot be written ({e.strerror or e}); give another --workdir") from e

    def steps(self) -> list[int]:
        """Steps of the checkpoints that were committed, oldest first (their digests are not checked here)."""
        return sorted(int(p.stem) for p in self._digests.glob("*.json") if p.stem.isdigit())

    def save(self, step: int, tree: dict[str, np.ndarray], meta: dict) -> None:
        """Writes and commits a checkpoint, then deletes those no longer kept; process 0 calls it.

        Args:
          step: the number of steps done.
          tree: flat name -> array; see `flatten_state`.
          meta: JSON values kept beside it.

        Raises:
          CheckpointWriteError: it could not be written (disk full, no permission); nothing of it remains.
        """
        try:
            if step in self._manager.all_steps():  # left uncommitted by a kill
                self._delete(step)
            args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args, force=True)
            self._manager.wait_until_finished()
            write_json(self._digests / f"{step}.json", {"files": _digest_files(self._folder / str(step))})
        except Exception as e:  # tensorstore reports a full disk with exceptions of its own
            self._remove_partial(step)
            reason = next((line for line in str(e).splitlines() if line.strip()), type(e).__name__)
            raise CheckpointWriteError(
                f"{self._folder / str(step)}: could not be written ({reason[:200]}); free disk space and run the same "
                "command again, which goes on from the checkpoint before"
            ) from e
        self._write_best()
        kept = {*self.steps()[-self.keep :], self.best_step()}
        for old in set(self.steps()) - kept:
            self._delete(old)

    def restore(self, step: int) -> tuple[dict[str, np.ndarray], dict]:
        """Reads one checkpoint as (flat name -> array, meta).

        Raises:
          UserError: it is missing, or one of its files is not what was written.
        """
        problem = self.problem(step)
        if problem:
            raise UserError(f"{self._folder / str(step)}: {problem}; delete it, and the one before is used")
        return self._read(step)

    def restore_newest(self, say=say_on_stderr) -> tuple[int, dict[str, np.ndarray], dict] | None:
        """Reads the newest checkpoint that is whole, telling of each that is not; None where there is none."""
        step = self.newest_whole(say)
        return None if step is None else (step, *self._read(step))

    def newest_whole(self, say=say_on_stderr) -> int | None:
        """The step of the newest checkpoint that is whole; those that are not are told of, and deleted by a writer."""
        for step in reversed(self.steps()):
            problem = self.problem(step)
            if not problem:
                return step
            say(f"{self.workdir}: checkpoint {step} is damaged ({problem}) and is not used; trying the one before")
            if self._manager:
                self._delete(step)
        return None

    def problem(self, step: int) -> str:
        """What is wrong with a checkpoint, or "" if each of its files has the digest written with it."""
        try:
            expected = json.loads((self._digests / f"{step}.json").read_text())["files"]
        except (OSError, ValueError, KeyError):
            return "its digests are missing or unreadable"
        folder = self._folder / str(step)
        if not folder.is_dir():
            return "its folder is missing"
        try:
            found = _digest_files(folder)
        except OSError as e:
            return f"its files cannot be read, {e.strerror or e}"
        for name, digest in expected.items():
            if name not in found:
                return f"its file {name} is missing"
            if found[name] != digest:
                return f"its file {name} has changed since it was written"
        return ""

    def mark_best(self, step: int, mean_iou: float) -> bool:
        """Notes a checkpoint's mean IoU on the selection split; returns whether it is the best so far.

        A mark that the disk does not take is kept in memory, counts, and is written with the next checkpoint.
        """
        best = self.best()
        if best and best["mean_iou"] >= mean_iou and best["step"] != step and best["step"] in self.steps():
            return False
        if self._manager:
            self._unwritten_best = {"step": step, "mean_iou": mean_iou}
            self._write_best()
        return True

    def best_step(self) -> int | None:
        """The step with the best mean IoU on the selection split, if one was marked and is still there."""
        best = self.best()
        return best["step"] if best and best["step"] in self.steps() else None

    def best(self) -> dict | None:
        """The mark as it was made, {"step", "mean_iou"}, whether or not its checkpoint is still there."""
        if self._unwritten_best:
            return self._unwritten_best
        try:
            best = json.loads((self.workdir / "best.json").read_text())
            return {"step": int(best["step"]), "mean_iou": float(best["mean_iou"])}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def forget_after(self, step: int) -> None:
        """Drops a best mark from beyond `step`: the run went back before it."""
        best = self.best()
        if best and best["step"] > step and self._manager:
            self._unwritten_best = None
            (self.workdir / "best.json").unlink(missing_ok=True)

    def _write_best(self) -> None:
        if not self._unwritten_best:
            return
        path = self.workdir / "best.json"
        try:
            write_json(path, self._unwritten_best)
        except OSError as e:
            if not self._said:
                say_on_stderr(f"warning: {path}: cannot be written ({e.strerror or e}); it is kept and tried again")
            self._said = True
            return
        self._unwritten_best, self._said = None, False

    def _read(self, step: int) -> tuple[dict[str, np.ndarray], dict]:
        manager = self._manager or _manager(self._folder, read_only=True)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        restored = manager.restore(step, args=args)
        return dict(restored.state), dict(restored.meta)

    def _delete(self, step: int) -> None:
        (self._digests / f"{step}.json").unlink(missing_ok=True)  # uncommit first
        if step in self._manager.all_steps():
            self._manager.delete(step)
        shutil.rmtree(self._folder / str(step), ignore_errors=True)

    def _remove_partial(self, step: int) -> None:
        (self._digests / f"{step}.json").unlink(missing_ok=True)
        for path in self._folder.glob(f"{step}*"):
            shutil.rmtree(path, ignore_errors=True)
        self._manager.reload()


def flatten_state(state) -> dict[str, np.ndarray]:
    """A state pytree as flat name -> array; names join the path with dots, as in `trainable.head.fc1.kernel`."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(state)
    return {_name(path): np.asarray(leaf) for path, leaf in leaves}


def unflatten_state(template, flat: dict[str, np.ndarray]):
    """Fills a template state with the arrays of `flatten_state`.

    Raises:
      UserError: names or shapes differ: the checkpoint is of another architecture or optimizer.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    names = [_name(path) for path, _ in leaves]
    lacking = sorted(set(names) - set(flat))
    unknown = sorted(set(flat) - set(names))
    if lacking or unknown:
        what = f"lacks '{lacking[0]}'" if lacking else f"has '{unknown[0]}', which this config does not"
        raise UserError(f"the checkpoint is of another architecture: it {what}; use another --workdir or its config")
    for name, (_, leaf) in zip(names, leaves):
        if flat[name].shape != leaf.shape:
            raise UserError(
                f"the checkpoint is of another architecture: '{name}' is {flat[name].shape} there and {leaf.shape} "
                "by this config; use another --workdir or its config"
            )
    return jax.tree_util.tree_unflatten(treedef, [flat[n].astype(leaf.dtype) for n, (_, leaf) in zip(names, leaves)])


def variables_from(flat: dict[str, np.ndarray]) -> dict:
    """Flax variables (averaged ones where there are any) from a flat state."""
    averaged = "ema." if any(name.startswith("ema.trainable.") for name in flat) else ""
    groups = {f"{averaged}trainable.": "params", "frozen.": "params", f"{averaged}batch_stats.": "batch_stats"}
    variables: dict = {}
    for name, value in flat.items():
        for prefix, collection in groups.items():
            if name.startswith(prefix):
                node = variables.setdefault(collection, {})
                *parents, last = name.removeprefix(prefix).split(".")
                for part in parents:
                    node = node.setdefault(part, {})
                node[last] = value
    return variables


def load_workdir(workdir: str | Path, step: int | None = None):
    """Opens a training workdir; changes nothing in it, so that its training may be running.

    Args:
      workdir: a folder that `main` wrote.
      step: which checkpoint; None = the best where one was chosen, else the newest that is whole. A best or newest one
        that is not whole is passed over, which is said on stderr.

    Returns:
      (config, model, variables, meta): the run's ConfigDict, the Flax module, its variables, and what was recorded
      with them: `step`, `class_names`, `palette`, `num_classes`, `data_fingerprint`.

    Raises:
      UserError: it is not a workdir, or has no checkpoint that is whole, or that of `step` is not.
    """
    from deeplab_jax.models import create_model

    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"{workdir}: is not a training workdir (it has no config.json); train one with deeplab_jax.main"
        )
    config = read_config(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    best = checkpoints.best()
    wanted = step if step is not None else best and best["step"]
    problem = "" if wanted is None else checkpoints.problem(wanted)
    if step is not None and problem:
        raise UserError(
            f"{workdir}: checkpoint {step} cannot be used ({problem}); it has those of steps "
            f"{', '.join(map(str, checkpoints.steps())) or 'none'}"
        )
    if problem:
        say_on_stderr(f"{workdir}: the best checkpoint, {wanted}, is not used ({problem}); looking for the newest")
    chosen = checkpoints.newest_whole() if wanted is None or problem else wanted
    if chosen is None:
        raise UserError(f"{workdir}: has no whole checkpoint yet; let its training write one")
    flat, meta = checkpoints._read(chosen)  # its digests were just checked
    model = create_model(config.model, meta["num_classes"], crf=config.crf)
    return config, model, variables_from(flat), meta | {"step": chosen}


def read_config(workdir: str | Path) -> ConfigDict:
    """The config that a workdir's run was started with, with today's fields."""
    return recorded_config(json.loads((Path(workdir) / "config.json").read_text()))


def _manager(folder: Path, *, read_only: bool = False, cleanup_tmp_directories: bool = False) -> ocp.CheckpointManager:
    """orbax's manager of a folder that is there, for this process alone: it waits for no other."""
    alone = {}
    if jax.process_count() > 1:
        mine = jax.process_index()
        alone["multiprocessing_options"] = ocp.options.MultiprocessingOptions(
            primary_host=mine, active_processes={mine}, barrier_sync_key_prefix=f"process{mine}"
        )
    options = ocp.CheckpointManagerOptions(
        create=False,
        enable_async_checkpointing=False,
        save_interval_steps=0 if read_only else 1,
        read_only=read_only,
        cleanup_tmp_directories=cleanup_tmp_directories,
        **alone,
    )
    return ocp.CheckpointManager(folder, options=options)


def _name(path) -> str:
    return ".".join(_key(entry) for entry in path)


def _key(entry) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _digest_files(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
