"""One drive left out: which photographs, which schedule, and the table."""

import pytest

from deeplab_jax import data
from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from experiments import camvid_drives, common
from tests.data.miniatures import make_camvid


@pytest.fixture
def config(tmp_path):
    folder = make_camvid(tmp_path / "camvid")  # training photographs of the drives A and B
    return load_config("camvid", [f"data.dir={folder}", f"data.cache_dir={tmp_path / 'cache'}", "data.holdout=1"])


def test_the_drive_left_out_is_what_is_measured(config, tmp_path, monkeypatch):
    seen = []

    def run(own, workdir):
        names = {split: data.open_dataset(own.data, split).names() for split in ("train", "holdout", own.eval.split)}
        seen.append((workdir.name, own.seed, names))
        return [entry(0, 0.4, 0.2), entry(10, 0.5, 0.3)]

    monkeypatch.setattr(common, "run", run)
    found = camvid_drives.experiment(
        config, tmp_path / "out", "shipped", drives=("A", "B"), left_out=("A", "B"), seeds=(5,)
    )
    assert [(name, seed) for name, seed, _ in seen] == [("A_5", 5), ("B_5", 5)]
    for (_, _, names), drive in zip(seen, "AB"):
        assert {n[0] for n in names["val"]} == {drive} and len(names["val"]) == 3
        assert {n[0] for n in names["train"] + names["holdout"]} == {"AB".replace(drive, "")}
        assert (len(names["train"]), len(names["holdout"])) == (2, 1)
    assert [(e["drive"], e["seed"]) for e in found] == [("A", 5), ("B", 5)]
    with pytest.raises(UserError, match=r"train\.txt: names no photograph of drive C; check --drives"):
        camvid_drives.experiment(config, tmp_path / "out", "shipped", drives=("C", "A"), left_out=("C",), seeds=(5,))
    moved = (tmp_path / "camvid").rename(tmp_path / "moved")
    config.data.dir = str(moved)
    camvid_drives.experiment(config, tmp_path / "out", "shipped", drives=("A", "B"), left_out=("A",), seeds=(5,))
    assert seen[-1][2]["val"] == seen[0][2]["val"]
    assert (tmp_path / "out/drives/A/train").resolve() == moved / "train"
    config.data.dir = ""
    with pytest.raises(UserError, match="is not set to SegNet's CamVid folder"):
        camvid_drives.experiment(config, tmp_path / "out", "shipped", drives=("A",), left_out=("A",), seeds=(5,))


def test_a_screened_idea_gets_a_third_of_the_schedule():
    config = camvid_drives.screened(load_config("camvid"), 3)
    assert (config.num_steps, config.eval.every, config.checkpoint.every) == (2800, 700, 233)
    assert config.num_steps % config.eval.every == 0 and config.optimizer.warmup_steps == 16


def entry(iterations: int, iou: float, near: float) -> dict:
    return {"crf_iterations": iterations, "mean_iou": iou, "trimap": {"3": {"mean_iou": near}}}


def test_the_mean_is_over_drives():
    found = [
        {"drive": drive, "seed": seed, "results": [entry(0, iou, 0), entry(10, iou + 0.02, iou / 2)]}
        for drive, seed, iou in (("A", 0, 0.3), ("A", 1, 0.5), ("B", 0, 0.6), ("B", 1, 0.6))
    ]
    found = camvid_drives.figures(found)
    assert found["A"] == pytest.approx({"network": 40, "crf": 42, "trimap": 20})
    assert found["mean"] == pytest.approx({"network": 50, "crf": 52, "trimap": 25})


def test_without_a_crf_the_network_is_measured():
    found = [
        {"drive": drive, "seed": 0, "results": [entry(0, iou, iou / 2)]} for drive, iou in (("A", 0.3), ("B", 0.5))
    ]
    assert camvid_drives.figures(found)["mean"] == {"network": 40.0, "crf": None, "trimap": 20.0}
    table = camvid_drives.table({"plain": {"found": found, "steps": 12, "changes": ""}})
    assert table.rows[-1] == ("plain", "mean", 12, 1, 40.0, None, None, 20.0)
    assert "plain" in table.text() and "None" not in table.markdown()


def test_all_ideas_are_in_the_table():
    results = [entry(0, 0.4, 0.2), entry(10, 0.5, 0.3)]
    idea = {"found": [{"drive": "A", "seed": 0, "results": results}], "steps": 12, "changes": ""}
    table = camvid_drives.table({"decay": idea | {"changes": "--config.x=1"}, "shipped": idea})
    assert [row[:4] for row in table.rows] == [
        ("decay", "A", 12, 1), ("decay", "mean", 12, 1), ("shipped", "A", 12, 1), ("shipped", "mean", 12, 1),
    ]  # fmt: skip
    assert table.rows[0][4:] == pytest.approx((40.0, 50.0, 10.0, 30.0)) and table.notes == ["decay: --config.x=1"]
