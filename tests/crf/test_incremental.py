"""Splatting only what changed gives the marginals of splatting everything."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, kernels, mean_field, permutohedral

PARAMS = CRFParams(4.0, 8.0, 20.0, 3.0, 2.0)


@pytest.fixture(scope="module")
def lattice(scene):
    return jax.jit(permutohedral.build)(kernels.bilateral_features(scene.image.astype(np.float32), PARAMS))


@pytest.fixture(scope="module")
def reference(scene, definition, lattice):
    """Marginals after 0..6 iterations: a lattice each in turn and all for the last; and all of them each time."""
    unary = scene.unary.reshape(-1, 4)
    count = lattice.lattices
    apply = jax.jit(permutohedral.apply)
    norm = apply(lattice, np.ones((len(unary), 1), np.float32)) ** -0.5
    _, spatial = definition.image_kernels(scene.image, PARAMS)
    spatial = definition.normalized(spatial, "symmetric")

    def update(q, turn):
        bilateral = norm * apply(lattice, norm * q, turn)
        return definition.softmax(-unary + PARAMS.bilateral_weight * bilateral + PARAMS.gaussian_weight * spatial @ q)

    q = everything = definition.softmax(-unary)
    turns = [q]
    for n in range(6):
        turns.append(update(q, None))
        q = update(q, n % count)
        everything = update(everything, None)
    return [t.reshape(scene.unary.shape) for t in turns], everything.reshape(scene.unary.shape)


def traced(scene, iterations, **options):
    """Inside a jit, where the lattice is built and used by one program."""
    run = jax.jit(
        lambda unary: mean_field(unary, scene.image, PARAMS, iterations, bilateral="permutohedral", **options)
    )
    return run(scene.unary)


def check(ours, wanted):
    # The tolerance times the weight bounds the change of a logit.
    assert np.abs(ours - wanted).max() < 7 * permutohedral.TOLERANCE
    assert np.abs(ours - wanted).mean() < permutohedral.TOLERANCE


@pytest.mark.long
@pytest.mark.parametrize("iterations", [1, 6])
def test_marginals_equal_those_of_computing_everything_anew(scene, reference, iterations):
    check(traced(scene, iterations), reference[0][iterations])


@pytest.mark.long
def test_all_marginals_are_those_of_each_number_of_iterations(scene, reference):
    """And lattices in turn come close to all of them in each iteration, as in the plain call."""
    ours = traced(scene, 6, return_all=True)
    assert ours.shape == (7, *scene.unary.shape)
    for one, wanted in zip(ours, reference[0], strict=True):
        check(one, wanted)
    assert np.abs(ours[6] - reference[1]).mean() < 0.01
    assert (ours[6].argmax(-1) != reference[1].argmax(-1)).mean() < 0.02
    plain = mean_field(scene.unary, scene.image, PARAMS, 6, bilateral="permutohedral")
    assert 1e-4 < np.abs(ours[6] - plain).mean() < 0.03  # the plain call has a lattice closer to the definition


@pytest.mark.parametrize("return_all", [False, pytest.param(True, marks=pytest.mark.long)])
def test_gradients_are_those_of_the_exact_sum(scene, return_all):
    """Of the unary, the weights and the compatibility; the lattice approximates the sum, so their directions agree."""

    def loss(bilateral):
        def of(unary, w1, w2, compatibility):
            q = mean_field(
                unary, scene.image, PARAMS.replace(bilateral_weight=w1, gaussian_weight=w2), 3, bilateral=bilateral,
                compatibility=compatibility, return_all=return_all,
            )  # fmt: skip
            return -jnp.log(jnp.take_along_axis(q, scene.truth[..., None] + jnp.zeros_like(q, int)[..., :1], -1)).mean()

        arguments = jnp.asarray(scene.unary), jnp.float32(4.0), jnp.float32(3.0), jnp.float32(1 - np.eye(4))
        return jax.jit(jax.grad(of, (0, 1, 2, 3)))(*arguments)

    for ours, exact in zip(loss("permutohedral"), loss("exact"), strict=True):
        assert np.abs(exact).max() > 0
        cosine = (ours * exact).sum() / np.sqrt((ours**2).sum() * (exact**2).sum())
        assert cosine > 0.95
        np.testing.assert_allclose(np.linalg.norm(ours), np.linalg.norm(exact), rtol=0.2)


def test_only_changes_beyond_the_tolerance_are_splatted(scene, lattice):
    rng = np.random.default_rng(0)
    count = scene.unary[..., 0].size
    factor = rng.uniform(size=(count, 1)).astype(np.float32)
    state = permutohedral.start(lattice, 4, lattice.rooms[0])
    advance, apply = jax.jit(permutohedral.advance), jax.jit(permutohedral.apply)
    for n in range(lattice.lattices):
        values = rng.uniform(0.1, 1, (count, 4)).astype(np.float32)
        state, out = advance(lattice, state, values, factor, n)
        np.testing.assert_allclose(out, apply(lattice, values * factor, n), rtol=1e-4)
        moved = values.copy()
        moved[::3] += permutohedral.TOLERANCE / 2
        moved[1::7] += 1
        state, out = advance(lattice, state, moved, factor, n)
        sent = np.where((np.abs(moved - values) > permutohedral.TOLERANCE).any(1, keepdims=True), moved, values)
        np.testing.assert_allclose(state.values[n], sent, rtol=1e-6)
        np.testing.assert_allclose(out, apply(lattice, sent * factor, n), rtol=1e-4)
