"""Which CRF parameters the evaluation of a run uses."""

import copy

import pytest

from deeplab_jax.config import load_config
from deeplab_jax.crf import Preset
from deeplab_jax.evaluation import workdir


@pytest.mark.parametrize(
    ("images", "named", "parts", "preset"),
    [
        (2, "", {"head"}, "{run}/crf_preset.json"),
        (0, "", {"head", "crf"}, ""),
        (2, "start.json", {"head"}, "{run}/crf_preset.json"),  # training's own
        (2, "mine.json", {"head"}, "mine.json"),
        (0, "mine.json", {"head"}, "mine.json"),
    ],
)
def test_a_search_or_a_preset_file_replaces_learned_parameters(images, named, parts, preset, monkeypatch, tmp_path):
    config = load_config("shapes", [f"search.images={images}"])
    trained = copy.deepcopy(config)
    trained.crf.preset = "start.json"
    used = {}
    variables = {"params": {"head": {}, "crf": {"bilateral_weight": 3.0}}}
    monkeypatch.setattr(
        workdir,
        "load_workdir",
        lambda run, step=None: (trained, variables, {"step": 3, "class_names": (), "palette": ()}),
    )
    monkeypatch.setattr(workdir, "_search", lambda config, run: Preset(None, source="found"))
    monkeypatch.setattr(workdir, "evaluate_split", lambda *args: used.update(config=args[0], variables=args[1]) or [])
    config.crf.preset = named
    workdir.evaluate_workdir(config, tmp_path)
    assert set(used["variables"]["params"]) == parts
    assert used["config"].crf.preset == preset.format(run=tmp_path)
