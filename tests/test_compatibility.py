"""Files of version 0.1.0, written before the rooms were moved, load and give the same labels.

tests/data/compat: a run of 160 steps on drawn scenes, its CRF learned (without the TensorBoard log), the artifact and
the weights made from it, a preset, a drawn photograph with noise, and the labels of that version's own `load`.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import deeplab_jax
from deeplab_jax.config import load_config
from deeplab_jax.crf.setting import read_preset
from deeplab_jax.inference.load import load_weights
from deeplab_jax.runs.provenance import read_config
from tests.command_line import call

COMPAT = Path(__file__).parent / "data" / "compat"
PHOTOGRAPH = COMPAT / "photograph.png"
NETWORK = 0.001  # share of the labels that may differ without the CRF
FILTER = 0.006  # and with it, whose approximation has changed since


def differing(labels: np.ndarray, name: str) -> float:
    """The share of the labels that differ from those stored under this name."""
    expected = np.load(COMPAT / "labels.npz")[name]
    assert labels.shape == expected.shape == (72, 104)
    return float((labels != expected).mean())


def test_a_workdir():
    segment = deeplab_jax.load(COMPAT / "run")
    assert segment.class_names == ("background", "ball", "melon", "box", "star", "ring", "tree")
    assert differing(segment(PHOTOGRAPH, 0).labels, "run_0") <= NETWORK
    labels = segment(PHOTOGRAPH).labels  # five iterations with the parameters that the run learned
    assert differing(labels, "run_5") <= FILTER
    assert differing(labels, "run_0") > 0.05  # the CRF is not left out


def test_an_artifact():
    artifact = deeplab_jax.load(COMPAT / "artifact")
    assert artifact.crf_iterations == 5
    assert differing(artifact(PHOTOGRAPH).labels, "artifact") <= FILTER


@pytest.mark.parametrize(
    ("crf", "iterations", "name", "most"),
    [(None, 0, "weights_0", NETWORK), (COMPAT / "preset.json", None, "weights_preset", FILTER)],
    ids=["weights", "weights and preset"],
)
def test_converted_weights_and_a_preset_file(crf, iterations, name, most):
    config = load_config("shapes", ["model.widths=8,8,8,8", "model.head_width=8"])
    segment = load_weights(config, COMPAT / "weights.safetensors", crf=crf)
    assert differing(segment(PHOTOGRAPH, iterations).labels, name) <= most


def test_the_preset_s_values():
    preset = read_preset(COMPAT / "preset.json")
    assert (preset.iterations, preset.normalization, preset.source) == (6, "symmetric", "by hand")
    params = preset.params
    assert (params.bilateral_weight, params.bilateral_xy_std, params.bilateral_rgb_std) == (5.0, 25.0, 12.0)
    assert (params.gaussian_weight, params.gaussian_xy_std) == (2.0, 1.5)


def test_its_record_has_the_fields_of_now():
    recorded = json.loads((COMPAT / "run" / "config.json").read_text())
    assert recorded["crf"]["search_images"] == 0 and recorded["data"]["early_share"] == 0
    config = read_config(COMPAT / "run")
    assert config.search.images == 0 and config.data.stages == ()
    assert config.model.widths == (8, 8, 8, 8) and config.crf.train == "end_to_end"


def test_its_report(tmp_path):
    shutil.copytree(COMPAT / "run", tmp_path / "run")
    done = call("report", f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "resnet_small" in (tmp_path / "run" / "report.html").read_text()
