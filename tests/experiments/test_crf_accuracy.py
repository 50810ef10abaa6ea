"""The CRF's accuracy table: what it measures, its summary, and where an interrupted run continues."""

import json

import numpy as np
import pytest
from PIL import Image

from deeplab_jax.errors import UserError
from experiments import crf_accuracy


@pytest.fixture
def photographs(tmp_path):
    """Two small ones: colored quarters with noise."""
    rng = np.random.default_rng(0)
    quarters = rng.integers(40, 215, (2, 2, 3)).repeat(12, 0).repeat(16, 1)
    for n in range(2):
        noisy = np.clip(quarters + rng.normal(0, 12, quarters.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"{n}.png")
    return crf_accuracy.find_photographs(tmp_path, 3)


def test_rows_compare_with_the_sum_over_all_pairs(photographs):
    image = crf_accuracy.sized(photographs[0], "own")
    unary = crf_accuracy.scores(image)
    plain = crf_accuracy.compare(unary, image, "v2_resnet101", "symmetric", traced=False)
    assert plain["ours"] == 0 and plain["ours_dq"] < 1e-3  # so few points are summed over all pairs
    assert plain["changed"] > 1
    lattice = crf_accuracy.compare(unary, image, "v2_resnet101", "symmetric", traced=True)
    assert 1e-3 < lattice["ours_dq"] < 0.5 and lattice["ours"] < 1.5


def test_an_interrupted_measurement_continues(photographs, tmp_path, monkeypatch):
    asked = []

    def compare(unary, image, name, normalization, traced):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((name, normalization))
        return {"changed": 5.0, "ours": float(len(asked)), "ours_dq": 0.1, "theirs": 4.0, "theirs_dq": 0.2}

    monkeypatch.setattr(crf_accuracy, "compare", compare)
    run = lambda: crf_accuracy.measure(  # noqa: E731
        photographs, ["own"], ["v1_msc"], ["symmetric", "after"], False, tmp_path / "out"
    )
    with pytest.raises(KeyboardInterrupt):
        run()
    monkeypatch.setattr(crf_accuracy, "compare", lambda *_: {"changed": 5.0, "ours": 9.0, "theirs": 4.0})
    rows = run()
    assert [row["ours"] for row in rows] == [1.0, 2.0, 3.0, 9.0]
    assert [row["photograph"] for row in rows] == ["0.png", "0.png", "1.png", "1.png"]
    assert json.loads((tmp_path / "out" / crf_accuracy.UNFINISHED).read_text()) == rows
    assert crf_accuracy.summary(rows) == (
        "4 rows: pydensecrf2 closer by more than 0.02 points in 1; median ratio 0.62"  # (2 + 3) / 2 / 4
    )
    assert crf_accuracy.by_setting(rows)[-1] == "| v1_msc | 2.50 / 4.00 (2.25) |"


def test_what_is_not_a_photograph_or_a_size_is_named(photographs, tmp_path):
    with pytest.raises(UserError, match="no photographs"):
        crf_accuracy.find_photographs(tmp_path / "absent", 1)
    with pytest.raises(UserError, match=r"--sizes: '96' is not a size"):
        crf_accuracy.sized(photographs[0], "96")
    (tmp_path / "text.png").write_text("not a photograph")
    with pytest.raises(UserError, match=r"text\.png: cannot be read"):
        crf_accuracy.sized(tmp_path / "text.png", "own")
