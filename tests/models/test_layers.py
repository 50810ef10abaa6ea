import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models import layers
from deeplab_jax.models.cpu import convolution


def caffe_pool(x, window, stride, pad, kind):
    """Caffe's pooling_layer.cpp, loop by loop, for [H, W]."""
    sizes = []
    for n in x.shape:
        out = int(np.ceil((n + 2 * pad - window) / stride)) + 1
        if pad and (out - 1) * stride >= n + pad:
            out -= 1
        sizes.append(out)
    result = np.zeros(sizes)
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            top, left = i * stride - pad, j * stride - pad
            bottom, right = min(top + window, x.shape[0] + pad), min(left + window, x.shape[1] + pad)
            area = (bottom - top) * (right - left)
            values = x[max(top, 0) : min(bottom, x.shape[0]), max(left, 0) : min(right, x.shape[1])]
            result[i, j] = values.max() if kind == "max" else values.sum() / area
    return result


@pytest.mark.parametrize("kind", ["max", "average"])
@pytest.mark.parametrize(("window", "stride", "pad"), [(3, 2, 1), (2, 2, 1), (2, 1, 0), (3, 1, 1), (3, 2, 0)])
def test_pool_is_caffes(kind, window, stride, pad):
    x = np.random.default_rng(0).normal(size=(13, 10)).astype(np.float32) - 5  # negative: zero padding would win
    pool = layers.Pool(window, stride, pad, kind)
    got = pool.apply({}, x[None, :, :, None])[0, :, :, 0]
    np.testing.assert_allclose(got, caffe_pool(x, window, stride, pad, kind), rtol=1e-5)


@pytest.mark.parametrize(
    ("window", "sizes"),
    # 500 x 375 through three pools of stride 2; Caffe rounds up where others round down.
    [(3, [(251, 188), (126, 95), (64, 48)]), (2, [(251, 188), (126, 95), (64, 48)])],
)
def test_pool_sizes_of_a_photograph(window, sizes):
    size = (500, 375)
    for expected in sizes:
        size = tuple(layers.pooled_size(n, window, 2, 1) for n in size)
        assert size == expected


def test_pool_sizes_where_scores_align():
    sizes = [321]
    for _ in range(3):
        sizes.append(layers.pooled_size(sizes[-1], 3, 2, 1))
    assert sizes == [321, 161, 81, 41]


def test_resize_goldens():
    row = jnp.asarray([0.0, 3.0, 6.0])[None, :, None]
    zoomed = layers.resize_bilinear(row, (1, 7))[0, :, 0]
    np.testing.assert_allclose(zoomed, [0, 1, 2, 3, 4, 5, 6], atol=1e-6)
    square = jnp.asarray([[0.0, 1.0], [2.0, 3.0]])[..., None]
    np.testing.assert_allclose(
        layers.resize_bilinear(square, (3, 3))[..., 0], [[0, 0.5, 1], [1, 1.5, 2], [2, 2.5, 3]], atol=1e-6
    )


def test_resize_by_whole_steps_copies():
    x = jax.random.normal(jax.random.key(0), (2, 321, 33, 3))
    assert (layers.resize_bilinear(x, (161, 17)) == x[:, ::2, ::2]).all()
    label = np.random.default_rng(0).choice([0, 7, 255], size=(321, 321, 1)).astype(np.uint8)
    assert (np.asarray(layers.resize_bilinear(label, (41, 41))) == label[::8, ::8]).all()


def test_resize_keeps_the_corners_and_the_coarse_positions():
    x = jax.random.normal(jax.random.key(0), (1, 6, 5, 2))
    y = layers.resize_bilinear(x, (41, 33))  # zoom by 8
    np.testing.assert_allclose(y[:, ::8, ::8], x, atol=1e-6)


def test_resize_of_one_position_is_constant():
    assert (layers.resize_bilinear(jnp.full((1, 1, 1, 2), 3.0), (4, 5)) == 3).all()


@pytest.mark.parametrize("size", [(14, 27), (5, 4), (7, 9)])
def test_half_pixel_resize_is_pytorchs(size):
    functional = pytest.importorskip("torch.nn.functional", reason="PyTorch is not installed")
    import torch

    x = np.random.default_rng(0).normal(size=(1, 7, 9, 2)).astype(np.float32)
    wanted = functional.interpolate(torch.from_numpy(x.transpose(0, 3, 1, 2)), size=size, mode="bilinear")
    got = layers.resize_bilinear(jnp.asarray(x), size, "half_pixel")
    np.testing.assert_allclose(got, wanted.numpy().transpose(0, 2, 3, 1), atol=1e-5)


def test_half_pixel_resize_goldens():
    row = jnp.asarray([0.0, 3.0, 6.0])[None, :, None]
    zoomed = layers.resize_bilinear(row, (1, 6), "half_pixel")[0, :, 0]
    np.testing.assert_allclose(zoomed, [0, 0.75, 2.25, 3.75, 5.25, 6], atol=1e-6)
    # 5 positions at a scale of 0.5 are 2; with the scale's own step they are read at 0.5 and 2.5, not at 0.75 and 3.25
    ramp = jnp.arange(5.0)[None, :, None]
    np.testing.assert_allclose(layers.resize_bilinear(ramp, (1, 2), "half_pixel", step=2)[0, :, 0], [0.5, 2.5])
    np.testing.assert_allclose(layers.resize_bilinear(ramp, (1, 2), "half_pixel")[0, :, 0], [0.75, 3.25])


class Normalized(nn.Module):
    """A convolution and its batch norm."""

    norm: layers.BatchNorm
    rate: int = 1

    @nn.compact
    def __call__(self, x, train):
        return self.norm(layers.Conv(4, 3, rate=self.rate, use_bias=False, name="conv"), x, train)


