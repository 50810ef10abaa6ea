"""A run's description is written completely or not at all, and earlier descriptions are kept."""

import json
import subprocess

import pytest

from deeplab_jax import files
from deeplab_jax.errors import UserError
from deeplab_jax.runs import provenance
from deeplab_jax.runs.checkpoints import Checkpoints, load_workdir
from deeplab_jax.runs.provenance import begin_again, config_of, read_config, record_start
from tests.toy_workdir import toy_config, write_toy_workdir


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def changed(**fields):
    config = toy_config()
    config.update(fields)
    return config


def test_another_config_joins_the_history_with_its_step(tmp_path, capfd):
    record_start(tmp_path, changed(batch_size=2), 0, train_images=9)
    assert not (tmp_path / "config_history.json").exists()
    record_start(tmp_path, changed(batch_size=2), 3)
    record_start(tmp_path, changed(batch_size=4), 5)
    record_start(tmp_path, changed(batch_size=8), 8)
    assert read_config(tmp_path).batch_size == 8
    history = json.loads((tmp_path / "config_history.json").read_text())
    assert [(e["until_step"], e["config"]["batch_size"]) for e in history] == [(5, 2), (8, 4)]
    runs = json.loads((tmp_path / "run.json").read_text())
    assert [r["step"] for r in runs] == [0, 3, 5, 8]
    assert runs[0]["train_images"] == 9
    assert capfd.readouterr().err.count("the config differs from the run's previous one in: batch_size") == 2


def test_a_full_disk_leaves_all_files_as_they_were(tmp_path, monkeypatch):
    record_start(tmp_path, changed(batch_size=2), 0)
    before = contents(tmp_path)
    write = files.Path.write_text

    def full(self, text, **options):
        write(self, text[: len(text) // 2], **options)
        if "run" not in self.name:  # the second of them
            raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(files.Path, "write_text", full)
    with pytest.raises(UserError, match=r"cannot be written \(no space left on device\); free disk space"):
        record_start(tmp_path, changed(batch_size=4), 5)
    monkeypatch.undo()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("content", ["", "null", "{}", "[1]", "{", "\ufeff[", "[" * 100_000, None])
@pytest.mark.parametrize("name", ["run.json", "config.json"])
def test_a_damaged_file_stays_beside_the_new_one(tmp_path, capfd, name, content):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_text(content)
    record_start(tmp_path, toy_config(), 0)
    assert read_config(tmp_path).to_dict() == toy_config().to_dict()
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1
    kept = tmp_path / f"{name}.damaged"
    assert kept.is_dir() if content is None else kept.read_text() == content
    assert f"it is kept as {name}.damaged, and the run continues without it" in capfd.readouterr().err


def test_a_checkpoint_has_the_network_that_it_was_trained_with(tmp_path):
    workdir = write_toy_workdir(tmp_path / "w", step=7)
    other = toy_config()
    other.model.head_rates = (2, 4)
    other.crf.iterations = 9
    record_start(workdir, other, 7)
    config, _, meta = load_workdir(workdir)
    assert (meta["step"], config.model.head_rates, config.crf.iterations) == (7, toy_config().model.head_rates, 9)


def test_a_checkpoint_whose_config_cannot_be_used_is_named(tmp_path):
    """Such as one of a removed field, which nothing represents now."""
    old = toy_config().to_dict()
    old["model"]["width_multiplier"] = 0.5
    for config in ({"model": {}}, old):
        with pytest.raises(UserError, match=rf"^{tmp_path}: checkpoint 2: its config cannot be used: "):
            config_of(tmp_path, 2, {"config": config})


def test_a_damaged_config_is_replaced_by_the_checkpoints_own(tmp_path, capfd):
    workdir = write_toy_workdir(tmp_path / "w", step=7)
    (workdir / "config.json").write_text("[]")
    with pytest.raises(UserError, match=r"config\.json: holds no config; put it back"):
        load_workdir(workdir)
    flat, meta = Checkpoints(workdir).restore(7)
    Checkpoints(workdir).save(8, flat, meta | {"config": toy_config().to_dict()})
    config, _, _ = load_workdir(workdir)
    assert config.to_dict() == toy_config().to_dict()
    assert "holds no config" in capfd.readouterr().err


def test_to_begin_again_moves_everything_and_deletes_nothing(tmp_path, capfd):
    workdir = write_toy_workdir(tmp_path / "w", step=7)
    (workdir / "metrics.jsonl").write_text("{}")
    before = contents(workdir)
    begin_again(workdir)
    assert contents(workdir / "aside" / "run_1") == before
    assert Checkpoints(workdir, read_only=True).present() == []
    assert "were moved to" in capfd.readouterr().err
    begin_again(workdir)  # nothing is left to move
    assert [p.name for p in (workdir / "aside").iterdir()] == ["run_1"]


def test_the_commit_of_a_project_that_the_package_is_installed_in_is_not_its_own(tmp_path, monkeypatch):
    installed = tmp_path / "project" / ".venv" / "deeplab_jax" / "runs"
    installed.mkdir(parents=True)
    (installed / "provenance.py").touch()
    (tmp_path / "project" / ".gitignore").write_text(".venv\n")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path / "project", check=True)
    monkeypatch.setattr(provenance, "__file__", str(installed / "provenance.py"))
    assert provenance.commit() == ""
    subprocess.run(["git", "add", "-f", ".venv/deeplab_jax"], cwd=tmp_path / "project", check=True)
    assert len(provenance.commit()) == 41  # with changes
