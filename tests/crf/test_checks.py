from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deeplab_jax.crf import PRESETS, CRFParams, energy, kl_free_energy, mean_field, mean_field_features
from deeplab_jax.crf.unary import unary_from_labels, unary_from_logits, unary_from_probabilities

UNARY = np.zeros((4, 5, 3), np.float32)
IMAGE = np.full((4, 5, 3), 100, np.uint8)
NAN = np.where(np.arange(3) == 1, np.nan, UNARY).astype(np.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((NAN, IMAGE, CRFParams()), {}, "unary holds NaN"),
        ((jnp.asarray(NAN), IMAGE, CRFParams()), {}, "unary holds NaN"),
        ((jnp.asarray(UNARY), jnp.full((4, 5, 3), jnp.nan), CRFParams()), {}, "image holds NaN"),
        ((UNARY, IMAGE, CRFParams()), {"return_all": [1, 11]}, "numbers of iterations, 0 to 10"),
        ((UNARY, IMAGE, CRFParams()), {"return_all": 3}, "return_all=3 must be True, False or numbers"),
        ((UNARY, IMAGE, CRFParams()), {"return_all": "13"}, "return_all='13' must be"),
        ((UNARY[0], IMAGE, CRFParams()), {}, r"unary has shape \(5, 3\); needed: \[H, W, C\]"),
        ((UNARY[..., :1], IMAGE, CRFParams()), {}, "at least 2 labels"),
        ((UNARY.astype(int), IMAGE, CRFParams()), {}, "unary must be an array of floats"),
        ((UNARY, IMAGE[:3], CRFParams()), {}, r"image must be RGB of shape \(4, 5, 3\)"),
        ((UNARY, IMAGE[..., :2], CRFParams()), {}, "image must be RGB"),
        ((UNARY, IMAGE * np.float32(np.inf), CRFParams()), {}, "image holds NaN or infinite"),
        ((UNARY, IMAGE, CRFParams()), {"return_log": "no"}, "return_log='no' must be True or False"),
        ((UNARY, IMAGE, CRFParams()), {"prune": "no"}, "prune='no' must be True or False"),
        ((UNARY, IMAGE, CRFParams(bilateral_rgb_std=0.0)), {}, "bilateral_rgb_std=0.0 must be greater than 0"),
        ((UNARY, IMAGE, CRFParams(gaussian_xy_std=-1.0)), {}, "gaussian_xy_std=-1.0 must be greater than 0"),
        ((UNARY, IMAGE, CRFParams(bilateral_weight=np.nan)), {}, "bilateral_weight=nan must be finite"),
        ((UNARY, IMAGE, CRFParams(bilateral_weight=np.ones(4))), {}, r"bilateral_weight has shape \(4,\)"),
        ((UNARY, IMAGE, CRFParams(), -1), {}, "iterations=-1 must be at least 0"),
        ((UNARY, IMAGE, CRFParams(), 1.5), {}, "iterations=1.5 must be a whole number"),
        ((UNARY, IMAGE, CRFParams()), {"normalization": "both"}, "normalization='both' must be one of none"),
        ((UNARY, IMAGE, CRFParams()), {"bilateral": "fast"}, "bilateral='fast' must be one of auto"),
        ((UNARY, IMAGE, CRFParams()), {"update": "serial"}, "update='serial' must be one of parallel"),
        ((UNARY, IMAGE, CRFParams()), {"compatibility": np.eye(2)}, r"compatibility has shape \(2, 2\)"),
        ((UNARY, IMAGE, CRFParams()), {"mask": np.ones(4)}, r"mask must have shape \(4, 5\)"),
        ((UNARY, IMAGE, CRFParams()), {"cutoff": 1.5}, "cutoff=1.5 must lie between 0 and 1"),
        ((UNARY, IMAGE, CRFParams()), {"cutoff": "a"}, "cutoff=a must lie between 0 and 1"),
        ((UNARY, IMAGE, CRFParams()), {"include_self": "no"}, "include_self='no' must be True or False"),
        ((UNARY, IMAGE, CRFParams()), {"storage_dtype": jnp.int32}, "storage_dtype=.*int32.* must be a type of floats"),
        (
            (UNARY, IMAGE, CRFParams()),
            {"storage_dtype": "half a byte"},
            "storage_dtype='half a byte' must be a type",
        ),
        ((UNARY, IMAGE, CRFParams()), {"bilateral": ["exact"]}, r"bilateral=\['exact'\] must be one of auto"),
        ((UNARY, IMAGE, PRESETS["v2_resnet101"]), {}, r"params must be CRFParams, not Setting; .*\.params"),
        ((UNARY, IMAGE, {"bilateral_weight": 1.0}), {}, "params must be CRFParams, not dict"),
        ((UNARY, IMAGE * 1j, CRFParams()), {}, "image must be an array of real numbers, not complex"),
        ((UNARY, IMAGE.astype(str), CRFParams()), {}, "image must be an array of real numbers, not <U"),
        ((UNARY, IMAGE, CRFParams()), {"mask": np.full((4, 5), "no")}, r"mask must have shape \(4, 5\)"),
        ((UNARY, IMAGE, CRFParams()), {"kernels": [(UNARY, 1.0, 2)]}, "kernels must be pairs of features and a weight"),
        ((UNARY, IMAGE, CRFParams()), {"kernels": (UNARY, 1.0)}, "kernels must be pairs of features and a weight"),
        ((UNARY, IMAGE, CRFParams()), {"kernels": [(UNARY * 1j, 1.0)]}, r"kernels\[0\]\[0\] must be an array of real"),
        ((UNARY, IMAGE, CRFParams()), {"kernels": [(UNARY[0], 1.0)]}, r"kernels\[0\]\[0\] must be features"),
        ((UNARY, IMAGE, CRFParams()), {"kernels": [(UNARY, np.nan)]}, r"kernels\[0\]\[1\] holds NaN"),
        (
            (UNARY, IMAGE, CRFParams()),
            {"kernels": [(UNARY, "a")]},
            r"kernels\[0\]\[1\] must consist of numbers",
        ),
        (
            (UNARY, IMAGE, CRFParams()),
            {"compatibility": np.full((3, 3), np.inf)},
            "compatibility holds NaN or inf",
        ),
    ],
)
def test_says_which_argument_is_wrong(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        mean_field(*arguments, **options)


def test_numbers_of_any_kind_are_numbers():
    """NumPy's and JAX's, and kernels that can be read only once."""
    rng = np.random.default_rng(0)
    unary, image = rng.uniform(0, 3, (4, 5, 3)).astype(np.float32), rng.integers(0, 255, (4, 5, 3))
    expected = mean_field(unary, image, CRFParams(), 2, cutoff=0.5, include_self=False, kernels=[(unary, 2.0)])
    found = mean_field(unary, image, CRFParams(), 2, cutoff=jnp.float32(0.5), include_self=np.False_,
                       kernels=zip([unary], [2.0], strict=True))  # fmt: skip
    np.testing.assert_array_equal(found, expected)
    mean_field(unary, image, CRFParams(), 2, update="frank_wolfe", regularization=np.float32(0.5))


@pytest.mark.parametrize("bilateral", ("exact", "separable", "permutohedral"))
def test_weights_may_be_lists_and_tuples(bilateral):
    rng = np.random.default_rng(0)
    unary, image = rng.uniform(0, 3, (4, 5, 3)).astype(np.float32), rng.integers(0, 255, (4, 5, 3))
    each = (1.0, 2.0, 0.5)
    expected = mean_field(unary, image, CRFParams(np.float32(each), 9.0, 20.0), 3, bilateral=bilateral)
    for weight in (each, list(each), np.diag(each).tolist()):
        for prune in (None, True, False):
            found = mean_field(unary, image, CRFParams(weight, 9.0, 20.0), 3, bilateral=bilateral, prune=prune)
            np.testing.assert_allclose(found, expected, atol=1e-5)
    labels, params = unary.argmin(-1), CRFParams(each, 9.0, 20.0)
    expected = energy(labels, unary, image, CRFParams(np.float32(each), 9.0, 20.0), kernels=[(unary, np.float32(each))])
    np.testing.assert_allclose(energy(labels, unary, image, params, kernels=[(unary, each)]), expected, rtol=1e-6)


def test_points_need_points():
    unary = np.zeros((6, 2), np.float32)
    with pytest.raises(ValueError, match='bilateral="separable" needs rows and columns'):
        mean_field_features(unary, [(unary, 1.0)], bilateral="separable")
    with pytest.raises(ValueError, match=r"kernels\[0\]\[0\] holds NaN"):
        mean_field_features(unary, [(unary * np.nan, 1.0)])


@pytest.mark.parametrize("image", [IMAGE / np.float32(255), np.ones_like(IMAGE)])
def test_an_image_in_0_to_1_draws_a_warning(image):
    with pytest.warns(UserWarning, match="image lies in 0..1"):
        mean_field(UNARY, image, CRFParams(), 0)


@pytest.mark.parametrize("unary", [[[1.0, 2.0], [3.0]], None, "unary"])
def test_a_unary_is_an_array_of_numbers(unary):
    message = f"unary must be an array of real numbers, not {type(unary).__name__}"
    with pytest.raises(ValueError, match=message):
        mean_field(unary, IMAGE, CRFParams())
    with pytest.raises(ValueError, match=message):
        mean_field_features(unary, [(np.zeros((2, 1), np.float32), 1.0)])
    with pytest.raises(ValueError, match=message):
        kl_free_energy(np.asarray(UNARY), unary, IMAGE, CRFParams())


def test_shapes_are_checked_and_values_not_inside_jit():
    run = jax.jit(lambda u, i: mean_field(u, i, CRFParams(), 1))
    assert np.isnan(run(NAN, IMAGE)).any()
    with pytest.raises(ValueError, match="image must be RGB"):
        run(UNARY, IMAGE[:2])


def test_unary_from_logits_and_probabilities():
    logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(unary_from_logits(logits), -np.log(p), rtol=1e-5)
    np.testing.assert_allclose(unary_from_probabilities(p), -np.log(p), rtol=1e-5)
    floored = unary_from_probabilities(np.array([1, 0], np.float16))
    np.testing.assert_allclose(floored, [0, -np.log(1e-8)], rtol=1e-5)
    with pytest.raises(ValueError, match="probabilities hold values that are negative"):
        unary_from_probabilities(np.array([1.0, -0.1]))
    for unary in (unary_from_logits, unary_from_probabilities):
        for shape in ((), (2, 0)):
            with pytest.raises(ValueError, match=r"needed: \[..., C\] with at least one label"):
                unary(np.zeros(shape, np.float32))
    for floor in (0, 1e-40, np.inf, np.nan, "'a'"):
        with pytest.raises(ValueError, match=f"floor={floor}"):
            unary_from_probabilities(p, floor=floor.strip("'") if isinstance(floor, str) else floor)
    np.testing.assert_array_equal(unary_from_logits(logits.tolist()), unary_from_logits(logits))
    np.testing.assert_array_equal(unary_from_logits(np.array([[1e300, 0.0], [1e300, 1e300]]))[0], [0, np.inf])
    with pytest.raises(ValueError, match="logits must be floats, not int"):
        unary_from_logits([[1, 2]])
    for odd in ([0, np.inf], [0, np.nan], [-np.inf, -np.inf]):
        with pytest.raises(ValueError, match=r"logits hold NaN or \+inf, or only -inf"):
            unary_from_logits(np.float32([[0, 1], odd]))
    np.testing.assert_array_equal(unary_from_logits(np.float32([[0, -np.inf]])), [[0, np.inf]])


def test_either_byte_order():
    rng = np.random.default_rng(0)
    unary, image = rng.uniform(0, 3, (4, 5, 3)).astype(np.float32), rng.integers(0, 255, (4, 5, 3)).astype(np.uint16)
    expected = mean_field(unary, image, CRFParams(), 2)
    np.testing.assert_array_equal(mean_field(unary.astype(">f4"), image.astype(">u2"), CRFParams(), 2), expected)
    p = np.exp(-unary)
    np.testing.assert_array_equal(unary_from_probabilities(p.astype(">f4")), unary_from_probabilities(p))


@pytest.mark.parametrize("xp", [np, jnp])
def test_an_unknown_id_is_not_wrapped_into_narrow_labels(xp):
    known = unary_from_labels(xp.asarray([255], dtype=xp.uint8), 256, confidence=0.7, unknown=-1)
    np.testing.assert_allclose(np.exp(-np.asarray(known))[0, 255], 0.7, rtol=1e-5)
    with pytest.raises(ValueError, match="labels hold -1"):
        unary_from_labels(xp.asarray([-1], dtype=xp.int8), 3, unknown=255)


def test_unary_from_labels():
    unary = unary_from_labels(np.array([0, 2, 255], np.uint8), 3, confidence=0.8)
    np.testing.assert_allclose(np.exp(-unary), [[0.8, 0.1, 0.1], [0.1, 0.1, 0.8], [1 / 3] * 3], rtol=1e-5)
    with pytest.raises(ValueError, match=r"labels hold 3; with 3 classes they are 0..2 or 255 \(unknown\)"):
        unary_from_labels(np.array([0, 3]), 3)
    with pytest.raises(ValueError, match=r"labels hold 255; with 3 classes they are 0\.\.2"):
        unary_from_labels(np.array([255]), 3, unknown=None)
    with pytest.raises(ValueError, match=r"confidence=1\.0 must lie between"):
        unary_from_labels(np.array([0]), 3, confidence=1.0)
    with pytest.raises(ValueError, match=r"num_classes=2\.5 must be a whole number"):
        unary_from_labels(np.array([0]), 2.5)
    far = 2**32 + 1  # as a 32-bit number it would be label 1
    np.testing.assert_allclose(unary_from_labels(np.array([0, far]), 3, unknown=far)[1], np.log(3), rtol=1e-6)


def test_unaries_of_the_hosts_arrays_are_those_of_jaxs():
    logits = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float16)
    labels = np.array([[0, 3], [255, 2]], np.uint8)
    for function, values, options in (
        (unary_from_logits, logits, {}),
        (unary_from_logits, logits.astype(np.float64), {}),
        (unary_from_probabilities, abs(logits), {}),
        (unary_from_labels, labels, {"num_classes": 4}),
    ):
        host, device = function(values, **options), jax.jit(partial(function, **options))(jnp.asarray(values))
        assert isinstance(host, jax.Array) and host.dtype == device.dtype == np.float32
        np.testing.assert_allclose(host, device, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="not finite"):
        unary_from_probabilities(jnp.array([1.0, jnp.inf]))
    with pytest.raises(ValueError, match="not finite"):
        unary_from_probabilities(np.array([1.0, np.nan]))


