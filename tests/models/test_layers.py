import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.models import layers


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


def test_frozen_batch_norm_takes_no_gradient_and_ignores_the_batch():
    norm = layers.BatchNorm(frozen=True)
    x = jax.random.normal(jax.random.key(0), (2, 3, 3, 4))
    variables = {
        "params": {"scale": jnp.full(4, 2.0), "bias": jnp.full(4, 0.5)},
        "batch_stats": {"mean": jnp.full(4, 0.1), "var": jnp.full(4, 4.0)},
    }
    np.testing.assert_allclose(norm.apply(variables, x, True), (x - 0.1) / np.sqrt(4 + 1e-5) * 2 + 0.5, atol=1e-5)
    grads = jax.grad(lambda v: jnp.sum(norm.apply(v, x, True) ** 2))(variables)
    assert all((g == 0).all() for g in jax.tree.leaves(grads))


def test_trained_batch_norm_is_synchronized():
    x = jax.random.normal(jax.random.key(0), (4, 2, 5, 3, 2)) * jnp.arange(1.0, 5)[:, None, None, None, None]
    variables = layers.BatchNorm(frozen=False).init(jax.random.key(1), x[0], True)
    whole, state = layers.BatchNorm(frozen=False).apply(variables, x.reshape(8, 5, 3, 2), True, mutable=["batch_stats"])
    norm = layers.BatchNorm(frozen=False, axis_name="devices")
    run = jax.vmap(lambda x: norm.apply(variables, x, True, mutable=["batch_stats"]), axis_name="devices")
    parts, states = run(x)
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-5)
    for one, all_ in zip(jax.tree.leaves(state), jax.tree.leaves(states), strict=True):
        np.testing.assert_allclose(all_, jnp.broadcast_to(one, all_.shape), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["batch_stats"]["mean"], 0.1 * x.mean((0, 1, 2, 3)), atol=1e-6)


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
