import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, energy, frank_wolfe, kl_free_energy, mean_field

REPULSIVE = np.eye(2, dtype=np.float32)  # penalizes equal neighbors: all pixels at once go from one label to the other


def oscillating(seed):
    rng = np.random.default_rng(seed)
    unary = rng.normal(0, 0.2, (8, 9, 2)).astype(np.float32)
    return unary, rng.integers(100, 110, (8, 9, 3)).astype(np.uint8), CRFParams(3.0, 3.0, 40.0, 3.0, 1.0)


def rounded_energy(case, iterations=10, compatibility=None, **options):
    unary, image, params = case
    q = mean_field(unary, image, params, iterations, bilateral="exact", compatibility=compatibility, **options)
    return float(energy(np.asarray(q.argmax(-1)), unary, image, params, compatibility=compatibility))


@pytest.mark.parametrize("regularizer", frank_wolfe.REGULARIZERS)
def test_lower_energy_where_the_parallel_update_oscillates(regularizer):
    for seed in (5, 6, 7):
        plain = rounded_energy(oscillating(seed), compatibility=REPULSIVE)
        options = {"regularizer": regularizer, "update": "frank_wolfe"}
        fw = rounded_energy(oscillating(seed), compatibility=REPULSIVE, **options)
        assert fw < plain - 50  # 104 to 108 lower


def test_no_higher_energy_where_the_parallel_update_settles(scene):
    for params in (CRFParams(2.0, 6.0, 30.0, 1.5, (1.5, 1.0)), CRFParams(6.0, 8.0, 13.0, 3.0, (1.5, 1.0))):
        case = scene.unary, scene.image, params
        assert rounded_energy(case, update="frank_wolfe") <= rounded_energy(case) + 1e-3


@pytest.mark.long
def test_no_higher_energy_on_a_photograph(small_case):
    case = small_case.unary, small_case.image, small_case.params
    plain = rounded_energy(case)
    assert rounded_energy(case, update="frank_wolfe") <= plain + 1e-6 * abs(plain)


def test_the_objective_never_rises():
    unary, image, params = oscillating(5)
    options = {"compatibility": REPULSIVE}
    history = mean_field(unary, image, params, 10, bilateral="exact", update="frank_wolfe", return_all=True, **options)
    free = np.array([kl_free_energy(q, unary, image, params, **options) for q in history])
    assert np.diff(free).max() <= 1e-5 * np.abs(free).max()
    assert free[-1] < free[0] - 0.02


def test_with_entropy_of_weight_one_it_is_mean_field_where_that_converges(scene):
    options = {"bilateral": "exact", "return_all": True}
    params = CRFParams(2.0, 6.0, 30.0, 1.5, (1.5, 1.0))
    plain, fw = (
        mean_field(scene.unary, scene.image, params, 3, update=update, **options)
        for update in ("parallel", "frank_wolfe")
    )
    np.testing.assert_allclose(plain, fw, atol=2e-5)


def test_less_regularization_leaves_less_doubt(scene):
    params = CRFParams(2.0, 6.0, 30.0, 1.5, (1.5, 1.0))
    run = lambda n: mean_field(  # noqa: E731
        scene.unary, scene.image, params, 5, bilateral="exact", update="frank_wolfe", regularization=n
    )
    assert float(run(0.1).max(-1).mean()) > 0.99 > float(run(3.0).max(-1).mean())


def test_projection_onto_the_simplex():
    values = np.random.default_rng(0).normal(0, 2, (200, 6)).astype(np.float32)
    got = np.asarray(frank_wolfe.project(jnp.asarray(values)))
    # Held, Wolfe and Crowder (1974): the level follows from the sorted values.
    falling = -np.sort(-values.astype(np.float64), axis=1)
    levels = (falling.cumsum(1) - 1) / np.arange(1, 7)
    level = levels[np.arange(200), (falling > levels).sum(1) - 1]
    np.testing.assert_allclose(got, np.maximum(values - level[:, None], 0), atol=1e-6)
    assert (got == 0).mean() > 0.5
    np.testing.assert_array_equal(np.asarray(frank_wolfe.project(jnp.zeros((1, 4)))), [[0.25] * 4])