def test_labels_beyond_the_classes_have_no_energy():
    for wrong in (3, -1):
        labels = np.zeros((4, 5), int)
        labels[1, 2] = wrong
        with pytest.raises(ValueError, match=r"labels hold ids outside 0\.\.2"):
            energy(labels, UNARY, IMAGE, CRFParams())


def test_labels_under_the_mask_do_not_count():
    rng = np.random.default_rng(0)
    unary, image = rng.uniform(0, 3, (4, 5, 3)).astype(np.float32), rng.integers(0, 255, (4, 5, 3))
    labels, mask = rng.integers(0, 3, (4, 5)), rng.uniform(size=(4, 5)) > 0.3
    expected = energy(labels, unary, image, CRFParams(), mask=mask)
    void = np.where(mask, labels, 255)
    np.testing.assert_allclose(energy(void, unary, image, CRFParams(), mask=mask), expected, rtol=1e-6)
    void[mask] = 255
    with pytest.raises(ValueError, match=r"labels hold ids outside 0\.\.2"):
        energy(void, unary, image, CRFParams(), mask=mask)


def test_the_free_energy_refuses_what_mean_field_refuses():
    unary, image = np.zeros((4, 6, 3), np.float32), np.zeros((4, 6, 3), np.uint8)
    q = np.full((4, 6, 3), 1 / 3, np.float32)
    for features, words in (
        (np.zeros((6, 4, 2)), "must be features of shape"),
        (np.full((4, 6, 2), np.nan), "holds NaN or infinite values"),
    ):
        for function in (mean_field, partial(kl_free_energy, q)):
            with pytest.raises(ValueError, match=rf"kernels\[0\]\[0\] {words}"):
                function(unary, image, CRFParams(), kernels=[(features, 1.0)])
    with pytest.raises(ValueError, match=r"bilateral_weight has shape \(1,\)"):
        kl_free_energy(q, unary, image, CRFParams(bilateral_weight=np.ones(1)))


