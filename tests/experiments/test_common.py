import json

import pytest

from deeplab_jax.config import load_config
from deeplab_jax.errors import UserError
from deeplab_jax.runs.checkpoints import Checkpoints
from experiments import common
from experiments.common import Table, Variant
from tests.toy_workdir import toy_config, write_toy_workdir

TABLE = Table("Title", ("system", "paper", "ours"), [("LargeFOV", 67.64, None), ("7x7", None, 134346581)], ("A note.",))


def test_text_is_aligned_and_leaves_unknown_cells_empty():
    assert TABLE.text().splitlines() == [
        "Title",
        "",
        "system    paper         ours",
        "----------------------------",
        "LargeFOV  67.64",
        "7x7              134,346,581",
        "A note.",
    ]


def test_markdown():
    assert TABLE.markdown() == (
        "**Title**\n\n| system | paper | ours |\n| --- | ---: | ---: |\n| LargeFOV | 67.64 |  |\n"
        "| 7x7 |  | 134,346,581 |\n\nA note.\n"
    )


def test_write_leaves_table_data_and_plot(tmp_path, capsys):
    figure = common.new_figure(2, 2)
    figure.add_subplot().plot([0, 1], [0, 1])
    common.write(tmp_path / "out", "name", [TABLE], {"value": 1}, figure)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["name.json", "name.md", "name.png"]
    assert json.loads((tmp_path / "out" / "name.json").read_text())["value"] == 1
    assert "LargeFOV  67.64" in capsys.readouterr().out


@pytest.mark.parametrize("rows", (["5"], ["0"], ["x"]))
def test_a_row_that_is_not_there_is_refused(rows):
    with pytest.raises(UserError, match="from 1 to 4"):
        common.chosen_rows(rows, 4)


def test_changed_copies_and_refuses_unknown_fields():
    config = load_config("shapes")
    other = common.changed(config, {"model.head_rates": (1, 2), "crf.train": "end_to_end", "num_steps": 7})
    assert (other.model.head_rates, other.crf.train, other.num_steps) == ((1, 2), "end_to_end", 7)
    assert config.crf.train == "off"
    with pytest.raises(UserError, match="no field"):
        common.changed(config, {"model.hed": "aspp"})


def test_remembered_computes_anew_only_for_something_else(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return [len(calls)]

    path = tmp_path / "results.json"
    assert common.remembered(path, {"step": 1, "widths": (3,)}, compute) == [1]
    assert common.remembered(path, {"step": 1, "widths": (3,)}, compute) == [1]
    assert common.remembered(path, {"step": 2, "widths": (3,)}, compute) == [2]
    path.write_text("{torn")
    assert common.remembered(path, {"step": 2, "widths": (3,)}, compute) == [3]


def test_network_alone_and_longest_crf_are_told_apart():
    results = [{"crf_iterations": 10, "mean_iou": 0.7}, {"crf_iterations": 0, "mean_iou": 0.6}]
    assert common.mean_iou(common.at_iterations(results, 0)) == pytest.approx(60)
    assert common.mean_iou(common.at_iterations(results, -1)) == pytest.approx(70)
    assert common.at_iterations(results[1:], -1) is None
    assert common.at_iterations(None, 0) is None


def test_a_run_of_other_flags_is_neither_continued_nor_shown(tmp_path, capsys):
    workdir = write_toy_workdir(tmp_path / "w")
    config = toy_config()
    flat, meta = Checkpoints(workdir).restore(7)
    Checkpoints(workdir).save(8, flat, meta | {"config": config.to_dict()})
    (workdir / "eval").mkdir()
    (workdir / "eval" / "val.json").write_text("[]")
    same = common.changed(config, {"data.dir": "/elsewhere", "eval.mirror": True, "log.every": 1, "crf.iterations": 3})
    assert common.difference(same, workdir) == "" and common.results_of(same, workdir) == []
    assert common.difference(config, tmp_path / "new") == ""
    for change, words in (
        ({"optimizer.learning_rate": 0.5}, "config.optimizer.learning_rate=0.00025 instead of 0.5"),
        ({"init_from": "RUN"}, "config.init_from= instead of RUN"),
        ({"crf.train": "end_to_end"}, "config.crf.train=off instead of end_to_end"),
    ):
        other = common.changed(config, change)
        assert common.difference(other, workdir) == words
        with pytest.raises(UserError, match=f"^{workdir}: holds a run with {words}; give another --out"):
            common.run(other, workdir)
        assert common.results_of(other, workdir) is None and words in capsys.readouterr().out


def test_ours_is_empty_until_run_and_comes_from_the_results_after(tmp_path, capsys):
    config = load_config("shapes")
    variants = [Variant(name, {"num_steps": 3}, (name,), (61.0, 62.0)) for name in ("first", "second")]
    (tmp_path / "second" / "eval").mkdir(parents=True)
    results = [{"crf_iterations": n, "mean_iou": v} for n, v in ((0, 0.5), (10, 0.55))]
    (tmp_path / "second" / "eval" / "val.json").write_text(json.dumps(results))
    found = common.run_variants(config, variants, tmp_path, ["none"])
    measures = {"before CRF": 0, "after CRF": -1}
    common.write_variants(tmp_path, "table", "T", ("head",), measures, variants, found, "shapes")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[-2:] == ["| first | 61.00 |  | 62.00 |  |", "| second | 61.00 | 50.00 | 62.00 | 55.00 |"]
