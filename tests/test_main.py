"""The command as a user sees it: one sentence for a mistake, status 1, nothing left behind."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from deeplab_jax.training import setup
from tests.command_line import call


def main(*arguments):
    return call("main", *arguments)


def error_of(done):
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    return errors[0]


def camvid_like(folder, *, ids=(0, 1, 11), label_size=(60, 80)):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        names = [f"{split}{i}" for i in range(3)]
        (folder / split).mkdir(parents=True)
        (folder / f"{split}annot").mkdir()
        for name in names:
            Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8)).save(folder / split / f"{name}.jpg")
            label = rng.choice(ids, label_size).astype(np.uint8)
            Image.fromarray(label).save(folder / f"{split}annot" / f"{name}.png")
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
    return folder


LATTICE = "--config.crf.bilateral=permutohedral"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--config=nowhere.py"], "no such file or shipped config"),
        (["--config=shapes", "--config.crf.iteration=3"], "did you mean 'crf.iterations'"),
        (["--config=shapes", "--confg=x"], "Unknown command line flag 'confg'"),
        (["--config=shapes", "--mode=trian"], "--mode=trian"),
        (["--config=camvid", "--config.data.dir=/nowhere/camvid"], "/nowhere/camvid"),
        (["--config=shapes", "--workdir=/proc/none", "--config.batch_size=8"], "/proc/none"),
        (["--config=shapes", "--config.crf.bilateral=fast"], "config.crf.bilateral=fast: must be one of auto, "),
        (
            ["--config=shapes", "--config.optimizer.schedule=foo"],
            "config.optimizer.schedule=foo: must be one of poly, ",
        ),
        (["--config=shapes", "--config.seed=-1"], "config.seed=-1: must lie between 0 and "),
        (
            ["--config=shapes", "--config.crf.train=end_to_end", "--config.crf.learn=stds,", LATTICE],
            'config.crf: learn has "stds", for which bilateral="permutohedral" has no gradient; use "exact"',
        ),
        (
            ["--config=voc_aspp_l"],
            "config.model.batch_norm=frozen needs stored statistics",
        ),  # and nothing is downloaded
    ],
)
def test_one_sentence_and_status_1(arguments, sentence, tmp_path):
    done = main(f"--workdir={tmp_path}/run", f"--config.data.cache_dir={tmp_path}", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sentence in error_of(done)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: (d / "train.txt").write_text(""), "train.txt"),
        (lambda d: (d / "trainannot" / "train0.png").unlink(), "train0"),
        (lambda d: (d / "train" / "train1.jpg").write_bytes(b"not an image"), "train1"),
    ],
)
def test_bad_data_is_named(tmp_path, change, sentence):
    folder = camvid_like(tmp_path / "camvid")
    change(folder)
    run = [
        "--config.num_steps=2",
        "--config.data.holdout=0",
        "--config.eval.select_split=",
        "--config.search.images=0",
    ]
    done = main("--config=camvid", f"--config.data.dir={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}",
                "--workdir", tmp_path / "run", *run)  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert sentence in error_of(done)
    assert not (tmp_path / "run").exists()  # reported before anything is written


@pytest.mark.parametrize("kwargs", [{"ids": (0, 1, 77)}, {"label_size": (60, 81)}])
def test_bad_labels_are_named(tmp_path, kwargs):
    folder = camvid_like(tmp_path / "camvid", **kwargs)
    done = main("--config=camvid", f"--config.data.dir={folder}", f"--config.data.cache_dir={tmp_path / 'cache'}",
                "--workdir", tmp_path / "run", "--config.data.holdout=0", "--config.num_steps=2")  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "train" in error_of(done)
    assert "77" in error_of(done) or "81" in error_of(done)


def test_frozen_statistics_need_a_start():
    with pytest.raises(UserError, match=r"--config\.init_from=WEIGHTS"):
        setup.check(load_config("voc_aspp_l"))
    setup.check(load_config("voc_aspp_l", ["model.allow_random_frozen=true"]))


def test_batch_must_divide():
    with pytest.raises(
        UserError, match=r"config\.batch_size=10: must be divisible by .*accumulate=4; the next suitable size: 12"
    ):
        setup.check(load_config("shapes", ["batch_size=10", "optimizer.accumulate=4"]))


def test_version_of_a_real_process():
    command = [sys.executable, "-m", "deeplab_jax.main", "--version"]
    env = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout.split()[0]) == (0, "deeplab_jax")
