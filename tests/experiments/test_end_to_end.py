"""The rows, their settings and steps, their table; and everything once on a tiny run."""

import numpy as np
import pytest

from deeplab_jax.config import load_config
from deeplab_jax.crf import CRFParams
from deeplab_jax.crf.setting import Setting, read_preset, write_preset
from deeplab_jax.errors import UserError
from deeplab_jax.models import architecture_of
from experiments import common, end_to_end, end_to_end_rows, runs


def test_each_row_changes_what_its_name_says():
    shapes = load_config("shapes")
    for row in ("a", "b", "c", *(f"{letter}_{v}" for letter in "bc" for v in end_to_end_rows.VARIATIONS)):
        config = common.changed(shapes, end_to_end_rows.overrides_of(row))
        assert (config.crf.train == "off") == (row == "a")
        assert config.loss.at == ("pixels" if row.endswith("_pixels") else "scores")
        assert config.model.freeze_network == row.startswith("b")
        architecture_of(config.model)
    assert common.changed(shapes, end_to_end_rows.overrides_of("c_stride1")).crf.stride == 1
    assert common.changed(shapes, end_to_end_rows.overrides_of("c_no_compatibility")).crf.learn == ("weights",)
    assert end_to_end_rows.overrides_of("a_pixels") == {"crf.train": "off", "loss.at": "pixels"}
    recipe = common.changed(shapes, end_to_end_rows.overrides_of("c_crfasrnn"))
    assert (recipe.batch_size, recipe.optimizer.momentum, recipe.loss.unary_weight) == (1, 0.99, 0.0)
    for row in ("d", "c_stride3", "a_stride2"):
        with pytest.raises(UserError, match=f"--rows: no row {row}; give a, b, c"):
            end_to_end_rows.overrides_of(row)


@pytest.fixture
def recorded(monkeypatch):
    """Nothing is trained or measured; each training's config is kept by the name of its folder."""
    trained = {}
    monkeypatch.setattr(
        runs, "trained", lambda config, run: trained.setdefault(f"{run.parent.name}/{run.name}", config) and run
    )
    monkeypatch.setattr(runs, "searched_preset", lambda config, run, images: f"{run}/crf_preset.json")
    monkeypatch.setattr(end_to_end, "softened", lambda preset, divisor, path: f"{path} {divisor:g}")
    monkeypatch.setattr(runs, "measure", lambda config, run, folder, preset: [f"{run.name} {bool(preset)}"])
    monkeypatch.setattr("deeplab_jax.runs.provenance.read_config", lambda run: load_config("shapes"))
    monkeypatch.setattr(end_to_end, "seconds_per_step", lambda config: {"off": 0.1}.get(config.crf.train, 0.4))
    return trained


def test_rows_take_equal_time_from_one_start(recorded, tmp_path):
    config = load_config("shapes", ["optimizer.learning_rate=0.5", "search.images=3"])
    found = end_to_end.experiment(config, tmp_path, rows=("b", "c", "c_sharp"), seeds=(0, 1), steps=40, softer=5)
    names = [f"seed_{s}/{n}" for s in (0, 1) for n in ("start", "a_40", "b_10", "c_10", "c_sharp_10")]
    assert list(recorded) == names
    assert recorded["seed_0/start"].crf.train == "off" and recorded["seed_1/start"].seed == 1
    row = recorded["seed_1/c_10"]
    assert (row.num_steps, row.optimizer.learning_rate, row.crf.train) == (10, 0.05, "end_to_end")
    assert row.init_from == str(tmp_path / "seed_1" / "start")
    assert row.crf.preset == f"{tmp_path / 'seed_1' / 'softer.json'} 5"
    assert recorded["seed_1/c_sharp_10"].crf.preset == f"{row.init_from}/crf_preset.json"
    kinds = [(e["row"], e["parameters"], e["steps"]) for e in found if e["seed"] == 1]
    assert kinds == [
        ("start", "start's", 0), ("a", "start's", 40), ("a", "searched", 40), ("b", "learned", 10),
        ("c", "learned", 10), ("c", "start's", 10), ("c", "searched", 10),
        ("c_sharp", "learned", 10), ("c_sharp", "start's", 10), ("c_sharp", "searched", 10),
    ]  # fmt: skip
    end_to_end.experiment(config, tmp_path, rows=("c",), seeds=(2,), steps=40, equal="steps")
    assert "seed_2/c_40" in recorded


