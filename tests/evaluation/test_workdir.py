"""Which CRF parameters the evaluation of a run uses."""

import pytest

from deeplab_jax.config import load_config
from deeplab_jax.crf import Preset
from deeplab_jax.evaluation import workdir


@pytest.mark.parametrize(("images", "parts", "preset"), [(2, {"head"}, "crf_preset.json"), (0, {"head", "crf"}, "")])
def test_a_search_replaces_parameters_learned_end_to_end(images, parts, preset, monkeypatch, tmp_path):
    config = load_config("shapes", [f"search.images={images}"])
    used = {}
    variables = {"params": {"head": {}, "crf": {"bilateral_weight": 3.0}}}
    monkeypatch.setattr(
        workdir,
        "load_workdir",
        lambda run, step=None: (config, variables, {"step": 3, "class_names": (), "palette": ()}),
    )
    monkeypatch.setattr(workdir, "_search", lambda config, run: Preset(None, source="found"))
    monkeypatch.setattr(workdir, "evaluate_split", lambda *args: used.update(config=args[0], variables=args[1]) or [])
    config.crf.preset = ""
    workdir.evaluate_workdir(config, tmp_path)
    assert set(used["variables"]["params"]) == parts
    assert used["config"].crf.preset == (str(tmp_path / preset) if preset else "")
