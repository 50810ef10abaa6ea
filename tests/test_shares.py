"""Commands whose files several processes with several devices share: the same bytes as of one process with one."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import deeplab_jax
from deeplab_jax.crf import CRFParams, Setting
from deeplab_jax.inference.photographs import PredictOptions, predict
from deeplab_jax.refinement.files import RefineOptions, refine_folder
from deeplab_jax.runs.job import Job
from tests.command_line import call
from tests.toy_workdir import photograph

# Each argument that has a space begins a command: one process runs several, one after the other.
_COMMANDS = """
import shlex, sys
from tests.command_line import call
for line in sys.argv[1:]:
    done = call(*shlex.split(line))
    print(done.stdout, end="", flush=True)
    print(done.stderr, end="", file=sys.stderr, flush=True)
    print("status", done.returncode, flush=True)
"""


SIZES = ((20, 30), (36, 30), (68, 30), (20, 60))  # alone each would keep its shape; together they are padded to one
SETTING = Setting(CRFParams(4.0, 8.0, 12.0, 2.0, 1.5), 2, bilateral="permutohedral")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Photographs of several sizes, and one file that is not a photograph."""
    (tmp_path / "in/trip").mkdir(parents=True)
    for n in range(6):
        Image.fromarray(photograph(SIZES[n % 4], n)).save(tmp_path / f"in/{'trip/' * (n % 2)}{n}.png")
    (tmp_path / "in/6.png").write_bytes(b"not a photograph")
    return tmp_path


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def start(*lines: str, processes: int = 2, devices: int = 2, env: dict | None = None) -> list[subprocess.Popen]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"} | (env or {})
    env["DEEPLAB_XLA_DEFAULTS"] = "off"  # as in this process, whose JAX has begun
    flags = f"--num_processes={processes} --process_id="
    return [
        subprocess.Popen(
            [sys.executable, "-c", _COMMANDS, *(f"{line} {flags}{k}" for line in lines)],
            env=os.environ | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(processes)
    ]


@pytest.mark.long
def test_several_devices_give_the_bytes_of_one(workdir, folder, capsys):
    devices = jax.local_devices()[:1] * 2
    for out, options in {"one": {}, "two": {"devices": devices}}.items():
        segment = deeplab_jax.load(workdir, **options)
        lines = []
        found = predict(segment, [folder / "in"], PredictOptions(folder / out, probabilities=True), lines.append)
        assert found == 1
        stems = [Path(line.split("] ")[1].removesuffix(": failed")).stem for line in lines]
        assert stems == ["0", "2", "4", "6", "1", "3", "5"]
    assert segment.workers == 2
    assert contents(folder / "one") == contents(folder / "two")
    capsys.readouterr()
    for out, options in {"r1": {}, "r2": {"devices": devices}}.items():
        given = RefineOptions(SETTING, "probs")
        assert refine_folder(folder / "in", folder / "one", folder / out, given, **options) == 1
    assert contents(folder / "r1") == contents(folder / "r2")
    said = [line.replace("/r2/", "/r1/").split("  (")[0] for line in capsys.readouterr().out.splitlines()]
    assert said[:7] == said[7:] and said[0] == f"[1/7] {folder}/r1/0.png"


def test_shares_are_named_and_padded_as_the_whole(workdir, folder, capsys, monkeypatch):
    """The processes of a job one after the other: the first comes last, and hears of the others by their files."""
    segment = deeplab_jax.load(workdir)
    predict(segment, [folder / "in"], PredictOptions(folder / "one"), str)
    monkeypatch.setattr(Job, "conclude", lambda self, report, sum_up: report["failed"])
    for k in (2, 1, 0):
        found = predict(segment, [folder / "in"], PredictOptions(folder / "three"), str, Job(k, 3))
        assert found == (k == 0)  # 0.png, 6.png, trip/3.png, ...: the fourth file is not a photograph
    assert contents(folder / "three") == contents(folder / "one")


def test_refine_does_what_is_missing_and_what_has_changed(folder, capsys):
    (folder / "p/trip").mkdir(parents=True)
    for n in range(6):
        name, size = f"{'trip/' * (n % 2)}{n}", (12 + 2 * (n % 2), 20)
        Image.fromarray(photograph(size, n)).save(folder / f"in/{name}.png")
        np.save(folder / f"p/{name}.npy", np.random.default_rng(n).dirichlet(np.ones(3), size).astype(np.float16))

    setting = replace(SETTING, bilateral="separable")

    def run(**changed) -> list[str]:
        options = RefineOptions(setting, "probs")._replace(**changed)
        assert refine_folder(folder / "in", folder / "p", folder / "out", options) == 1  # 6.png
        lines = capsys.readouterr().out.splitlines()
        return [Path(line.split("  (")[0]).stem for line in lines if line.startswith("[") and "failed" not in line]

    everything = ["0", "2", "4", "1", "3", "5"]
    assert run() == everything
    assert run() == []
    (folder / "out/2_overlay.png").unlink()
    np.save(folder / "p/trip/3.npy", np.load(folder / "p/trip/3.npy")[::-1])
    os.utime(folder / "p/trip/3.npy", (1, 1))
    assert run() == ["2", "3"]
    assert run(overwrite=True) == everything
    assert run(crf=replace(setting, normalization="before")) == everything
    assert run(iterations_strip=True, crf=replace(setting, iterations=0)) == everything


@pytest.mark.long
def test_two_processes_of_two_devices_give_the_bytes_of_one(workdir, folder):
    inputs = f"--workdir={workdir} --probabilities"
    setting = "--iterations=2 --bilateral_xy_std=8 --bilateral_rgb_std=12 --bilateral=permutohedral"
    refined = f"refine --image={folder}/in --probs={folder}/one {setting}"
    # Not in this process, which compiles some programs with optimizations that the pair's have not.
    (alone,) = start(f"predict {inputs} --out={folder}/one {folder}/in", f"{refined} --out={folder}/r1",
                     processes=1, devices=1)  # fmt: skip
    assert alone.communicate(timeout=400)[0].count("status 1") == 2
    pair = start(f"predict {inputs} --out={folder}/two {folder}/in", f"{refined} --out={folder}/r2")
    (first, first_err), (second, second_err) = (process.communicate(timeout=400) for process in pair)
    assert contents(folder / "one") == contents(folder / "two"), first_err + second_err
    assert contents(folder / "r1") == contents(folder / "r2")
    assert first.count("status 1") == second.count("status 1") == 2  # one bad file: all processes end with it
    assert "6 of 7 files are done, by 2 processes" in first and "are done, by" not in second
    assert first_err.count("error: 1 of 7 files failed or are missing") == 1
    assert "of 7" not in second_err
    done = [line.split("  (")[0].split("] ")[-1] for line in (first + second).splitlines() if line.startswith("[")]
    results = [
        f"{folder}/{out}/{name}.png" for out in ("two", "r2") for name in ("0", "2", "4", "trip/1", "trip/3", "trip/5")
    ]
    assert sorted(done) == sorted([*results, *[f"{folder}/in/6.png: failed"] * 2])  # each file once, by each command


_MANY = 60


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_does_not_stop_the_others_and_a_rerun_does_the_rest(workdir, tmp_path, victim):
    (tmp_path / "in").mkdir()
    for n in range(_MANY):
        Image.fromarray(photograph((120, 160), n)).save(tmp_path / f"in/{n:02}.png")
    line = f"predict --workdir={workdir} --out={tmp_path}/out {tmp_path}/in"
    pair = start(line, env={"DEEPLAB_HEARTBEAT_SECONDS": "10"})
    mine = [f"{n:02}" for n in range(victim, _MANY, 2)]
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and not any((tmp_path / f"out/{n}.png").is_file() for n in mine):
        time.sleep(0.05)
    pair[victim].send_signal(signal.SIGKILL)
    pair[victim].communicate()
    missing = [n for n in mine if not (tmp_path / f"out/{n}.png").is_file()]
    assert missing, "the process was killed in the middle of its share"
    out, err = pair[1 - victim].communicate(timeout=300)
    assert "status 1" in out
    assert all((tmp_path / f"out/{n:02}.png").is_file() for n in range(1 - victim, _MANY, 2))
    name = f"process {victim} (number {pair[victim].pid} on "
    assert f"{name}" in err and "is gone; " in err
    if victim == 1:
        assert f"{len(missing)} of its {_MANY // 2} files are missing, the first {tmp_path}/in/{missing[0]}.png" in err
    again = start(line)
    for process in again:
        out, err = process.communicate(timeout=300)
        assert "status 0" in out, err
    assert not (tmp_path / "out/.processes").exists()
    assert call("predict", f"--workdir={workdir}", f"--out={tmp_path}/one", tmp_path / "in").returncode == 0
    whole = {name: data for name, data in contents(tmp_path / "out").items() if not name.startswith(".")}
    assert whole == contents(tmp_path / "one")
