"""Splatting only what changed gives the marginals of splatting everything."""

import jax
import numpy as np

from deeplab_jax.crf import CRFParams, mean_field, permutohedral

PARAMS = CRFParams(4.0, 8.0, 20.0, 3.0, 2.0)


def test_marginals_equal_those_of_computing_everything_anew(scene):
    everything = mean_field(scene.unary, scene.image, PARAMS, 6, bilateral="permutohedral", return_all=True)
    last = mean_field(scene.unary, scene.image, PARAMS, 6, bilateral="permutohedral")
    # `return_all` computes anew. The tolerance times the weight bounds the change of a logit.
    assert np.abs(last - everything[-1]).max() < 7 * permutohedral.TOLERANCE
    assert np.abs(last - everything[-1]).mean() < permutohedral.TOLERANCE


def test_only_changes_beyond_the_tolerance_are_splatted():
    rng = np.random.default_rng(0)
    lattice = jax.jit(permutohedral.build)(rng.uniform(0, 3, (300, 3)).astype(np.float32))
    values = rng.uniform(0.1, 1, (300, 5)).astype(np.float32)
    factor = rng.uniform(size=(300, 1)).astype(np.float32)
    state, out = permutohedral.advance(lattice, permutohedral.start(lattice, 5, 1), values, factor)
    np.testing.assert_allclose(out, permutohedral.apply(lattice, values * factor), rtol=1e-4)
    moved = values.copy()
    moved[::3] += permutohedral.TOLERANCE / 2
    moved[1::7] += 1
    state, out = permutohedral.advance(lattice, state, moved, factor)
    sent = np.where((np.abs(moved - values) > permutohedral.TOLERANCE).any(1, keepdims=True), moved, values)
    np.testing.assert_allclose(state.values, sent, rtol=1e-6)
    np.testing.assert_allclose(out, permutohedral.apply(lattice, sent * factor), rtol=1e-4)
