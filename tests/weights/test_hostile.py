"""Files with false claims, links or hidden content: refused with a sentence, nothing allocated or opened."""

import io
import json
import os
import struct
import zipfile

import h5py
import numpy as np
import pytest

from deeplab_jax.errors import UserError
from deeplab_jax.weights import files
from deeplab_jax.weights import torch as reader
from tests.weights import writers

HUGE = (200_000, 200_000)  # 149 GiB of float32


def keras(path, fill):
    """A legacy file of one layer, whose kernel `fill(group)` makes."""
    with h5py.File(path, "w") as f:
        group = f.create_group("conv1_conv")
        group.attrs["weight_names"] = [b"kernel:0"]
        fill(group)
    return path


@pytest.mark.parametrize(
    ("fill", "says"),
    [
        (lambda g: g.create_dataset("kernel:0", HUGE, "f4", chunks=(64, 64)), "claims more than the file holds"),
        (
            lambda g: g.create_dataset("kernel:0", (8,), "f4", chunks=(20_000_000,), maxshape=(None,)),
            "claims more than",
        ),
        (lambda g: g.create_dataset("kernel:0", (8,), "f4", external=[("/etc/passwd", 0, 32)]), "in another file"),
        (lambda g: g.__setitem__("kernel:0", h5py.ExternalLink("other.h5", "/x")), "not followed"),
        (lambda g: g.__setitem__("kernel:0", h5py.SoftLink("/conv1_conv")), "not followed"),
    ],
)
def test_an_h5_that_claims_or_points_elsewhere(tmp_path, fill, says):
    with pytest.raises(UserError, match=says):
        files.read(keras(tmp_path / "w.h5", fill))


def test_an_h5_that_reads_one_array_again_and_again(tmp_path):
    def fill(group):
        values = group.create_dataset("kernel:0", data=np.ones((256, 256), np.float32))
        for i in range(100):
            group[str(i)] = values
        group.attrs["weight_names"] = [str(i).encode() for i in range(100)]

    with pytest.raises(UserError, match="claims more than the file holds"):
        files.read(keras(tmp_path / "w.h5", fill))


@pytest.mark.parametrize("name", ["layers", "conv1_conv", "model_weights"])
def test_a_link_to_a_pipe_is_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / "pipe.h5")
    with h5py.File(tmp_path / "w.h5", "w") as f:
        f[name] = h5py.ExternalLink(str(tmp_path / "pipe.h5"), "/x")
    with pytest.raises(UserError, match="is a link, which is not followed"):
        files.read(tmp_path / "w.h5")
    with pytest.raises(UserError, match="not a regular file"):
        files.read(tmp_path / "pipe.h5")


def test_a_keras_archive_is_read(tmp_path):
    writers.write_keras_legacy(tmp_path / "w.h5", writers.thin_resnet(biases=True))
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.write(tmp_path / "w.h5", "model.weights.h5")
    whole, inner = files.read(tmp_path / "w.keras"), files.read(tmp_path / "w.h5")
    assert sorted(whole.arrays) == sorted(inner.arrays) and whole.settings == inner.settings
    np.testing.assert_array_equal(whole.arrays["res5c_branch2c/kernel"], inner.arrays["res5c_branch2c/kernel"])
    with zipfile.ZipFile(tmp_path / "w.keras", "w") as archive:
        archive.writestr("config.json", "{}")
    with pytest.raises(UserError, match=r"model\.weights\.h5"):
        files.read(tmp_path / "w.keras")


def test_a_keras_bomb(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(2**26))
    with pytest.raises(UserError, match="it claims"):
        files.read(tmp_path / "w.keras")


def safetensors(path, kind, size, shape=(2, 2)):
    header = json.dumps({"conv1.weight": {"dtype": kind, "shape": shape, "data_offsets": [0, size]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    return path


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2"])
def test_safetensors_of_eight_bits(tmp_path, kind):
    with pytest.raises(UserError, match=rf"{kind}.*convert a copy in float32"):
        files.read(safetensors(tmp_path / "w.safetensors", kind, 4))


def test_safetensors_that_claim_more_than_they_hold(tmp_path):
    with pytest.raises(UserError, match=r"w\.safetensors: is not a safetensors file"):
        files.read(safetensors(tmp_path / "w.safetensors", "F32", 16 * 10**10, HUGE))


def npz(path, header):
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, header)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("conv1.weight.npy", member.getvalue() + bytes(16))
    return path


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({"descr": "<f4", "fortran_order": False, "shape": HUGE}, "does not hold the shape"),
        ({"descr": "|O", "fortran_order": False, "shape": (2,)}, "is a pickle"),
    ],
)
def test_an_npz_that_claims_or_hides(tmp_path, header, says):
    with pytest.raises(UserError, match=says):
        files.read(npz(tmp_path / "w.npz", header))


def test_a_damaged_npz(tmp_path):
    np.savez(tmp_path / "whole.npz", **{"conv1.weight": np.ones((4, 3, 7, 7), np.float32)})
    content = (tmp_path / "whole.npz").read_bytes()
    for i, damaged in enumerate([content[: len(content) * i // 5] for i in range(5)] + [b"<html>"]):
        path = tmp_path / f"{i}.npz"
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{i}.npz"):
            files.read(path)


@pytest.mark.parametrize(
    ("version", "safe"),
    [("1.13.1", False), ("2.5.1+cu124", False), ("2.6.0", True), ("2.13.0+cpu", True), ("3.0", True), ("?", False)],
)
def test_torch_is_used_from_the_safe_version_on(tmp_path, version, safe):
    if safe:
        reader.check_version(tmp_path / "w.pth", version)
    else:
        with pytest.raises(UserError, match=r"CVE-2025-32434.*2\.6"):
            reader.check_version(tmp_path / "w.pth", version)


def test_an_old_torch_opens_nothing(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save({"conv1.weight": torch.ones(4, 3, 7, 7)}, tmp_path / "w.pth")
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(UserError, match="CVE-2025-32434"):
        files.read(tmp_path / "w.pth")


def test_a_tensor_that_is_larger_than_its_file(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    torch.save({"conv1.weight": torch.zeros(1).expand(*HUGE)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"claims 149\.0 GiB"):
        files.read(tmp_path / "w.pth")


def test_a_pth_whose_members_are_compressed_is_not_inflated(tmp_path, monkeypatch):
    """PyTorch stores its members; others are refused before PyTorch sees them."""
    torch = pytest.importorskip("torch")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/0", bytes(50_000_000))
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read"))
    with pytest.raises(UserError, match=r"bomb\.pth: claims 0\.0 GiB of weights, which the file does not hold"):
        reader.read_pth(tmp_path / "bomb.pth")