def normalized_variables(x):
    """Variables of `Normalized` with statistics and an affine that are not those it begins with."""
    kernel = jax.random.normal(jax.random.key(3), (3, 3, x.shape[-1], 4))
    return {
        "params": {
            "conv": {"kernel": kernel},
            "norm": {"scale": jnp.array([2.0, -1.0, 0.5, 1.0]), "bias": jnp.array([0.5, 0.0, -1.0, 2.0])},
        },
        "batch_stats": {"norm": {"mean": jnp.array([0.1, -2.0, 0.0, 3.0]), "var": jnp.array([4.0, 1.0, 0.2, 9.0])}},
    }


@pytest.mark.parametrize(("frozen", "train"), [(True, True), (True, False), (False, False)])
def test_stored_statistics_normalize_what_the_convolution_gives(frozen, train):
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    variables = normalized_variables(x)
    y = convolution.plain_conv(x, variables["params"]["conv"]["kernel"], 1, 2)
    p, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
    expected = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * p["scale"] + p["bias"]
    model = Normalized(layers.BatchNorm(frozen, name="norm"), rate=2)
    np.testing.assert_allclose(jax.jit(model.apply, static_argnums=2)(variables, x, train), expected, atol=1e-4)


def test_frozen_batch_norm_takes_no_gradient_and_ignores_the_batch():
    x = jax.random.normal(jax.random.key(0), (2, 7, 6, 3))
    variables = normalized_variables(x)
    model = Normalized(layers.BatchNorm(frozen=True, name="norm"))
    apply = jax.jit(model.apply, static_argnums=2)
    whole = apply(variables, x, True)
    np.testing.assert_allclose(whole[:1], apply(variables, x[:1], True), atol=1e-5)
    grads = jax.jit(jax.grad(lambda v: jnp.sum(model.apply(v, x, True) ** 2)))(variables)
    kernel = grads["params"].pop("conv")["kernel"]
    assert all((g == 0).all() for g in jax.tree.leaves(grads))

    def plain(kernel):
        p, stats = variables["params"]["norm"], variables["batch_stats"]["norm"]
        y = (convolution.plain_conv(x, kernel, 1, 1) - stats["mean"]) / jnp.sqrt(stats["var"] + 1e-5)
        return jnp.sum((y * p["scale"] + p["bias"]) ** 2)

    expected = jax.jit(jax.grad(plain))(variables["params"]["conv"]["kernel"])
    np.testing.assert_allclose(kernel, expected, rtol=1e-4, atol=1e-3)


def test_trained_batch_norm_is_synchronized():
    x = jax.random.normal(jax.random.key(0), (4, 2, 5, 3, 2)) * jnp.arange(1.0, 5)[:, None, None, None, None]
    model = Normalized(layers.BatchNorm(frozen=False, name="norm"))
    variables = jax.jit(model.init, static_argnums=2)(jax.random.key(1), x[0], True)
    apply = jax.jit(lambda variables, x: model.apply(variables, x, True, mutable=["batch_stats"]))
    whole, state = apply(variables, x.reshape(8, 5, 3, 2))
    parallel = Normalized(layers.BatchNorm(frozen=False, axis_name="devices", name="norm"))
    run = jax.vmap(lambda x: parallel.apply(variables, x, True, mutable=["batch_stats"]), axis_name="devices")
    parts, states = jax.jit(run)(x)
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-5)
    for one, all_ in zip(jax.tree.leaves(state), jax.tree.leaves(states), strict=True):
        np.testing.assert_allclose(all_, jnp.broadcast_to(one, all_.shape), rtol=1e-5, atol=1e-6)
    y = convolution.plain_conv(x.reshape(8, 5, 3, 2), variables["params"]["conv"]["kernel"], 1, 1)
    np.testing.assert_allclose(state["batch_stats"]["norm"]["mean"], 0.1 * y.mean((0, 1, 2)), atol=1e-6)
    np.testing.assert_allclose(whole.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(whole.var((0, 1, 2)), 1, atol=1e-3)


def test_relu_and_its_gradient():
    x = jnp.array([-2.0, -0.0, 0.0, 0.125, 3.0])
    np.testing.assert_array_equal(layers.relu(x), [0, 0, 0, 0.125, 3])
    np.testing.assert_array_equal(jax.grad(lambda x: (layers.relu(x) * jnp.arange(1.0, 6)).sum())(x), [0, 0, 0, 4, 5])


def test_dropout_belongs_to_the_example():
    drop = layers.Dropout(0.5)
    keys = jax.random.split(jax.random.key(0), 4)
    x = jnp.ones((4, 8, 8, 16))
    y = drop.apply({}, x, True, keys)
    order = jnp.asarray([2, 0, 3, 1])
    assert (drop.apply({}, x, True, keys[order]) == y[order]).all()
    assert set(np.unique(y)) == {0.0, 2.0}
    assert abs(float(y.mean()) - 1) < 0.05
    assert (drop.apply({}, x, False, keys) == x).all()
    assert (drop.apply({}, x, True, rngs={"dropout": jax.random.key(1)}) != x).any()


def test_relu_keeps_nan_and_its_gradient_is_the_step():
    x = jnp.array([-1.0, -0.0, 0.0, 2.0, jnp.nan, jnp.inf])
    np.testing.assert_array_equal(layers.relu(x), [0, 0, 0, 2, np.nan, np.inf])
    np.testing.assert_array_equal(jax.grad(lambda v: layers.relu(v)[:4].sum())(x), [0, 0, 0, 1, 0, 0])
