"""Checkpoints that are either complete or ignored: orbax writes them, digests verify them.

A checkpoint is `checkpoints/<step>/`, written by orbax to a temporary name and renamed, and then `digests/<step>.json`
with the SHA-256 of each of its files. A checkpoint whose digests do not match is never used; a kill at any moment
leaves a complete one, or remains that the next run removes. Damaged ones are not deleted but moved to `aside/`.

Only process 0 writes, without the others: orbax's own barriers between processes are not used.
"""

import hashlib
import os
import secrets
import shutil
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from ml_collections import ConfigDict

from deeplab_jax.console import say as say_on_stderr
from deeplab_jax.errors import UserError
from deeplab_jax.files import read_json, reason, remove_leftovers, set_aside, write_json
from deeplab_jax.runs import schema
from deeplab_jax.runs.flat import variables_from
from deeplab_jax.runs.provenance import config_of

_NO_DIGEST = "its digests are missing"
_PARTIAL = "*.orbax-checkpoint-tmp*"  # what orbax writes before it renames
_REMOVAL_SECONDS = 5  # for which the removal of a half-written checkpoint is tried


class CheckpointWriteError(UserError):
    """A checkpoint could not be written, usually for lack of disk space; earlier ones are untouched."""


class Checkpoints:
    """The checkpoints of one workdir: the newest `keep` and the best.

    Args:
      workdir: the run's folder.
      keep: the number of newest checkpoints to keep, at least 1.
      read_only: nothing is created, changed or deleted, for use while a training is running; always so for all
        processes of a job except the first.

    Raises:
      UserError: the workdir cannot be written.
    """

    def __init__(self, workdir: str | Path, keep: int = 2, read_only: bool = False):
        self.workdir = Path(workdir)
        self.keep = max(keep, 1)
        self._folder = self.workdir.absolute() / "checkpoints"
        self._digests = self.workdir / "digests"
        self._deleted = self.workdir / ".deleted"  # checkpoints being deleted; a kill may leave parts of them
        self._unwritten_best: dict | None = None  # best mark not yet written (disk full)
        self._said = self._said_damaged = False  # whether that, and an unreadable mark, were reported
        absl_logging.set_verbosity(absl_logging.ERROR)  # orbax logs every array at INFO
        self._manager = None
        if read_only or jax.process_index() > 0:
            return
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._digests.mkdir(parents=True, exist_ok=True)
            self._manager = _manager(self._folder, cleanup_tmp_directories=True)
            shutil.rmtree(self._deleted, ignore_errors=True)
            for folder in (self.workdir, self._digests):
                remove_leftovers(folder)
        except OSError as e:
            raise UserError(f"{self.workdir}: cannot be written ({reason(e)}); give another --workdir") from e

    @property
    def _writing(self) -> ocp.CheckpointManager:
        assert self._manager is not None, "opened read-only"
        return self._manager

    def steps(self) -> list[int]:
        """Steps of the committed checkpoints, oldest first (their digests are not checked here)."""
        return sorted(int(p.stem) for p in self._digests.glob("*.json") if p.stem.isdigit())

    def present(self) -> list[int]:
        """Steps of all checkpoints with a folder or a digest, oldest first."""
        folders = self._folder.iterdir() if self._folder.is_dir() else ()
        return sorted({*self.steps(), *(int(p.name) for p in folders if p.name.isdigit())})

    def save(self, step: int, tree: dict[str, np.ndarray], meta: dict) -> None:
        """Writes and commits a checkpoint, then deletes those no longer kept; called by process 0.

        Args:
          step: the number of steps done.
          tree: flat name -> array; see `flatten_state`.
          meta: JSON values stored beside it.

        Raises:
          CheckpointWriteError: it could not be written (disk full, no permission); nothing of it remains.
        """
        try:
            if (self._folder / str(step)).exists():  # left by a kill, uncommitted
                self._delete(step)
            for path in self._folder.glob(_PARTIAL):
                shutil.rmtree(path, ignore_errors=True)
            args = ocp.args.Composite(state=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(meta))
            self._writing.save(step, args=args, force=True)
            self._writing.wait_until_finished()
            self._commit(step)
        except Exception as e:  # tensorstore reports a full disk with exceptions of its own
            self._remove_partial(step)
            raise CheckpointWriteError(
                f"{self._folder / str(step)}: could not be written ({reason(e)}); free disk space and run the same "
                "command again, which continues from the previous checkpoint"
            ) from e
        self._write_best()
        kept = {*self.steps()[-self.keep :], self.best_step()}
        for old in set(self.steps()) - kept:
            try:
                self._delete(old)
            except OSError as e:  # the new one is complete; the next start removes what is left of the old one
                say_on_stderr(f"warning: {self._folder / str(old)}: could not be deleted ({reason(e)})")

    def restore(self, step: int) -> tuple[dict[str, np.ndarray], dict]:
        """Reads one checkpoint as (flat name -> array, meta).

        Raises:
          UserError: it is missing, or one of its files has changed.
        """
        problem = self.problem(step)
        if problem:
            raise UserError(f"{self._folder / str(step)}: {problem}; move it away to use the previous one")
        return self.read(step)

    def newest_whole(self, say=say_on_stderr) -> int | None:
        """The step of the newest usable checkpoint; unusable ones are reported. Changes nothing.

        A checkpoint without a digest is used if it can be read completely, which is reported too; while a training is
        running it may be one that is just being written, so a reader uses it only if no other is complete.
        """
        steps = self.present()
        if not self._manager:
            committed = self.steps()
            steps = [s for s in steps if s not in committed] + committed
        for step in reversed(steps):
            problem = self.problem(step)
            if not problem:
                return step
            if problem == _NO_DIGEST and self._reads_whole(step):
                say(f"warning: {self.workdir}: checkpoint {step} has no digests; it can be read completely and is used")
                return step
            say(f"{self.workdir}: checkpoint {step} is damaged ({problem}) and is not used; trying the previous one")
        return None

    def go_on_from(self, done: int, say=say_on_stderr) -> None:
        """Makes the folder match the step from which a run continues: later ones, all damaged, move to `aside/`.

        The remains of an interrupted deletion are removed, and a checkpoint without digests gets them.

        Raises:
          OSError: the disk is full, or another disk error.
        """
        committed = self.steps()
        for step in self.present():
            if step > done:
                say(f"{self.workdir}: the remains of checkpoint {step} were moved to {self._move_aside(step)}")
            elif step not in committed:
                if step == done:
                    self._commit(step)
                else:
                    self._delete(step)
        self._writing.reload()

    def _move_aside(self, step: int) -> Path:
        aside, number = self.workdir / "aside" / f"checkpoint_{step}", 1
        while aside.exists():
            number += 1
            aside = aside.with_name(f"checkpoint_{step}_{number}")
        aside.mkdir(parents=True)
        for path in (self._folder / str(step), self._digests / f"{step}.json"):
            if path.exists():
                os.rename(path, aside / path.name)
        return aside

    def _reads_whole(self, step: int) -> bool:
        try:
            self.read(step)
        except Exception:  # whatever orbax raises for a partial checkpoint
            return False
        return True

    def _commit(self, step: int) -> None:
        write_json(self._digests / f"{step}.json", {"files": _digest_files(self._folder / str(step))})

    def problem(self, step: int) -> str:
        """The problem of a checkpoint, or "" if each of its files has the digest written with it."""
        folder = self._folder / str(step)
        digests = self._digests / f"{step}.json"
        if not folder.is_dir():
            return "its folder is missing" if digests.exists() else "it does not exist"
        try:
            expected = dict(read_json(digests)["files"])
        except FileNotFoundError:
            return _NO_DIGEST
        except (ValueError, KeyError, TypeError):
            return "its digests are unreadable"
        try:
            found = _digest_files(folder)
        except OSError as e:
            return f"its files cannot be read, {reason(e)}"
        for name, digest in expected.items():
            if name not in found:
                return f"its file {name} is missing"
            if found[name] != digest:
                return f"its file {name} has changed since it was written"
        return ""

    def mark_best(self, step: int, mean_iou: float) -> bool:
        """Records a checkpoint's mean IoU on the selection split; returns whether it is the best so far.

        A mark that cannot be written is kept in memory, counts, and is written with the next checkpoint.
        """
        best = self.best()
        if best and best["mean_iou"] >= mean_iou and best["step"] != step and best["step"] in self.steps():
            return False
        if self._manager:
            self._unwritten_best = {"step": step, "mean_iou": mean_iou}
            self._write_best()
        return True

    def best_step(self) -> int | None:
        """The step with the best mean IoU on the selection split, if one was marked and still exists."""
        best = self.best()
        return best["step"] if best and best["step"] in self.steps() else None

    def best(self) -> dict | None:
        """The mark as it was written, {"step", "mean_iou"}, whether or not its checkpoint still exists."""
        if self._unwritten_best:
            return self._unwritten_best
        try:
            best = schema.best_mark(read_json(self.workdir / "best.json"))
        except FileNotFoundError:
            return None
        except ValueError as e:
            if not self._said_damaged:
                say_on_stderr(f"{self.workdir / 'best.json'}: {e}; it is not used")
            self._said_damaged = True
            return None
        return best

    def forget_after(self, step: int) -> None:
        """Drops a best mark from after `step`: the run went back before it."""
        best = self.best()
        if best and best["step"] > step and self._manager:
            self._unwritten_best = None
            (self.workdir / "best.json").unlink(missing_ok=True)

    def _write_best(self) -> None:
        if not self._unwritten_best:
            return
        path = self.workdir / "best.json"
        try:
            if path.is_dir():
                set_aside(path)
            write_json(path, self._unwritten_best)
        except OSError as e:
            if not self._said:
                say_on_stderr(f"warning: {path}: cannot be written ({reason(e)}); it is kept and written later")
            self._said = True
            return
        self._unwritten_best, self._said = None, False

    def read(self, step: int) -> tuple[dict[str, np.ndarray], dict]:
        """Like `restore`, for a checkpoint that `newest_whole` or `problem` has just checked."""
        manager = self._manager or _manager(self._folder, read_only=True)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(), meta=ocp.args.JsonRestore())
        restored = manager.restore(step, args=args)
        return dict(restored.state), dict(restored.meta)

    def meta(self, step: int) -> dict:
        """The values stored beside a committed checkpoint's arrays, without reading those.

        Raises:
          UserError: they cannot be read.
        """
        manager = self._manager or _manager(self._folder, read_only=True)
        try:
            return dict(manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)
        except Exception as e:  # damaged files raise what orbax and JSON raise
            raise UserError(f"{self._folder / str(step)}: cannot be read ({reason(e)})") from e

    def _delete(self, step: int) -> None:
        """Deletes one so that a kill at any moment leaves a complete one, or remains that the next writer removes."""
        (self._digests / f"{step}.json").unlink(missing_ok=True)  # uncommit it first
        folder = self._folder / str(step)
        if folder.exists():
            self._deleted.mkdir(exist_ok=True)
            os.rename(folder, self._deleted / f"{step}.{secrets.token_hex(3)}")
        shutil.rmtree(self._deleted, ignore_errors=True)
        self._writing.reload()

    def _remove_partial(self, step: int) -> None:
        """Removes a checkpoint that could not be written, and remains of earlier ones."""
        (self._digests / f"{step}.json").unlink(missing_ok=True)
        deadline = time.monotonic() + _REMOVAL_SECONDS
        # Again until nothing is left: tensorstore's threads put files into it for a while after its exception.
        while remains := [p for p in (self._folder / str(step), *self._folder.glob(_PARTIAL)) if p.exists()]:
            for path in remains:
                shutil.rmtree(path, ignore_errors=True)
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        self._writing.reload()


