import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import CRFParams, MeanFieldCRF, learned, mean_field
from deeplab_jax.crf.layer import filter_for

START = CRFParams(2.0, 12.0, 30.0, 1.5, 3.0)
ALL = ("weights", "compatibility", "stds")


@pytest.mark.parametrize("learn", [(), ("weights", "compatibility"), ALL])
def test_starts_as_mean_field_with_the_given_parameters(scene, learn):
    module = MeanFieldCRF(4, START, iterations=3, bilateral="exact", learn=learn, per_class_weights=True, stride=2)
    q, variables = module.init_with_output(jax.random.key(0), scene.unary, scene.image)
    expected = mean_field(scene.unary, scene.image, START.at_stride(2), 3, bilateral="exact", normalization="after")
    np.testing.assert_allclose(q, expected, atol=1e-5)
    shapes = jax.tree.map(jnp.shape, variables.get("params", {}))
    expected_shapes = {}
    if "weights" in learn:
        expected_shapes |= {"bilateral_weight": (4,), "gaussian_weight": (4,), "compatibility": (4, 4)}
    if "stds" in learn:
        expected_shapes |= {f"log_{n}": () for n in ("bilateral_xy_std", "bilateral_rgb_std", "gaussian_xy_std")}
    assert shapes == expected_shapes


def test_every_learnable_parameter_has_a_gradient_and_training_lowers_the_loss(scene):
    module = MeanFieldCRF(4, START, iterations=2, bilateral="exact", learn=ALL)
    variables = module.init(jax.random.key(0), scene.unary, scene.image)

    @jax.jit
    @jax.value_and_grad
    def loss(variables):
        log_q = module.apply(variables, scene.unary, scene.image, return_log=True)
        return -jnp.take_along_axis(log_q, jnp.asarray(scene.truth)[..., None], -1).mean()

    before, gradient = loss(variables)
    assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(gradient))
    moved = jax.tree.map(lambda v, g: v - 0.05 * g, variables, gradient)
    assert loss(moved)[0] < before


def test_learned_parameters_go_back_into_mean_field(scene):
    module = MeanFieldCRF(4, START, iterations=2, bilateral="exact", learn=ALL)
    variables = module.init(jax.random.key(0), scene.unary, scene.image)
    variables = jax.tree.map(lambda v: v * 1.1, variables)
    params, compatibility = learned(variables, START)
    q = mean_field(
        scene.unary, scene.image, params, 2, bilateral="exact", normalization="after", compatibility=compatibility
    )
    np.testing.assert_allclose(module.apply(variables, scene.unary, scene.image), q, atol=1e-5)


def test_widths_are_not_learned_through_the_lattice(scene):
    module = MeanFieldCRF(4, START, bilateral="permutohedral", learn=("stds",))
    with pytest.raises(ValueError, match='bilateral="permutohedral" has no gradient'):
        module.init(jax.random.key(0), scene.unary, scene.image)
    with pytest.raises(ValueError, match="'everything'"):
        MeanFieldCRF(4, START, learn=("everything",)).init(jax.random.key(0), scene.unary, scene.image)


def test_one_name_instead_of_a_tuple_is_refused():
    with pytest.raises(ValueError, match=r"learn='weights' must be a tuple of names, as in \('weights',\)"):
        filter_for("weights", "auto")


def test_the_unarys_classes_are_the_layers(scene):
    with pytest.raises(ValueError, match=r"unary has 4 classes, the CRF num_classes=9"):
        MeanFieldCRF(9, START, learn=("weights",)).init(jax.random.key(0), scene.unary, scene.image)