@pytest.mark.parametrize("regularizer", frank_wolfe.REGULARIZERS)
def test_gradient_is_that_of_finite_differences(regularizer):
    unary, image, _ = oscillating(5)
    rng = np.random.default_rng(1)
    target, direction = (jnp.asarray(rng.normal(size=unary.shape), jnp.float32) for _ in range(2))

    @jax.jit
    def loss(unary, weight):
        weighted = CRFParams(weight, 3.0, 40.0, 3.0, 1.0)
        options = {"compatibility": REPULSIVE, "update": "frank_wolfe", "regularizer": regularizer}
        return (target * mean_field(unary, image, weighted, 3, bilateral="exact", regularization=2.0, **options)).sum()

    at = jnp.asarray(unary), jnp.float32(3.0)
    by_unary, by_weight = jax.grad(loss, (0, 1))(*at)
    step = 2e-3
    slope = (loss(at[0] + step * direction, at[1]) - loss(at[0] - step * direction, at[1])) / (2 * step)
    np.testing.assert_allclose((by_unary * direction).sum(), slope, rtol=0.02, atol=2e-3)
    slope = (loss(at[0], at[1] + 0.05) - loss(at[0], at[1] - 0.05)) / 0.1
    np.testing.assert_allclose(by_weight, slope, rtol=0.05, atol=2e-4)


def test_what_cannot_be_used_is_refused(scene):
    run = lambda **options: mean_field(scene.unary, scene.image, CRFParams(), update="frank_wolfe", **options)  # noqa: E731
    with pytest.raises(ValueError, match="normalization='after' makes the kernel asymmetric"):
        run(normalization="after")
    with pytest.raises(ValueError, match="regularizer='l2' must be one of entropy, euclidean"):
        run(regularizer="l2")
    for wrong in (0, -1.0, float("nan"), True, "1"):
        with pytest.raises(ValueError, match=r"regularization=.* must be a number above 0"):
            run(regularization=wrong)
    with pytest.raises(ValueError, match="regularization belong to update=\"frank_wolfe\"; this one is 'parallel'"):
        mean_field(scene.unary, scene.image, CRFParams(), regularization=2.0)


def test_marginals_become_exactly_0_and_1_with_the_euclidean_regularizer():
    image = np.zeros((6, 8, 3), np.uint8)
    unary = np.where(np.arange(3) == 1, 0, np.float32(9)) * np.ones((6, 8, 1), np.float32)
    options = {"bilateral": "exact", "normalization": "symmetric", "update": "frank_wolfe"}
    q = np.asarray(mean_field(unary, image, CRFParams(3.0, 5.0, 5.0), 5, regularizer="euclidean", **options))
    assert set(np.unique(q)) == {0.0, 1.0} and (q.argmax(-1) == 1).all()


@pytest.mark.parametrize("regularizer", ["entropy", "euclidean"])
@pytest.mark.parametrize("regularization", [1e-9, 1e-30])
def test_labels_ruled_out_and_a_weak_regularizer_stay_finite(regularizer, regularization):
    unary = np.random.default_rng(0).normal(size=(6, 8, 3)).astype(np.float32)
    unary[..., 0] = np.inf
    options = {"bilateral": "exact", "update": "frank_wolfe", "normalization": "symmetric"}
    q = mean_field(unary, np.zeros((6, 8, 3), np.uint8), CRFParams(3.0, 5.0, 5.0), 5, regularizer=regularizer,
                   regularization=regularization, **options)  # fmt: skip
    assert np.isfinite(q).all() and (np.asarray(q)[..., 0] == 0).all()
