"""Weights with some bytes changed or cut off, and headers with anything in a part: read, or refused in one sentence."""

import json
import struct

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deeplab_jax.errors import UserError
from deeplab_jax.weights import files
from tests.weights import writers

FEW = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KERNEL = np.ones((3, 3, 3, 4), np.float32)


def safetensors(header: object, values: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


def of_ours() -> bytes:
    entry = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
    return safetensors({"__metadata__": {"format": "deeplab_jax"}, "head/fc1/kernel": entry})


def keras(path) -> bytes:
    with h5py.File(path, "w") as f:
        group = f.create_group("conv1_conv")
        group.attrs["weight_names"] = [b"kernel:0", b"bias:0"]
        group["kernel:0"], group["bias:0"] = KERNEL, np.zeros(4, np.float32)
    return path.read_bytes()


def caffe(_) -> bytes:
    blobs = (KERNEL.transpose(3, 2, 0, 1), np.zeros(4, np.float32))
    return writers.caffe_layer("conv1", "Convolution", blobs)


WHOLE = {".safetensors": lambda _: of_ours(), ".h5": keras, ".caffemodel": caffe}


@pytest.fixture(scope="module", params=WHOLE)
def whole(request, tmp_path_factory) -> tuple[str, bytes]:
    path = tmp_path_factory.mktemp("whole") / f"w{request.param}"
    return request.param, WHOLE[request.param](path)


def read_or_refused(path) -> bool:
    """Whether it was read; a refusal names the file in one line."""
    try:
        source = files.read(path)
    except UserError as e:
        assert str(path) in str(e) and "\n" not in str(e) and len(str(e)) < 1000
        return False
    assert all(np.isfinite(array).all() for array in source.arrays.values())
    return True


def test_the_whole_file_is_read(whole, tmp_path):
    suffix, content = whole
    (tmp_path / f"w{suffix}").write_bytes(content)
    assert read_or_refused(tmp_path / f"w{suffix}")


@FEW
@given(data=st.data())
def test_any_damage(whole, tmp_path, data):
    suffix, content = whole[0], bytearray(whole[1])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    path = tmp_path / f"w{suffix}"
    path.write_bytes(content)
    read_or_refused(path)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=6) | st.just(10**400) | st.just(2**63),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@FEW
@given(part=st.sampled_from(["dtype", "shape", "data_offsets", "entry", "__metadata__", "all"]), new=ANYTHING)
def test_anything_in_a_header(tmp_path, part, new):
    entry = {"dtype": "F32", "shape": [2, 8], "data_offsets": [0, 64]}
    if part in entry:
        entry[part] = new
    header: object = {"__metadata__": {"format": "deeplab_jax"}, "head/fc1/kernel": new if part == "entry" else entry}
    if part == "__metadata__":
        header["__metadata__"] = new
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(new if part == "all" else header))
    read_or_refused(path)


@pytest.mark.parametrize("length", [0, 1, 8, 2**33, 2**63, 2**64 - 1])
def test_a_header_that_claims_any_length(tmp_path, length):
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}      ")
    assert not read_or_refused(path)
