"""Reads `.caffemodel` files, new (`layer`) and legacy (`layers`), without Caffe.

Only the few fields of caffe.proto that carry weights are declared here; the protobuf runtime skips the rest.
"""

import functools
import re
from pathlib import Path

import numpy as np

from deeplab_jax.errors import UserError
from deeplab_jax.weights import names
from deeplab_jax.weights.kinds import CAFFE
from deeplab_jax.weights.source import Source, dense_to_hwio, oihw_to_hwio

_V1_INNER_PRODUCT = 14  # V1LayerParameter.LayerType
_BYTES, _INT32, _INT64, _FLOAT, _MESSAGE = 12, 5, 3, 2, 11  # FieldDescriptorProto.Type

# message -> (field, number, type, message type, repeated). A packed array of floats and a string of bytes have the
# same encoding: declared as bytes, 43 million weights are read as one buffer instead of one by one.
_SCHEMA = {
    "BlobShape": [("dim", 1, _INT64, "", True)],
    "BlobProto": [
        ("num", 1, _INT32, "", False),
        ("channels", 2, _INT32, "", False),
        ("height", 3, _INT32, "", False),
        ("width", 4, _INT32, "", False),
        ("data", 5, _BYTES, "", False),
        ("shape", 7, _MESSAGE, "BlobShape", False),
        ("double_data", 8, _BYTES, "", False),
    ],
    "BatchNormParameter": [("eps", 3, _FLOAT, "", False)],
    "LayerParameter": [
        ("name", 1, _BYTES, "", False),
        ("type", 2, _BYTES, "", False),
        ("blobs", 7, _MESSAGE, "BlobProto", True),
        ("batch_norm_param", 139, _MESSAGE, "BatchNormParameter", False),
    ],
    "V1LayerParameter": [
        ("name", 4, _BYTES, "", False),
        ("type", 5, _INT32, "", False),
        ("blobs", 6, _MESSAGE, "BlobProto", True),
    ],
    "NetParameter": [
        ("layers", 2, _MESSAGE, "V1LayerParameter", True),
        ("layer", 100, _MESSAGE, "LayerParameter", True),
    ],
}


@functools.cache
def net_parameter() -> type:
    """The protobuf message class of a whole network."""
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="deeplab_jax/caffe.proto", package="deeplab_jax", syntax="proto2")
    for message, fields in _SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, number, kind, type_name, repeated in fields:
            field = described.field.add(name=name, number=number, type=kind, label=3 if repeated else 1)
            if type_name:
                field.type_name = f".deeplab_jax.{type_name}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("deeplab_jax.NetParameter"))


def read(path: Path, leave_out: str = "") -> Source:
    """Reads a network's weights.

    The multi-scale network's copies of layers for its other scales (`res05`, `res075`) are left out: they share the
    weights of the first. Batch norm's sums are divided by their factor, and the Scale layer after it provides scale
    and bias.

    Raises:
      UserError: not a caffemodel, truncated, or a blob contradicts its shape.
    """
    from google.protobuf.message import DecodeError

    net = net_parameter()()
    try:
        net.ParseFromString(path.read_bytes())
    except (DecodeError, ValueError) as e:
        raise UserError(f"{path}: is not a caffemodel, or is truncated ({e}); download it again") from e
    source = Source(str(path), "a caffemodel", settings=dict(CAFFE), leave_out=leave_out)
    for layer in [*net.layer, *net.layers]:
        if layer.blobs:
            _add_layer(source, layer)
    for name in [name for name in source.arrays if name.endswith("/mean")]:
        layer, mean = name.removesuffix("/mean"), source.arrays[name]
        # without a Scale layer, batch norm does not scale
        source.arrays.setdefault(f"{layer}/scale", np.ones_like(mean))
        source.arrays.setdefault(f"{layer}/bias", np.zeros_like(mean))
    return source.finish()


def _add_layer(source: Source, layer) -> None:
    name = layer.name.decode(errors="replace")
    if "res05" in name or "res075" in name:
        source.left_out[name] = "a copy for another scale, which shares the weights of the first"
        return
    ours = names.from_caffe(name)
    kind = layer.type.decode(errors="replace") if isinstance(layer.type, bytes) else layer.type
    dense = kind in ("InnerProduct", _V1_INNER_PRODUCT)
    if source.leave_out and re.search(source.leave_out, name):
        source.leave(name, None)
        return
    if ours is None or (dense and ours.startswith("fc8")):
        source.left_out[name] = "the ImageNet classifier"
        return
    try:
        blobs = [_blob(blob) for blob in layer.blobs]
        if kind == "BatchNorm":
            _add_batch_norm(source, ours, blobs, layer.batch_norm_param)
        elif kind == "Scale":
            source.add(ours, "scale", blobs[0].reshape(-1))
            if len(blobs) > 1:
                source.add(ours, "bias", blobs[1].reshape(-1))
        else:
            if dense:
                kernel = dense_to_hwio(blobs[0].reshape(-1, blobs[0].shape[-1]), ours, "chw")
            else:
                kernel = oihw_to_hwio(blobs[0])
            source.add(ours, "kernel", kernel)
            if len(blobs) > 1:
                source.add(ours, "bias", blobs[1].reshape(-1))
    except (ValueError, IndexError) as e:
        raise UserError(f"{source.path}: layer '{name}' is damaged ({e}); download the file again") from e


def _add_batch_norm(source: Source, layer: str, blobs: list[np.ndarray], parameter) -> None:
    mean, var, factor = blobs[0].reshape(-1), blobs[1].reshape(-1), float(blobs[2].reshape(-1)[0])
    if factor == 0:
        raise UserError(f"{source.path}: batch norm '{layer}' holds no statistics (its factor is 0); train it first")
    epsilon = parameter.eps if parameter.HasField("eps") else 1e-5
    source.add_batch_norm(layer, mean / factor, var / factor, epsilon)


def _blob(blob) -> np.ndarray:
    """A blob's values in its shape; legacy blobs have four numbers instead of a shape."""
    values = np.frombuffer(blob.double_data, "<f8") if blob.double_data else np.frombuffer(blob.data, "<f4")
    shape = tuple(blob.shape.dim) if blob.HasField("shape") else (blob.num, blob.channels, blob.height, blob.width)
    if min(shape, default=1) < 0 or int(np.prod(shape, dtype=object)) != values.size:
        raise ValueError(f"{values.size} values for the shape {shape}")
    return values.reshape(shape)