def test_training_starts_from_smaller_weights(tmp_path):
    thin = Setting(CRFParams((6.0, 12.0), 30.0, 5.0, 3.0, 1.0), iterations=7, source="a search")
    write_preset(tmp_path / "searched.json", thin)
    softer = read_preset(end_to_end.softened(str(tmp_path / "searched.json"), 6.0, tmp_path / "seed_0" / "softer.json"))
    assert tuple(softer.params.bilateral_weight) == (1.0, 2.0) and softer.params.gaussian_weight == 0.5
    assert (softer.params.bilateral_xy_std, softer.iterations) == (30.0, 7)


def entry(row: str, seed: int, iou: float, near: float, parameters: str = "learned") -> dict:
    def at(n: int) -> dict:
        return {"crf_iterations": n, "mean_iou": iou + n / 100, "trimap": {"3": {"mean_iou": near + n / 100}}}

    return {"row": row, "seed": seed, "parameters": parameters, "steps": 7, "results": [at(n) for n in (0, 5, 10)]}


def test_rows_are_compared_with_row_a_of_their_seed():
    found = [entry("a", 0, 0.5, 0.3, "searched"), entry("c", 0, 0.52, 0.33)]
    found += [entry("a", 1, 0.6, 0.2, "searched"), entry("a", 1, 0.9, 0.9, "start's"), entry("c", 1, 0.66, 0.25)]
    found += [entry("c", 0, 0.53, 0.33, "start's"), entry("c", 0, 0.51, 0.34, "searched")]
    v = end_to_end.summary(found, 10)["c", "learned"]
    assert v["network"] == pytest.approx([52, 66]) and v["crf"] == pytest.approx([62, 76])
    assert v["gain"] == pytest.approx([2, 6]) and v["trimap_gain"] == pytest.approx([3, 5])
    five, ten = end_to_end.tables(found, "shapes", "val")
    assert ten.rows[0][:4] == ("a", "searched", 7, 2) and ten.rows[0][6] is None
    assert ten.rows[1][4:] == ("59.00 ± 9.90", "69.00 ± 9.90", "+4.00 ± 2.83", "39.00 ± 5.66", "+4.00 ± 1.41")
    assert five.title.startswith("shapes, split 'val', 5 mean-field iterations")
    left, right = end_to_end.plot(found).axes
    assert [list(line.get_ydata()) for line in left.get_lines()][:2] == [pytest.approx([1]), pytest.approx([4])]
    assert list(right.get_lines()[1].get_ydata()) == pytest.approx([51, 56, 61])


@pytest.mark.long
def test_experiment_on_shapes(tiny_config, tmp_path, monkeypatch):
    from deeplab_jax.runs.checkpoints import load_workdir

    grid = {"bilateral_weight": (1.0, 3.0), "bilateral_xy_std": (20.0,), "bilateral_rgb_std": (12.0,)}
    config = common.changed(tiny_config, {"data.holdout": 6, "search.images": 2, "search.passes": 1})
    config.search.grid.update(grid | {"gaussian_xy_std": (2.0,)})
    arguments = {"rows": ("b", "c"), "steps": 2, "equal": "steps"}
    found = end_to_end.experiment(config, tmp_path, **arguments)
    assert [(e["row"], e["parameters"]) for e in found] == [
        ("start", "start's"), ("a", "start's"), ("a", "searched"), ("b", "learned"), ("c", "learned"),
        ("c", "start's"), ("c", "searched"),
    ]  # fmt: skip
    start, b, c = (load_workdir(tmp_path / "seed_0" / name)[1] for name in ("start", "b_2", "c_2"))
    for part in ("backbone", "head"):
        for old, fixed, moved in zip(*(_leaves(v["params"][part]) for v in (start, b, c)), strict=True):
            np.testing.assert_array_equal(old, fixed)
            assert np.any(old != moved) or not np.any(old)
    for old, fixed in zip(_leaves(start["batch_stats"]), _leaves(b["batch_stats"]), strict=True):
        np.testing.assert_array_equal(old, fixed)
    for v in (b, c):
        assert v["params"]["crf"]["bilateral_weight"].shape == (7,)
        assert np.any(v["params"]["crf"]["compatibility"] != 1 - np.eye(7))
    # Again: nothing is trained, measured or evaluated twice.
    measured = {path: path.read_bytes() for path in tmp_path.rglob("crf_search/results.jsonl")}
    assert len(measured) == 3
    monkeypatch.setattr("deeplab_jax.evaluation.workdir.evaluate_split", None)
    monkeypatch.setattr("deeplab_jax.search.workdir.create_segmenter", None)
    assert end_to_end.experiment(config, tmp_path, **arguments) == found
    assert {path: path.read_bytes() for path in measured} == measured


def _leaves(tree):
    import jax

    return jax.tree.leaves(tree)