def load_workdir(workdir: str | Path, step: int | None = None) -> tuple[ConfigDict, dict, dict]:
    """Opens a training workdir; changes nothing in it, so that the training may be running.

    Args:
      workdir: a folder that `main` wrote.
      step: the checkpoint; None = the best if one was chosen, else the newest complete one. A best or newest one that
        is incomplete is skipped, which is reported on stderr.

    Returns:
      (config, variables, meta): the run's ConfigDict, whose `model` is the one that the checkpoint was trained with;
      its variables in Flax's form, as host arrays; and the values recorded with them: `step`, `class_names`,
      `palette`, `num_classes`, `data_fingerprint`.

    Raises:
      UserError: it is not a workdir, has no complete checkpoint, or that of `step` is not complete.
    """
    workdir = Path(workdir)
    checkpoints = Checkpoints(workdir, read_only=True)
    if not (workdir / "config.json").exists() and not checkpoints.present():
        raise UserError(
            f"{workdir}: is not a training workdir (it has no config.json); train one with deeplab_jax.main"
        )
    best = checkpoints.best()
    wanted = step if step is not None else best["step"] if best else None
    problem = "" if wanted is None else checkpoints.problem(wanted)
    if step is not None and problem:
        raise UserError(
            f"{workdir}: checkpoint {step} cannot be used ({problem}); the steps it has are "
            f"{', '.join(map(str, checkpoints.steps())) or 'none'}"
        )
    if problem:
        say_on_stderr(f"{workdir}: the best checkpoint, {wanted}, is not used ({problem}); looking for the newest")
    chosen = checkpoints.newest_whole() if wanted is None or problem else wanted
    if chosen is None:
        raise UserError(f"{workdir}: has no complete checkpoint yet; wait until its training has written one")
    try:
        flat, meta = checkpoints.read(chosen)  # its digests were just checked
    except Exception as e:
        if step is None and chosen not in checkpoints.present():  # a running training saved another and deleted it
            return load_workdir(workdir)
        raise UserError(f"{workdir}: checkpoint {chosen} cannot be read ({reason(e)}); run the command again") from e
    try:
        meta = schema.meta(meta)
    except ValueError as e:
        raise UserError(f"{workdir}: checkpoint {chosen} {e}; give the step of another") from e
    return config_of(workdir, chosen, meta), variables_from(flat), meta | {"step": chosen}


def _manager(folder: Path, *, read_only: bool = False, cleanup_tmp_directories: bool = False) -> ocp.CheckpointManager:
    """orbax's manager of an existing folder, for this process only: it does not wait for others."""
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


def _digest_files(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digests[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