def test_the_free_energy_has_a_gradient_where_labels_are_ruled_out():
    unary = jnp.asarray([[[0.5, 1.0, jnp.inf], [0.2, 0.1, 0.7]]])
    image, params = np.zeros((1, 2, 3), np.uint8), CRFParams(1.0, 3.0, 5.0, 0.5, 2.0)
    q = jnp.asarray([[[0.25, 0.75, 0.0], [0.5, 0.25, 0.25]]])
    by_unary, by_q = jax.grad(lambda u, q: kl_free_energy(q, u, image, params), (0, 1))(unary, q)
    np.testing.assert_array_equal(by_unary, q)
    assert np.isfinite(by_q).all()


def test_features_and_weights_beyond_float32_are_refused():
    unary, features = np.zeros((3, 2)), np.arange(6.0).reshape(3, 2)
    for kernels, message in (
        ([(features, 1e39)], "must lie between -1e"),
        ([(features * 1e300, 1.0)], "must lie between -1e.15 and 1e.15"),
        ([(np.float32(features * 1e30), 1.0)], "must lie between -1e.15 and 1e.15"),
    ):
        with pytest.raises(ValueError, match=message):
            mean_field_features(unary, kernels)
    with pytest.raises(ValueError, match=r"compatibility must lie between -1e\+06 and 1e\+06"):
        mean_field_features(unary, [(features, 1.0)], compatibility=1e39 * (1 - np.eye(2)))


@pytest.mark.parametrize("kind", [np.float16, jnp.float16, jnp.bfloat16, np.int8])
def test_narrow_types_are_within_limits_that_they_do_not_hold(kind):
    unary, features, weight = np.zeros((3, 2)), np.arange(6).reshape(3, 2).astype(kind), np.ones((), kind)
    found = mean_field_features(unary, [(features, weight)], compatibility=(1 - np.eye(2)).astype(kind))
    np.testing.assert_allclose(found, 0.5, atol=1e-6)
