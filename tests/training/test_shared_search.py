"""The CRF's parameters of a run, searched by several processes: byte for byte the result of one process."""

import os
import shutil
import socket
import subprocess
import sys

import pytest

RUN = ("crf.train=off", "num_steps=2", "checkpoint.every=0", "eval.every=0", "data.holdout=5", "search.images=5",
       "eval.crf_iterations=0,2")  # fmt: skip
GRID = ("bilateral_weight=3,5", "bilateral_xy_std=10,20", "bilateral_rgb_std=5,")
FOUND = ("crf_preset.json", "crf_search/table.txt", "crf_search/table.csv", "crf_search/groups.txt", "eval/val.json")


def same(one, two, names):
    for name in names:
        first, second = ((w / name).read_bytes() if (w / name).is_file() else None for w in (one, two))
        assert first == second, name
    assert not (two / "crf_search/.processes").exists()


def end(processes):
    outputs = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


@pytest.mark.long
def test_main_and_crf_search_share_the_images(runs, tmp_path):
    settings = [*RUN, *(f"search.grid.{values}" for values in GRID), "eval.limit=4"]
    one, two = tmp_path / "one", tmp_path / "two"
    runs.run(one, *settings, flags=["--mode=train"])
    shutil.copytree(one, two)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    runs.run(one, *settings, flags=["--mode=eval"])
    devices = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"}
    pair = [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--mode=eval"]
    end([runs.start(two, *settings, flags=[*pair, f"--process_id={k}"], env=devices) for k in (0, 1)])
    same(one, two, FOUND)

    shutil.rmtree(two / "crf_search")
    config = [f"--config.{o}" for o in (*runs.overrides, *settings)]
    search = [sys.executable, "-m", "deeplab_jax.crf_search", "--config=shapes", *config, "--images=5"]
    search += [f"--{values.rstrip(',')}" for values in GRID]
    shutil.rmtree(one / "crf_search")
    end([subprocess.Popen([*search, f"--workdir={one}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)])
    (first, _), (second, _) = end([
        subprocess.Popen([*search, f"--workdir={two}", "--num_processes=2", f"--process_id={k}"], text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | devices)
        for k in (0, 1)
    ])  # fmt: skip
    same(one, two, FOUND[:-1])
    assert "best: " in first and "best: " not in second
