"""One whole run, tiny: two networks trained, three systems measured, nothing computed twice."""

import json
import math

import pytest

from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from deeplab_jax.models.summary import describe
from deeplab_jax.runs.checkpoints import load_workdir
from experiments import common, crf_iterations, field_of_view, runs


@pytest.mark.long
def test_experiment_on_shapes(tiny_config, tmp_path, monkeypatch, capsys):
    systems = crf_iterations.experiment(tiny_config, tmp_path)
    assert [s.name for s in systems] == ["piecewise 4, fixed (v2_resnet101)", "end to end 4, learned"]
    for s in systems:
        assert [r["crf_iterations"] for r in s.results] == [0, 1, 2]
        assert all(0 <= v <= 100 for v in (*s.curve(), *s.curve("3")))
        assert s.results[0]["images"] == 3
    variables = {name: load_workdir(tmp_path / name)[1]["params"] for name in ("piecewise", "end_to_end")}
    assert "crf" not in variables["piecewise"]
    assert float(variables["end_to_end"]["crf"]["bilateral_weight"]) != tiny_config.crf.bilateral_weight

    # Again: nothing is trained or evaluated twice.
    monkeypatch.setattr("deeplab_jax.evaluation.workdir.evaluate_split", None)
    assert crf_iterations.experiment(tiny_config, tmp_path) == systems
    tables = crf_iterations.tables(systems, 3, "shapes")
    common.write(tmp_path, "crf_iterations", tables, {}, crf_iterations.plot(systems, 3))
    assert (tmp_path / "crf_iterations.png").stat().st_size < 300_000
    assert "end to end 4" in capsys.readouterr().out

    # The piecewise run continues with the CRF.
    further = runs.continued(
        tiny_config, tmp_path / "piecewise", tmp_path / "further", steps=1, rate=0.001, end_to_end=True
    )
    assert "crf" in load_workdir(further)[1]["params"]
    assert json.loads((further / "config.json").read_text())["num_steps"] == 1
    with pytest.raises(UserError, match="was trained end to end"):
        crf_iterations.experiment(tiny_config, tmp_path, workdir=further)


def test_training_speed_is_measured(tiny_config):
    speed = field_of_view.images_per_second(common.changed(tiny_config, {"crf.train": "off"}), 7, steps=1)
    assert math.isfinite(speed) and speed > 0


def test_v1_networks_go_with_any_data():
    config = field_of_view.with_network(load_config("camvid"), "voc_vgg16_4x4", 1 / 64)
    assert (config.model.head, config.model.head_width, config.data.name) == ("fc", 64, "camvid")
    assert (config.data.crop, config.data.stages[0][1]) == ((242, 322), (162, 210))
    assert describe(config, 11)["layers"][0]["shape"][-1] == 1  # 64 channels in the published trunk
