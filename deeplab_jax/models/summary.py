"""The description of a network, found by tracing it: layers, sizes, parameters, receptive field, FLOPs, memory.

Nothing is computed and no array is allocated, so that the large networks are described in seconds.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from deeplab_jax.errors import UserError
from deeplab_jax.models import initial
from deeplab_jax.models.backbones import architecture_of
from deeplab_jax.models.deeplab import create_model, is_frozen
from deeplab_jax.models.layers import BatchNorm, Conv, ConvWeights, Pool, Upsample
from deeplab_jax.target import tracing_for

# Paths that see no more than the parallel one: shortcuts, v1's side branches, the small network's fine branch.
_SHORTER_PATHS = re.compile(r"_branch1$|/msc/|/fine$")
# Parallel branches of a head, by number: fc6_1 fc7_1 fc8_1, fc1_c0, aspp_c0, aspp_1x1.
_PARALLEL = re.compile(r"^head/(?:fc[678]_|fc1_c|aspp_c?)(\w+)$")
_LAYERS = (Conv, BatchNorm, ConvWeights, Pool, Upsample)
STEP_PARTS = ("parameters", "gradients", "optimizer", "activations")  # of a training step's memory


def describe(config: Any, num_classes: int, batch: int = 1) -> dict[str, Any]:
    """Describes the network of a config at the config's crop.

    Args:
      config: a whole config; `model` and `data.crop` are read.
      num_classes: number of classes.
      batch: images for which FLOPs are counted.

    Returns:
      "parameters": int, without the CRF's; "output_stride": int; "score_shape": [h, w, classes]; "receptive_field":
      int, pixels of the image at scale 1; "gflops": float, one multiply-add counted as two, forward, all input scales;
      "layers": a list of {"name", "kind", "kernel", "stride", "rate", "shape", "parameters", "gflops"} at scale 1.
    """
    logits, variables, calls = _traced(_model(config, num_classes), (batch, *config.data.crop, 3))
    layers = calls[: len(calls) // len(config.model.scales)]  # the same layers run once for each scale
    height, width = logits.shape[1:3]
    return {
        "parameters": sum(math.prod(x.shape) for x in jax.tree.leaves(variables["params"])),
        "output_stride": _output_stride(config.model),
        "score_shape": [height, width, num_classes],
        "receptive_field": receptive_field(layers),
        "gflops": sum(layer["gflops"] for layer in calls),
        "layers": layers,
    }


@functools.lru_cache(maxsize=2)
def _traced(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Shapes of the scores and of the variables, and the layers in the order in which they run.

    Of the convolutions only the shapes are traced, and of batch normalization, which keeps them, nothing.
    """
    calls: list[dict[str, Any]] = []

    def record(next_call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, _LAYERS):
            return next_call(*args, **kwargs)
        if isinstance(module, BatchNorm):
            conv, x = args[:2]
            return conv(x)
        if isinstance(module, Conv):
            result = lax.broadcast(np.zeros((), module.dtype), module.shape(args[0]))
        else:
            result = next_call(*args, **kwargs)
        calls.append(_layer(module, args[0], result))
        return result

    def run(variables):
        with nn.intercept_methods(record):
            return model.apply(variables, jnp.zeros(shape, jnp.float32))[0]

    variables = initial.shapes(initial.plan(model))
    return jax.eval_shape(run, variables), variables, calls


def receptive_field(layers: Sequence[dict[str, Any]]) -> int:
    """Side in pixels of the square that one score depends on, away from borders.

    Along the longest path each layer adds (kernel - 1) * rate steps of the map that it reads. Of a head's parallel
    branches the widest counts; shortcuts and side branches, which see less, do not. Enlarged maps have positions
    between those of the map that they read; the one that depends on most of them counts.

    Args:
      layers: as in `describe`'s "layers".
    """
    path, step = [], 1.0  # of each layer: pixels that it adds, pixels between positions before and after it
    branches: dict[str, float] = {}
    for layer in layers:
        if _SHORTER_PATHS.search(layer["name"]):
            continue
        added = (layer["kernel"] - 1) * layer["rate"] * step
        parallel = _PARALLEL.match(layer["name"])
        if parallel:
            branches[parallel[1]] = branches.get(parallel[1], 0.0) + added
            continue
        path.append((max(branches.values(), default=0.0), step, step))
        path.append((added, step, step * layer["stride"]))
        step, branches = step * layer["stride"], {}
    path.append((max(branches.values(), default=0.0), step, step))
    reach = 0.0  # between the outermost positions that are read
    for added, before, after in reversed(path):
        if after < before:
            reach = before * math.ceil((before - after + reach) / before)
        else:
            reach += added
    return math.ceil(reach) + 1


