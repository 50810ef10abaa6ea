import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, convergent, energy, kl_free_energy, mean_field

# This compatibility favors a checkerboard: it penalizes equal neighbours, so it is not negative semi-definite.
REPULSIVE = np.eye(2, dtype=np.float32)


def two_label_case():
    rng = np.random.default_rng(5)
    unary = rng.normal(0, 0.2, (8, 9, 2)).astype(np.float32)
    image = rng.integers(100, 110, (8, 9, 3)).astype(np.uint8)
    return unary, image, CRFParams(3.0, 3.0, 40.0, 3.0, 1.0)


def free_energies(unary, image, params, update, iterations=12, **options):
    history = mean_field(unary, image, params, iterations, bilateral="exact", update=update, return_all=True, **options)
    return np.array([kl_free_energy(q, unary, image, params, **options) for q in history])


@pytest.mark.parametrize(
    "options",
    [
        {"compatibility": REPULSIVE, "normalization": "symmetric"},
        pytest.param({"compatibility": REPULSIVE, "normalization": "none"}, marks=pytest.mark.long),
        {"include_self": False, "normalization": "symmetric"},
    ],
    ids=["repulsive_symmetric", "repulsive_none", "no_self"],
)
def test_never_raises_the_free_energy_where_the_plain_update_does(options):
    unary, image, params = two_label_case()
    if "include_self" in options:
        # Two pixels that repel: without i = j they swap their labels at every plain update.
        unary = unary[:1, :2] * 0 + np.array([0.4, -0.4], np.float32)[None, :, None] * np.array([1, -1], np.float32)
        image, params = np.full((1, 2, 3), 100, np.uint8), CRFParams(0.0, 3.0, 40.0, 12.0, 3.0)
        unary = unary.astype(np.float32)
    plain = free_energies(unary, image, params, "parallel", **options)
    convergent_ = free_energies(unary, image, params, "convergent", **options)
    tolerance = 1e-5 * np.abs(plain).max()
    assert np.diff(plain).max() > 100 * tolerance
    assert np.diff(convergent_).max() <= tolerance
    assert convergent_[-1] < convergent_[0] - 10 * tolerance
    assert convergent_[-1] <= plain[-1] + tolerance


def test_is_the_plain_update_where_that_converges(scene):
    params = CRFParams(2.0, 6.0, 30.0, 1.5, (1.5, 1.0))
    options = {"bilateral": "exact", "return_all": True}
    plain, careful = (
        mean_field(scene.unary, scene.image, params, 3, update=update, **options)
        for update in ("parallel", "convergent")
    )
    np.testing.assert_allclose(plain, careful, atol=1e-4)
    energies = [float(kl_free_energy(q, scene.unary, scene.image, params)) for q in plain]
    assert np.diff(energies).max() < 1e-3


@pytest.mark.parametrize(("labels", "spread"), [(6, 5), (2, 1), (21, 30), (21, 1000)])
@pytest.mark.parametrize("d", [0.0, 0.3, 7.0, 2000.0, 1e5])
def test_the_pixel_problem_is_solved(d, labels, spread):
    h = jnp.asarray(np.random.default_rng(0).normal(0, spread, (50, labels)), jnp.float32)
    p = np.asarray(convergent.solve(h, jnp.full((50, 1), d)), np.float64)
    np.testing.assert_allclose(np.exp(p).sum(1), 1, atol=1e-5)
    # Stationary: p + d exp(p) - h is the same for all labels of a pixel.
    rest = p + d * np.exp(p) - np.asarray(h)
    rest = np.where(p > -80, rest, rest.max(1, keepdims=True))  # float32 has no smaller q
    assert np.ptp(rest, axis=1).max() < 2e-4 * max(1 + d, 0.1 * spread)


