"""Starting from converted weights and from runs: settings, files, the command."""

import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from deeplab_jax.configs import base
from deeplab_jax.errors import UserError
from deeplab_jax.models import create_model
from deeplab_jax.weights import conversion, files, initial, load_initial, recorded_settings, transfer
from tests.command_line import call
from tests.weights import writers

SMALL = {"backbone": "resnet_small", "head_width": 8, "widths": (8, 8, 8, 8), "blocks": (1, 1, 1, 1)}


def small_config():
    config = base.get_config().model
    config.update({**SMALL, "batch_norm": "trained"})
    return config


@pytest.fixture(scope="module")
def small():
    """A small network's random variables."""
    network = create_model(small_config(), 5)
    variables = jax.jit(network.init)(jax.random.key(0), np.zeros((1, 33, 33, 3), np.float32))
    return jax.tree.map(np.asarray, variables)


def saved(path, variables, **metadata):
    arrays = {transfer.full_name(p): v for p, v in flatten_dict(variables).items()}
    files.write(path, arrays, {"preprocessing": "caffe_bgr", **metadata})
    return path


def test_a_converted_file_gives_back_every_value(tmp_path, small):
    path = saved(tmp_path / "w.safetensors", small)
    fresh = jax.tree.map(np.zeros_like, small)
    variables, report = load_initial(path, small_config(), fresh)
    jax.tree.map(np.testing.assert_array_equal, variables, small)
    assert jax.tree.structure(variables) == jax.tree.structure(small)
    assert not report.missing and not report.left_out


def test_names_in_the_file_are_the_documented_ones(tmp_path, small):
    path = saved(tmp_path / "w.safetensors", small)
    arrays = files.read(path).arrays
    assert arrays["backbone/conv1/kernel"].shape == (7, 7, 3, 8)
    assert arrays["batch_stats/backbone/bn_conv1/mean"].shape == (8,)
    assert arrays["head/fc1/bias"].shape == (5,)
    assert files.read_metadata(path)["format"] == "deeplab_jax"


def test_settings_are_recorded_and_checked(tmp_path, small):
    path = saved(tmp_path / "w.safetensors", small, preprocessing="torch_rgb")
    assert recorded_settings(path) == {"preprocessing": "torch_rgb"}
    with pytest.raises(UserError, match=r"need config\.model\.preprocessing=torch_rgb"):
        load_initial(path, small_config(), small)


def test_settings_of_a_workdir_come_from_its_config(tmp_path):
    config = base.get_config()
    config.model.update({"backbone": "resnet50", "stride_on": "3x3", "preprocessing": "torch_rgb"})
    (tmp_path / "config.json").write_text(config.to_json())
    wanted = {"preprocessing": "torch_rgb", "stride_on": "3x3", "resize": "corners"}
    assert recorded_settings(tmp_path) == wanted
    with config.unlocked():
        del config.model.resize  # a run from before the field existed
    (tmp_path / "config.json").write_text(config.to_json())
    assert recorded_settings(tmp_path) == wanted
    (tmp_path / "config.json").write_text(json.dumps({"model": 3}))
    with pytest.raises(UserError, match="not the workdir"):
        recorded_settings(tmp_path)


def test_what_is_not_converted_is_refused_with_the_command(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(UserError, match="no such file"):
        recorded_settings(tmp_path / "none.safetensors")
    foreign = tmp_path / "vgg16.caffemodel"
    foreign.write_bytes(b"x")
    with pytest.raises(UserError, match=r"python -m deeplab_jax\.convert_weights"):
        recorded_settings(foreign)
    save_file({"conv1.weight": np.ones((4, 3, 7, 7), np.float32)}, tmp_path / "timm.safetensors")
    with pytest.raises(UserError, match="not written by convert_weights"):
        recorded_settings(tmp_path / "timm.safetensors")


def test_not_finite_values_are_refused(tmp_path, small):
    path = saved(tmp_path / "w.safetensors", jax.tree.map(lambda a: a * np.float32(np.nan), small))
    with pytest.raises(UserError, match="not finite"):
        files.read(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    files.write(path, {"backbone/a/kernel": np.ones(3)}, {})
    (tmp_path / "any").touch()
    assert path.stat().st_mode == (tmp_path / "any").stat().st_mode  # as the user's other files
    (tmp_path / "any").unlink()
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(UserError, match="no space left"):
        files.write(path, {"backbone/a/kernel": np.zeros(3)}, {})
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
    with pytest.raises(UserError, match=r"ends in \.safetensors"):
        files.write(tmp_path / "w.npz", {}, {})


def test_unknown_files_are_named(tmp_path):
    (tmp_path / "w.zip").write_bytes(b"x")
    with pytest.raises(UserError, match=r"'\.zip' is not a known kind"):
        files.read(tmp_path / "w.zip")
    with pytest.raises(UserError, match="no such file"):
        files.read(tmp_path / "none.pth")


def test_a_workdir_is_converted_with_its_crf_left_to_the_config(tmp_path, small, monkeypatch):
    """A run's checkpoint goes out as safetensors and comes back the same."""
    from deeplab_jax.runs import checkpoints

    config = base.get_config()
    config.model = small_config()
    with_crf = {**small, "params": {**small["params"], "crf": {"weights": np.ones(2, np.float32)}}}
    monkeypatch.setattr(checkpoints, "load_workdir", lambda _: (config, with_crf, {}))
    source, _ = initial.read_workdir(tmp_path)
    report = conversion.convert(source, config.model, tmp_path / "w.safetensors")
    assert report.left_out == {"crf/weights": "the network has no such layer"}
    variables, _ = load_initial(tmp_path / "w.safetensors", config.model, jax.tree.map(np.zeros_like, small))
    jax.tree.map(np.testing.assert_array_equal, variables, small)


def test_overridden_settings_are_recorded(tmp_path, small):
    source = files.read(saved(tmp_path / "w.safetensors", small))
    out = tmp_path / "out.safetensors"
    conversion.convert(source, small_config(), out, overrides={"preprocessing": "torch_rgb", "stride_on": "3x3"})
    assert recorded_settings(out) == {"preprocessing": "torch_rgb"}  # a network without bottlenecks has no stride_on


def test_command_reports_and_fails_in_one_line(tmp_path):
    writers.write_caffe_vgg(tmp_path / "vgg.caffemodel", writers.thin_vgg(), legacy=True, dense=True)
    source, out = tmp_path / "vgg.caffemodel", f"--out={tmp_path / 'w.safetensors'}"
    run = call("convert_weights", source, "--config=base", out, "--config.model.backbone=vgg16")
    assert run.returncode == 1 and not run.stdout
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
    assert "of the trunk do not come from this file" in run.stderr
    assert not (tmp_path / "w.safetensors").exists()