def kept_for_backward(config: Any, num_classes: int, batch: int) -> dict[str, int]:
    """The memory that a training step of `batch` images needs at once, in bytes, without compiling anything.

    It counts the intermediate values that reverse-mode differentiation keeps from the forward to the backward pass,
    each once, and the arrays of the training state. A compiled step also needs room for the layer being computed, and
    may recompute cheap values instead of keeping them; `training_memory` gives the compiler's figure.

    Returns:
      "parameters" (with batch norm's statistics), "gradients", "optimizer" (momentum, AdamW's two moments, and averaged
      weights, as the config has them; frozen parameters need neither these nor gradients), "activations".
    """
    loss, variables, rest, image, keys = _training_loss(config, num_classes, batch)
    params = variables["params"]

    def kept(params, rest, image, keys):
        pullback = jax.vjp(lambda p: loss(p, rest, image, keys), params)[1]
        given = {id(leaf) for leaf in jax.tree.leaves((params, rest))}
        return list({id(leaf): leaf for leaf in jax.tree.leaves(pullback) if id(leaf) not in given}.values())

    with tracing_for("gpu"):  # layers in their plain forms keep the same values, and are traced sooner
        kept_shapes = jax.eval_shape(kept, params, rest, image, keys)
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    learned = sum(_bytes(x) for path, x in flat if not is_frozen([str(k.key) for k in path], config.model))
    copies = {"sgd": 1, "adamw": 2}[config.optimizer.name] + bool(config.optimizer.ema)
    return {
        "parameters": sum(map(_bytes, jax.tree.leaves(variables))),
        "gradients": learned,
        "optimizer": copies * learned,
        "activations": sum(map(_bytes, kept_shapes)),
    }


def training_memory(config: Any, num_classes: int, batch: int) -> int:
    """Bytes that one forward and backward pass needs for `batch` images, according to the compiler.

    It counts parameters, statistics, gradients and intermediate maps; momentum is one more copy of the parameters.
    Compiling takes a minute or more for the large networks.
    """
    loss, variables, rest, image, keys = _training_loss(config, num_classes, batch)
    compiled = jax.jit(jax.grad(loss)).lower(variables["params"], rest, image, keys).compile()
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise ValueError("the compiler of this platform does not report how much memory a program needs")
    return sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes


def _training_loss(config: Any, num_classes: int, batch: int) -> tuple:
    """A scalar of the training forward pass, and the shapes of its arguments after `params`."""
    model = _model(config, num_classes)
    image = jax.ShapeDtypeStruct((batch, *config.data.crop, 3), jnp.uint8)
    _, variables, _ = _traced(model, (1, *config.data.crop, 3))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))

    def loss(params, rest, image, keys):
        variables = {"params": params, **rest}
        (logits, _), _ = model.apply(variables, image, train=True, dropout_keys=keys, mutable=["batch_stats"])
        return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

    rest = {name: value for name, value in variables.items() if name != "params"}
    return loss, variables, rest, image, keys


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * jnp.dtype(x.dtype).itemsize if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else 0


def table(description: dict[str, Any]) -> str:
    """The description as text: one line for each layer, then the totals."""
    lines = [
        f"{'layer':34} {'kind':8} {'kernel':>6} {'stride':>6} {'rate':>4} {'map':>16} {'parameters':>12} {'GFLOP':>8}"
    ]
    for layer in description["layers"]:
        shape = "x".join(map(str, layer["shape"]))
        stride = f"{layer['stride']:g}"
        lines.append(
            f"{layer['name']:34} {layer['kind']:8} {layer['kernel']:>6} {stride:>6} {layer['rate']:>4} {shape:>16} "
            f"{layer['parameters']:>12,} {layer['gflops']:>8.3f}"
        )
    height, width, classes = description["score_shape"]
    lines += [
        "",
        f"parameters       {description['parameters']:,}",
        f"output stride    {description['output_stride']}",
        f"score map        {height} x {width} x {classes}",
        f"receptive field  {description['receptive_field']} pixels",
        f"forward          {description['gflops']:.1f} GFLOP",
    ]
    if "training_step" in description:
        step = description["training_step"]
        parts = ", ".join(f"{name} {_gib(step[name])}" for name in STEP_PARTS)
        whole = sum(step[name] for name in STEP_PARTS)
        lines.append(f"training step    {_gib(whole)} for {step['images']} image(s): {parts}")
        if "compiled" in step:
            lines.append(f"                 {_gib(step['compiled'])} by the compiler, without the optimizer's")
    return "\n".join(lines)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def _output_stride(model: Any) -> int:
    """Pixels between scores: with a fine branch those of the trunk's map that it reads."""
    architecture = architecture_of(model)
    return 4 if architecture.fine_branch else architecture.output_stride


def _model(config: Any, num_classes: int) -> nn.Module:
    try:
        return create_model(config.model, num_classes)
    except ValueError as e:
        raise UserError(str(e)) from e


def _layer(module: nn.Module, x: jax.Array, result: Any) -> dict[str, Any]:
    layer = {"name": "/".join(module.path), "kind": "conv", "kernel": 1, "stride": 1, "rate": 1, "parameters": 0}
    # ConvWeights are computed together with their neighbors; the map has the input's size.
    shape = (*x.shape[:3], module.features) if isinstance(module, ConvWeights) else result.shape
    flops = 0
    if isinstance(module, Conv | ConvWeights):
        bias = getattr(module, "use_bias", True)
        layer |= {"kernel": module.kernel, "stride": getattr(module, "stride", 1), "rate": module.rate}
        layer["parameters"] = module.kernel**2 * x.shape[-1] * module.features + bias * module.features
        flops = 2 * math.prod(shape) * module.kernel**2 * x.shape[-1]
    elif isinstance(module, Pool):
        layer |= {"kind": module.kind, "kernel": module.window, "stride": module.stride}
    else:
        # It reads two positions of its input map: a window of 2, and a finer map after it.
        layer |= {"kind": "upsample", "kernel": 2, "stride": (x.shape[1] - 1) / max(shape[1] - 1, 1)}
    return {**layer, "shape": list(shape[1:]), "gflops": flops / 1e9}
