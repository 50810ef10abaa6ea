"""Exported artifacts against the checkpoint they were made from."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.export
import numpy as np
import pytest

import deeplab_jax
from deeplab_jax import export
from deeplab_jax.errors import UserError
from deeplab_jax.imaging.palettes import voc_palette
from deeplab_jax.inference import export_artifact
from deeplab_jax.inference.artifact import digest_of_file, load_artifact
from deeplab_jax.inference.program import flat_weights, program
from tests.toy_workdir import NAMES, photograph, write_toy_workdir

ROOT = Path(__file__).parents[1]
SIZE = (65, 97)  # both 32 k + 1, so that the workdir pads a photograph of this size to the same shape: not at all


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    return deeplab_jax.load(write_toy_workdir(tmp_path_factory.mktemp("workdir")))


@pytest.fixture(scope="module")
def artifact_dir(segment, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "artifact"
    export_artifact.write_artifact(segment.segmenter, out, [(60, 70)], source={"step": 7})
    return out


@pytest.fixture(scope="module")
def artifact(artifact_dir):
    return deeplab_jax.load(artifact_dir)


@pytest.mark.parametrize("size", [SIZE, (60, 70)])  # the second is the size that was asked for
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_marginals_are_close_to_the_checkpoints(segment, artifact, iterations, size):
    image = photograph(size, seed=3)
    expected, found = segment(image, iterations), artifact(image, iterations)
    if iterations == 0:
        np.testing.assert_allclose(found.marginals, expected.marginals, atol=2e-4)
    else:  # an exported program builds its own lattice, different from the plain call's
        assert np.abs(found.marginals - expected.marginals).mean() < 0.01
        assert (found.labels == expected.labels).mean() > 0.98
    assert found.class_names == NAMES
    np.testing.assert_array_equal(found.palette, expected.palette)


@pytest.mark.long
def test_marginals_equal_those_of_the_computation_compiled_here(segment, artifact):
    image = photograph(SIZE, seed=3)
    height, width = padded = next(iter(artifact._programs))
    run = jax.jit(program(segment.segmenter, artifact._programs[padded]["bilateral"]))
    canvas = np.pad(image, ((0, height - SIZE[0]), (0, width - SIZE[1]), (0, 0)), mode="edge")
    for iterations in (0, 1, 4):
        found = artifact(image, iterations)
        same = run(flat_weights(segment.segmenter), canvas, np.int32(SIZE), np.int32(iterations))
        same = same[: SIZE[0], : SIZE[1]]
        np.testing.assert_allclose(found.marginals, same, atol=2e-4)
        assert (found.labels == np.argmax(same, -1)).mean() > 0.999


def test_default_iterations_are_the_models_and_can_be_chosen(segment, artifact, artifact_dir):
    image = photograph(SIZE)
    assert artifact.crf_iterations == segment.crf_iterations == 4
    np.testing.assert_array_equal(artifact(image).marginals, artifact(image, 4).marginals)
    assert deeplab_jax.load(artifact_dir, crf_iterations=0).crf_iterations == 0


def test_iterations_without_end_are_refused(segment, artifact):
    for model in (segment, artifact):
        for wrong in (10**9, -1, 2.5, True):
            with pytest.raises(UserError, match=f"iterations={wrong} must be"):
                model(photograph(SIZE), wrong)


def test_photographs_of_other_sizes_are_fitted(segment, artifact):
    small, large, thin = photograph((41, 60), seed=1), photograph((130, 150), seed=2), photograph((50, 1))
    assert (artifact(small).labels == segment(small).labels).mean() > 0.8  # more padding, another filter
    result = artifact(large)
    assert result.labels.shape == (130, 150)
    assert result.marginals.shape == (130, 150, 4)
    np.testing.assert_allclose(result.marginals.astype(np.float32).sum(-1), 1, atol=5e-3)
    assert artifact(thin).labels.shape == (50, 1)
    ((labels, none),) = artifact.many([large])
    np.testing.assert_array_equal(labels, result.labels)
    assert none is None


def test_manifest_tells_what_there_is(artifact_dir):
    manifest = json.loads((artifact_dir / "manifest.json").read_text())
    assert manifest["labels"] == list(NAMES)
    assert manifest["programs"][0] | {"file": ""} == {"size": list(SIZE), "file": "", "bilateral": "permutohedral"}
    assert manifest["platforms"] == ["cpu", "cuda", "tpu"]
    program = jax.export.deserialize(bytearray((artifact_dir / manifest["programs"][0]["file"]).read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    assert manifest["crf"] == {
        "bilateral_weight": 4.0,
        "bilateral_xy_std": 12.0,
        "bilateral_rgb_std": 10.0,
        "gaussian_weight": 2.0,
        "gaussian_xy_std": 1.5,
        "iterations": 4,
        "normalization": "after",
        "compatibility": "Potts",
    }
    assert "RGB uint8 [H, W, 3], not normalized" in manifest["preprocessing"]
    assert manifest["palette"] == voc_palette().tolist()
    assert set(manifest["sha256"]) == {"weights.npz", "program_65x97.stablehlo"}
    assert manifest["source"] == {"step": 7}


def test_ten_lines_of_the_documentation_run_with_jax_alone(artifact, artifact_dir, tmp_path):
    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    assert len(lines.strip().splitlines()) == 10
    assert f"```python\n{lines}```\n" in (ROOT / "README.md").read_text()
    image = photograph((60, 90), seed=4)
    np.save(tmp_path / "photograph.npy", image)
    (tmp_path / "voc").symlink_to(artifact_dir)
    refuse = "import sys\nfor name in ('deeplab_jax', 'flax', 'ml_collections'): sys.modules[name] = None\n"
    save = "np.save('marginals.npy', np.asarray(marginals))\n"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", refuse + lines + save], cwd=tmp_path, env=env, check=True, timeout=300)
    np.testing.assert_allclose(np.load(tmp_path / "marginals.npy"), artifact(image, 10).marginals, atol=1e-5)


def test_damage_is_found(artifact_dir, tmp_path):
    for name, text in {"weights.npz": b"cut", "manifest.json": b"{"}.items():
        copy = tmp_path / name.split(".")[0]
        copy.mkdir()
        for path in artifact_dir.iterdir():
            (copy / path.name).write_bytes(path.read_bytes())
        (copy / name).write_bytes(text)
        with pytest.raises(UserError, match="export it again"):
            load_artifact(copy)
    with pytest.raises(UserError, match="neither a training workdir nor"):
        load_artifact(tmp_path)


def forged(artifact_dir, folder, name, content) -> Path:
    """A copy with one file replaced, and a manifest whose digest is right."""
    folder.mkdir()
    for path in artifact_dir.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"][name] = digest_of_file(folder / name)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_a_file_that_is_not_a_program_is_a_sentence(artifact_dir, tmp_path):
    name = json.loads((artifact_dir / "manifest.json").read_text())["programs"][0]["file"]
    whole = (artifact_dir / name).read_bytes()
    for number, content in enumerate((b"", b"garbage" * 1000, whole[:100], whole[: len(whole) // 2])):
        artifact = load_artifact(forged(artifact_dir, tmp_path / str(number), name, content))
        with pytest.raises(UserError, match=rf"{name}: (is not a program|cannot be run) .*export it again"):
            artifact(photograph((20, 30), seed=1))


def test_weights_that_claim_more_than_they_hold_are_a_sentence(artifact_dir, tmp_path):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            header, {"descr": "<f4", "fortran_order": False, "shape": (2_000_000_000,)}
        )
        file.writestr("a.npy", header.getvalue() + bytes(16))
    with pytest.raises(UserError, match=r"weights\.npz: .*does not hold the shape \(2000000000,\)"):
        load_artifact(forged(artifact_dir, tmp_path / "a", "weights.npz", archive.getvalue()))
    other = io.BytesIO()
    np.savez(other, another=np.ones(3, np.float32))
    artifact = load_artifact(forged(artifact_dir, tmp_path / "b", "weights.npz", other.getvalue()))
    with pytest.raises(UserError, match=r"cannot be run .*export it again"):
        artifact(photograph((20, 30), seed=1))


def test_folder_with_other_things_is_not_replaced(segment, artifact_dir, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not an exported artifact"):
        export_artifact.write_artifact(segment.segmenter, tmp_path, [SIZE])
    assert (tmp_path / "mine.txt").read_text() == "keep"
    (tmp_path / "manifest.json").write_text('{"name": "a web page", "format": 1}')  # as of other programs
    shutil.copytree(artifact_dir, tmp_path / "artifact")
    (tmp_path / "artifact" / "notes.txt").write_text("keep")
    for folder in (tmp_path, tmp_path / "artifact"):
        with pytest.raises(UserError, match="not an exported artifact, or holds other files too"):
            export_artifact.write_artifact(segment.segmenter, folder, [SIZE])
    assert (tmp_path / "mine.txt").read_text() == (tmp_path / "artifact" / "notes.txt").read_text() == "keep"
    (tmp_path / "artifact" / "notes.txt").unlink()
    assert export_artifact._may_be_replaced(tmp_path / "artifact")


def test_failure_leaves_the_old_artifact(segment, artifact_dir, monkeypatch):
    before = sorted(p.name for p in artifact_dir.parent.iterdir())
    monkeypatch.setattr(export_artifact, "digest_of_file", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_artifact.write_artifact(segment.segmenter, artifact_dir, [(9, 9)])
    monkeypatch.undo()
    assert sorted(p.name for p in artifact_dir.parent.iterdir()) == before
    assert load_artifact(artifact_dir).class_names == NAMES


def test_command_states_what_is_missing():
    for text in ("x", "0x0", "321x", "9999", "-5"):
        with pytest.raises(UserError, match="HEIGHTxWIDTH"):
            export.parse_size(text)


@pytest.mark.long
def test_saved_model_gives_the_same(segment, tmp_path):
    pytest.importorskip("tensorflow", reason="TensorFlow is not installed")
    export_artifact.write_artifact(segment.segmenter, tmp_path / "a", [(33, 33)], platforms=("cpu",), saved_model=True)
    script = (
        "import tensorflow as tf, numpy as np\n"
        "run = tf.saved_model.load('a/saved_model').signatures['segment_33x33']\n"
        "image = tf.constant(np.load('image.npy'))\n"
        "q = run(image=image, size=tf.constant([33, 33]), iterations=tf.constant(4))['marginals']\n"
        "np.save('q.npy', q.numpy())\n"
    )
    image = photograph((33, 33), seed=5)
    np.save(tmp_path / "image.npy", image)
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=300, capture_output=True)
    found = load_artifact(tmp_path / "a")(image, 4)
    np.testing.assert_allclose(np.load(tmp_path / "q.npy"), found.marginals, atol=1e-4)