@pytest.mark.parametrize("d", [0.3, 30.0, 3e4])
def test_the_pixel_problems_gradient_is_the_finite_difference(d):
    with jax.enable_x64(True):
        rng = np.random.default_rng(1)
        h, d, weights = jnp.asarray(rng.normal(0, 20, (3, 5))), jnp.full((3, 1), d), rng.normal(size=(3, 5))
        value = jax.jit(lambda h, d: (jnp.exp(convergent.solve(h, d)) * weights).sum())
        by_h, by_d = jax.grad(value, (0, 1))(h, d)
        for gradient, at in ((by_h, 0), (by_d, 1)):
            direction = jnp.asarray(rng.normal(size=gradient.shape))
            ends = [value(*((h + e * direction, d) if at == 0 else (h, d + e * direction))) for e in (1e-5, -1e-5)]
            slope = float(ends[0] - ends[1]) / 2e-5
            assert float((gradient * direction).sum()) == pytest.approx(slope, abs=1e-9)


@pytest.mark.parametrize("normalization", ["none", "symmetric"])
def test_strong_repulsion_gives_finite_marginals(normalization):
    """A compatibility that rewards a label's neighbors of other labels, unnormalized: d is in the thousands."""
    image = np.full((20, 20, 3), 128, np.uint8)
    unary = np.random.default_rng(0).normal(size=(20, 20, 2)).astype(np.float32)
    options = {"bilateral": "exact", "update": "convergent", "normalization": normalization}
    q = mean_field(unary, image, CRFParams(4, 67, 3, 3, 1), 5, compatibility=0.5 * np.eye(2), **options)
    np.testing.assert_allclose(np.asarray(q).sum(-1), 1, atol=1e-5)


@pytest.mark.parametrize("normalization", ["before", "after"])
def test_asymmetric_normalizations_are_refused(scene, normalization):
    params = CRFParams()
    with pytest.raises(ValueError, match=f"normalization='{normalization}' makes the kernel asymmetric"):
        mean_field(scene.unary, scene.image, params, update="convergent", normalization=normalization)
    with pytest.raises(ValueError, match="makes the kernel asymmetric"):
        kl_free_energy(scene.unary, scene.unary, scene.image, params, normalization=normalization)


def test_an_asymmetric_compatibility_is_refused(scene):
    compatibility = np.arange(16.0).reshape(4, 4)
    with pytest.raises(ValueError, match="not symmetric in the labels"):
        mean_field(scene.unary, scene.image, CRFParams(), update="convergent", compatibility=compatibility)


def test_energy_counts_each_pair_of_different_pixels_once(definition):
    rng = np.random.default_rng(0)
    image, unary = rng.integers(0, 90, (3, 4, 3)), rng.random((3, 4, 3)).astype(np.float32)
    labels = rng.integers(0, 3, (3, 4))
    compatibility = np.array([[0.5, 1, 2], [1, 0.25, 3], [2, 3, 0.0]])
    params = CRFParams(2.0, 5.0, 30.0, 1.0, 1.0)
    for given, normalization in ((None, "symmetric"), (compatibility, "none")):
        mu = 1 - np.eye(3) if given is None else given
        a, b = (definition.normalized(k, normalization) for k in definition.image_kernels(image, params))
        pairs = (2 * a + b) * mu[labels.ravel()][:, labels.ravel()]
        expected = unary.reshape(-1, 3)[np.arange(12), labels.ravel()].sum() + np.triu(pairs, 1).sum()
        options = {"normalization": normalization, "compatibility": given}
        np.testing.assert_allclose(energy(labels, unary, image, params, **options), expected, rtol=1e-5)


def test_free_energy_counts_own_pairs_only_on_request(definition):
    rng = np.random.default_rng(0)
    image, unary = rng.integers(0, 90, (3, 4, 3)), rng.random((3, 4, 2)).astype(np.float32)
    q = np.asarray(jax.nn.softmax(rng.normal(size=(3, 4, 2)).astype(np.float32)))
    params = CRFParams(2.0, 5.0, 30.0, 1.0, 1.0)
    flat = q.reshape(-1, 2)
    for include_self in (True, False):
        a, b = (definition.normalized(k, "symmetric", include_self) for k in definition.image_kernels(image, params))
        different = 1 - flat @ flat.T
        expected = (flat * (unary.reshape(-1, 2) + np.log(flat))).sum() + 0.5 * ((2 * a + b) * different).sum()
        got = kl_free_energy(q, unary, image, params, include_self=include_self)
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    batch = kl_free_energy(np.stack([q, q]), np.stack([unary] * 2), np.stack([image] * 2), params, include_self=False)
    np.testing.assert_allclose(batch, [expected] * 2, rtol=1e-5)
