"""One question, for which platform a program is traced, and the forms that follow from the answer."""

from types import SimpleNamespace

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import exact, gaussian
from deeplab_jax.crf.kernels import choose_bilateral
from deeplab_jax.models import create_model
from deeplab_jax.models.cpu import convolution
from deeplab_jax.target import ANY, platform, tracing_for


def primitives(function, *args) -> set[str]:
    """Names of all operations in a function's program, inner ones included."""
    found = set()

    def look(jaxpr):
        for equation in jaxpr.eqns:
            found.add(equation.primitive.name)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                look(inner)

    look(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_the_platform_is_the_backends_unless_said_otherwise():
    assert platform() == jax.default_backend()
    with tracing_for("tpu"):
        assert platform() == "tpu"
        with tracing_for(("cuda", "rocm")):
            assert platform() == "gpu"
        with tracing_for(["cpu", "cuda", "tpu"]):
            assert platform() == ANY
        assert platform() == "tpu"
    with jax.default_device(jax.devices("cpu")[0]):
        assert platform() == "cpu"


def test_what_was_traced_for_one_platform_is_not_taken_for_another():
    traced = []

    @jax.jit
    def function(x):
        traced.append(platform())
        return x

    for name in ("cpu", "tpu", "cpu", "gpu"):
        with tracing_for(name):
            function.trace(1.0)
    assert traced == ["cpu", "tpu", "gpu"]


@pytest.mark.parametrize(("name", "scatters"), [("cpu", False), ("gpu", False), ("tpu", True)])
def test_only_tpus_scatter_the_gradient_of_a_max_pool(name, scatters):
    x = jnp.zeros((1, 9, 9, 2))
    with tracing_for(name):
        found = primitives(jax.grad(lambda x: convolution.max_pool(x, 3, 2, ((1, 1), (1, 1))).sum()), x)
    assert any("scatter" in primitive for primitive in found) == scatters


@pytest.mark.parametrize("std", [1.5, 6.0])
@pytest.mark.parametrize("width", [40, gaussian.DENSE + 60])
def test_the_smoothness_filter_is_products_off_cpus(std, width):
    values = jnp.asarray(np.random.default_rng(0).random((20 * width, 2), np.float32))
    radius = (int(4.5 * std), int(4.5 * std))

    def apply(values):
        return gaussian.apply(gaussian.build(20, width, std, radius=radius), values)

    on_cpu = jax.jit(apply)(values)
    for name in ("gpu", "tpu"):
        with tracing_for(name):
            assert "dot_general" in primitives(apply, values)
            np.testing.assert_allclose(jax.jit(apply)(values), on_cpu, rtol=1e-5)
    with tracing_for(["cpu", "tpu"]):
        np.testing.assert_allclose(jax.jit(apply)(values), on_cpu, rtol=1e-5)


def test_exact_filter_has_few_tiles_on_gpus():
    features = jnp.zeros((187_500, 5))
    for name, tiles in (("cpu", 367), ("gpu", 37), ("tpu", 367)):
        with tracing_for(name):
            shape = jax.eval_shape(exact.build, features).features.shape
        assert shape[0] == tiles and shape[0] * shape[1] >= 187_500


def test_auto_follows_the_platform():
    chosen = {name: choose_bilateral("auto", 100, 100, name) for name in ("cpu", "gpu", "tpu")}
    assert chosen == {"cpu": "permutohedral", "gpu": "exact", "tpu": "permutohedral"}
    with tracing_for("gpu"):
        assert choose_bilateral("auto", 100, 100) == "exact"
    with tracing_for(["cpu", "gpu"]):
        assert choose_bilateral("auto", 100, 100) == "permutohedral"


def equations(jaxpr):
    """Those of a program and of the programs that it calls."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("name", ["default", "high", "highest"])
def test_matmul_precision_reaches_products_and_their_gradients(name):
    config = SimpleNamespace(
        backbone="resnet_small", widths=(4, 4), blocks=(1, 1), head_width=4, batch_norm="frozen", matmul_precision=name
    )
    model = create_model(config, 3)
    image = jnp.zeros((1, 33, 33, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), image)

    def loss(params):
        return model.apply({**variables, "params": params}, image)[0].sum()

    expected = {"default": None, "high": jax.lax.Precision.HIGH, "highest": jax.lax.Precision.HIGHEST}[name]
    with tracing_for("tpu"):
        program = jax.make_jaxpr(jax.grad(loss))(variables["params"])
    found = [e.params["precision"] for e in equations(program.jaxpr) if e.primitive.name == "conv_general_dilated"]
    assert len(found) > 6
    assert all(p == (None if expected is None else (expected, expected)) for p in found)
