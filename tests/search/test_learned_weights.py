"""Weights that a search learned are remembered with what they were learned from."""

import pytest

from deeplab_jax.runs.job import Job
from deeplab_jax.search.grid import Candidate
from deeplab_jax.search.workdir import _remembered


@pytest.mark.parametrize("damage", ["{", "[]", '{"about": 1}', ""])
def test_damaged_learned_weights_are_learned_again(tmp_path, damage):
    start, learned = Candidate(1.0, 12.0, 10.0, 1.0, 1.5, "after"), []

    def learn(setting: Candidate) -> Candidate:
        learned.append(setting)
        return setting._replace(bilateral_weight=(1.0, 2.0), gaussian_weight=(3.0, 4.0))

    path = tmp_path / "learned.json"
    once = _remembered(learn, path, {"step": 7}, Job())
    assert once(start) == once(start) == learn(start)
    assert len(learned) == 2  # once, and once by this test
    path.write_text(damage)
    assert once(start).gaussian_weight == (3.0, 4.0) and len(learned) == 3
    assert _remembered(learn, path, {"step": 8}, Job())(start).gaussian_weight == (3.0, 4.0) and len(learned) == 4
