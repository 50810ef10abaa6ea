import jax
import jax.numpy as jnp
import numpy as np

from deeplab_jax.crf import separable


def test_is_the_mean_of_both_orders_of_row_and_column_filters(definition):
    rng = np.random.default_rng(0)
    features, values = rng.normal(size=(6 * 7, 3)), rng.random((6 * 7, 2))
    kernel = definition.kernel(features)
    structure = separable.build(jnp.asarray(features, jnp.float32), grid=(6, 7))
    out = separable.apply(structure, jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(out, definition.separable(kernel, 7) @ values, rtol=1e-5)


def test_equals_the_exact_filter_where_only_position_counts(definition):
    y, x = np.divmod(np.arange(54), 9)
    features = np.stack([x / 2.0, y / 1.5], 1)
    values = np.random.default_rng(0).random((54, 2))
    out = separable.apply(
        separable.build(jnp.asarray(features, jnp.float32), grid=(6, 9)), jnp.asarray(values, jnp.float32)
    )
    # A row's kernel has no vertical part and a column's no horizontal one, so together they make the full kernel.
    np.testing.assert_allclose(out, definition.kernel(features) @ values, rtol=1e-5)


def test_gradient_of_the_features():
    rng = np.random.default_rng(0)
    features, values = (jnp.asarray(rng.normal(size=(20, n)), jnp.float32) for n in (3, 2))

    @jax.jit
    @jax.value_and_grad
    def loss(f):
        return (separable.apply(separable.build(f, grid=(4, 5)), values) ** 2).sum()

    direction = jnp.asarray(rng.normal(size=features.shape), jnp.float32)
    numeric = (loss(features + 1e-2 * direction)[0] - loss(features - 1e-2 * direction)[0]) / 2e-2
    np.testing.assert_allclose((loss(features)[1] * direction).sum(), numeric, rtol=5e-3)
