"""Splatting only what changed gives the marginals of splatting everything."""

import jax
import numpy as np

from deeplab_jax.crf import CRFParams, kernels, mean_field, permutohedral

PARAMS = CRFParams(4.0, 8.0, 20.0, 3.0, 2.0)


def test_marginals_equal_those_of_computing_everything_anew(scene, definition):
    """One lattice for each iteration, in turn, and all of them for the last."""
    features, iterations = kernels.bilateral_features(scene.image.astype(np.float32), PARAMS), 6
    unary = scene.unary.reshape(-1, 4)
    lattice = jax.jit(permutohedral.build)(features)
    alone = [one_lattice(lattice, n) for n in range(permutohedral.LATTICES)]
    norm = permutohedral.apply(lattice, np.ones((len(unary), 1), np.float32)) ** -0.5
    _, spatial = definition.image_kernels(scene.image, PARAMS)
    spatial = definition.normalized(spatial, "symmetric")

    def update(q, filtered):
        bilateral = norm * np.mean([permutohedral.apply(f, norm * q) for f in filtered], axis=0)
        return definition.softmax(-unary + PARAMS.bilateral_weight * bilateral + PARAMS.gaussian_weight * spatial @ q)

    q = definition.softmax(-unary)
    for n in range(iterations - 1):
        q = update(q, [alone[n % permutohedral.LATTICES]])
    q = update(q, alone)
    ours = mean_field(scene.unary, scene.image, PARAMS, iterations, bilateral="permutohedral").reshape(-1, 4)
    # The tolerance times the weight bounds the change of a logit.
    assert np.abs(ours - q).max() < 7 * permutohedral.TOLERANCE
    assert np.abs(ours - q).mean() < permutohedral.TOLERANCE


def test_lattices_in_turn_come_close_to_all_of_them_in_each_iteration(scene):
    turns = mean_field(scene.unary, scene.image, PARAMS, 6, bilateral="permutohedral")
    everything = mean_field(scene.unary, scene.image, PARAMS, 6, bilateral="permutohedral", return_all=True)[-1]
    assert np.abs(turns - everything).mean() < 0.01
    assert (turns.argmax(-1) != everything.argmax(-1)).mean() < 0.02


def test_only_changes_beyond_the_tolerance_are_splatted():
    rng = np.random.default_rng(0)
    both = jax.jit(permutohedral.build)(rng.uniform(0, 3, (300, 3)).astype(np.float32))
    factor = rng.uniform(size=(300, 1)).astype(np.float32)
    state = permutohedral.start(both, 5, 1)
    for n in range(permutohedral.LATTICES):
        alone = one_lattice(both, n)
        values = rng.uniform(0.1, 1, (300, 5)).astype(np.float32)
        state, out = permutohedral.advance(both, state, values, factor, n)
        np.testing.assert_allclose(out, permutohedral.apply(alone, values * factor), rtol=1e-4)
        moved = values.copy()
        moved[::3] += permutohedral.TOLERANCE / 2
        moved[1::7] += 1
        state, out = permutohedral.advance(both, state, moved, factor, n)
        sent = np.where((np.abs(moved - values) > permutohedral.TOLERANCE).any(1, keepdims=True), moved, values)
        np.testing.assert_allclose(state.values[n], sent, rtol=1e-6)
        np.testing.assert_allclose(out, permutohedral.apply(alone, sent * factor), rtol=1e-4)


def one_lattice(both, n):
    """One of the lattices, as a filter of its own."""
    vertices, weights = jax.tree.map(lambda x: x[n][None], (both.vertices, both.weights))
    return both.replace(vertices=vertices, weights=weights, count=both.count, scale=permutohedral.LATTICES * both.scale)
