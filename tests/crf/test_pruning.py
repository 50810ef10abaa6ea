"""Labels that cannot win are left out, and nothing else changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, mean_field, pruning

PARAMS = CRFParams(4.0, 20.0, 10.0, 3.0, 2.0)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 255, (3, 4, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    logits = rng.normal(size=(24, 32, 9)) * 0.5 - 6
    likely = np.array([1, 4, 7])
    logits[..., likely] += 6 + 2 * rng.normal(size=(3, 4, 3)).repeat(8, 0).repeat(8, 1)
    return jnp.asarray(-logits, jnp.float32), image


def test_candidates(case):
    unary, _ = case
    _, kept = pruning.candidates(-unary.reshape(-1, 9))
    np.testing.assert_array_equal(np.flatnonzero(kept), [1, 4, 7])


def test_a_label_that_wins_anywhere_is_kept():
    logits = np.zeros((50, 40), np.float32)
    logits[:, 0] = 8
    logits[3, 0], logits[3, 17] = 0, 0.01  # nearly uniform there: marginal 0.025
    _, kept = pruning.candidates(jnp.asarray(logits))
    np.testing.assert_array_equal(np.flatnonzero(kept), [0, 17])


def test_same_labels_and_close_marginals(case):
    unary, image = case
    plain, pruned = (mean_field(unary, image, PARAMS, 5, bilateral="exact", prune=p) for p in (False, True))
    np.testing.assert_allclose(pruned.sum(-1), 1, atol=1e-5)
    assert (plain.argmax(-1) != pruned.argmax(-1)).mean() <= 0.0005
    assert float(jnp.abs(plain - pruned).mean()) < 1e-3


def test_off_where_gradients_are_taken(case):
    unary, image = case

    def loss(prune):
        return lambda u: (mean_field(u, image, PARAMS, 2, bilateral="exact", prune=prune) ** 2).sum()

    np.testing.assert_allclose(jax.grad(loss(True))(unary), jax.grad(loss(False))(unary), rtol=1e-5, atol=1e-6)
