"""Each call of pydensecrf (PyPI: pydensecrf2) and its equivalent, as docs/crf.md lists them."""

from pathlib import Path

import numpy as np
import pytest

from deeplab_jax.crf import (
    CRFParams,
    kl_free_energy,
    mean_field,
    mean_field_features,
    unary_from_labels,
    unary_from_probabilities,
)

densecrf = pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not installed")
utils = pytest.importorskip("pydensecrf.utils", reason="pydensecrf2 is not installed")

HEIGHT, WIDTH, LABELS, ITERATIONS = 40, 50, 3, 5
VECTOR = np.array([-1.0, -2.0, -3.0], np.float32)
MATRIX = np.array([[-3, 3, 0.5], [1, -2, 0], [0.5, 0, -4]], np.float32)


@pytest.fixture(scope="module")
def photo():
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    truth = (x > 25).astype(int) + (y > 20)
    colours = np.array([[40, 80, 120], [150, 90, 60], [220, 200, 30]])
    image = np.clip(colours[truth] + rng.normal(0, 8, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)
    logits = rng.normal(0, 1, (HEIGHT, WIDTH, LABELS)) + np.eye(LABELS)[truth]
    return image, -np.log(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).astype(np.float32)


def theirs(photo, add, iterations=ITERATIONS):
    image, unary = photo
    crf = densecrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(-1, LABELS).T))
    add(crf, image)
    return np.array(crf.inference(iterations)).T.reshape(unary.shape)


def ours(photo, params, **options):
    image, unary = photo
    return np.asarray(mean_field(unary, image, params, ITERATIONS, bilateral="exact", **options))


def gaussian(weight):
    return CRFParams(0.0, 10.0, 20.0, weight, (3.0, 2.0))


def assert_same(theirs, ours, mean=3e-3):
    # Their lattice approximates the kernel; a wrong sign or convention moves marginals by 0.07 and more.
    assert np.abs(theirs - ours).mean() < mean
    assert (theirs.argmax(-1) != ours.argmax(-1)).mean() < 0.01


@pytest.mark.parametrize("kernel", ["CONST_KERNEL", "DIAG_KERNEL", "FULL_KERNEL"])
def test_gaussian_and_bilateral_with_a_number(photo, kernel):
    def add(crf, image):
        kind = getattr(densecrf, kernel)
        crf.addPairwiseGaussian(sxy=(3, 2), compat=3, kernel=kind)
        crf.addPairwiseBilateral(sxy=10, srgb=20, rgbim=image, compat=4, kernel=kind)

    assert_same(theirs(photo, add), ours(photo, CRFParams(4.0, 10.0, 20.0, 3.0, (3.0, 2.0))))


@pytest.mark.parametrize(
    ("theirs_name", "ours_name"),
    [("NORMALIZE_BEFORE", "before"), ("NORMALIZE_AFTER", "after"), ("NORMALIZE_SYMMETRIC", "symmetric")],
)
def test_normalizations(photo, theirs_name, ours_name):
    def add(crf, _):
        crf.addPairwiseGaussian(sxy=(3, 2), compat=2, normalization=getattr(densecrf, theirs_name))

    assert_same(theirs(photo, add), ours(photo, gaussian(2.0), normalization=ours_name), mean=8e-3)


def test_a_vector_is_subtracted_so_its_sign_turns(photo):
    got = theirs(photo, lambda crf, _: crf.addPairwiseGaussian(sxy=(3, 2), compat=VECTOR))
    assert_same(got, ours(photo, gaussian(-VECTOR)))


def test_a_matrix_is_a_symmetrized_penalty(photo):
    got = theirs(photo, lambda crf, _: crf.addPairwiseGaussian(sxy=(3, 2), compat=MATRIX))
    assert_same(got, ours(photo, gaussian(-0.5 * (MATRIX + MATRIX.T))))
    assert_same(got, ours(photo, gaussian(1.0), compatibility=0.5 * (MATRIX + MATRIX.T)))


def test_pairwise_energy_takes_features_with_points_first(photo):
    image, unary = photo
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    features = np.stack([x / 10, y / 10, *(image[..., c] / 20 for c in range(3))]).reshape(5, -1).astype(np.float32)
    got = theirs(photo, lambda crf, _: crf.addPairwiseEnergy(features, compat=4))
    q = mean_field_features(unary.reshape(-1, LABELS), [(features.T, 4.0)], ITERATIONS, bilateral="exact")
    assert_same(got.reshape(-1, LABELS), np.asarray(q))


def test_points_without_an_image(photo):
    _, unary = photo
    rng = np.random.default_rng(1)
    points, unary = rng.normal(0, 2, (2, 600)).astype(np.float32), unary.reshape(-1, LABELS)[:600]
    crf = densecrf.DenseCRF(600, LABELS)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.T))
    crf.addPairwiseEnergy(points, compat=3)
    q = mean_field_features(unary, [(points.T, 3.0)], ITERATIONS, bilateral="exact")
    assert_same(np.array(crf.inference(ITERATIONS)).T, np.asarray(q), mean=8e-3)


def test_features_that_their_helpers_make_are_positions_and_colours_divided_by_widths(photo):
    image, _ = photo
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    spatial = utils.create_pairwise_gaussian(sdims=(2, 3), shape=(HEIGHT, WIDTH))
    np.testing.assert_allclose(spatial, np.stack([y / 2, x / 3]).reshape(2, -1), rtol=1e-6)
    bilateral = utils.create_pairwise_bilateral(sdims=(10, 10), schan=(20, 20, 20), img=image, chdim=2)
    colours = (image / np.float32(20)).reshape(-1, 3).T
    np.testing.assert_allclose(bilateral, np.concatenate([np.stack([y, x]).reshape(2, -1) / 10, colours]), rtol=1e-5)


def test_unaries_of_their_helpers(photo):
    _, unary = photo
    probabilities = np.exp(-unary)
    wanted = utils.unary_from_softmax(probabilities.transpose(2, 0, 1)).T.reshape(unary.shape)
    np.testing.assert_allclose(unary_from_probabilities(probabilities), wanted, rtol=1e-4)
    labels = np.random.default_rng(2).integers(0, LABELS + 1, (HEIGHT, WIDTH))  # theirs: 0 is unknown
    wanted = utils.unary_from_labels(labels, LABELS, gt_prob=0.7, zero_unsure=True).T.reshape(unary.shape)
    ours = unary_from_labels(np.where(labels, labels - 1, 255), LABELS, 0.7, unknown=255)
    np.testing.assert_allclose(ours, wanted, rtol=1e-5)


def test_stepwise_inference_is_return_all_and_their_divergence_counts_pairs_twice(photo):
    image, unary = photo
    crf = densecrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    crf.setUnaryEnergy(np.ascontiguousarray(unary.reshape(-1, LABELS).T))
    crf.addPairwiseGaussian(sxy=(3, 2), compat=3)
    q, scratch, other = crf.startInference()
    history = ours(photo, gaussian(3.0), return_all=True)
    for expected in history:
        assert_same(np.array(q).T.reshape(unary.shape), expected)
        mine = np.array(q).T.reshape(unary.shape)
        # Half of their pairwise part is the divergence's; the rest differs by a constant, the Potts penalty of all.
        local = (mine * (unary + np.log(np.maximum(mine, 1e-20)))).sum()
        attraction = local - crf.klDivergence(q)
        constant = kl_free_energy(expected, unary, image, gaussian(3.0)) - (local - 0.5 * attraction)
        uniform = np.full_like(unary, 1 / LABELS)
        free = float(kl_free_energy(uniform, unary, image, gaussian(3.0)))
        pairs = (free - (uniform * (unary + np.log(uniform))).sum()) * LABELS / (LABELS - 1)
        np.testing.assert_allclose(constant, pairs, rtol=0.02)
        crf.stepInference(q, scratch, other)


def test_their_softmax_unary_clips_at_another_floor():
    probabilities = np.array([[0.0, 1e-9, 1e-7, 1e-5, 1 - 1e-5]], np.float32)
    theirs = utils.unary_from_softmax(probabilities.T).T
    np.testing.assert_allclose(unary_from_probabilities(probabilities, floor=1e-5), theirs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(unary_from_probabilities(probabilities)[0, :2], -np.log(1e-8), rtol=1e-6)


def documented(bold, **names):
    """Runs the example that follows **bold** in docs/crf.md; returns the names that it defines."""
    text = (Path(__file__).parents[2] / "docs" / "crf.md").read_text()
    code = text.split(f"**{bold}**")[1].split("```python\n")[1].split("```")[0]
    exec(compile(code, f"docs/crf.md: {bold}", "exec"), names)
    return names


def their_example(image, unary, add=None):
    crf = densecrf.DenseCRF2D(WIDTH, HEIGHT, LABELS)
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    if add:
        add(crf)
    else:
        crf.addPairwiseGaussian(sxy=(3, 3), compat=3)
        crf.addPairwiseBilateral(sxy=(80, 80), srgb=(13, 13, 13), rgbim=image, compat=10)
    return crf


def as_image(q):
    return np.array(q).T.reshape(HEIGHT, WIDTH, LABELS)


def test_their_example_from_labels(photo):
    image, unary = photo
    annotation = unary.argmin(-1)
    annotation[::3] = 255
    found = documented("From labels", image=image, annotation=annotation, num_classes=LABELS)
    theirs = np.where(annotation == 255, 0, annotation + 1)
    crf = their_example(image, utils.unary_from_labels(theirs, LABELS, gt_prob=0.7, zero_unsure=True))
    assert_same(as_image(crf.inference(5)), np.asarray(found["q"]), mean=8e-3)
    assert found["labels"].shape == (HEIGHT, WIDTH)


def test_their_example_of_an_image_that_is_not_rgb(photo):
    image, unary = photo
    probabilities, channel = np.exp(-unary), image[..., 0] / np.float32(255)

    def add(crf):
        features = utils.create_pairwise_bilateral((10, 10), (0.1,), img=channel[..., None], chdim=2)
        crf.addPairwiseEnergy(features, compat=10)

    found = documented("An image that is not RGB", probabilities=probabilities, channel=channel)
    crf = their_example(image, utils.unary_from_softmax(probabilities.transpose(2, 0, 1)), add)
    assert_same(as_image(crf.inference(5)), np.asarray(found["q"]).reshape(unary.shape), mean=8e-3)


def test_their_example_step_by_step(photo):
    image, unary = photo
    probabilities = np.exp(-unary)
    found = documented("Step by step", image=image, probabilities=probabilities)
    crf = their_example(image, utils.unary_from_softmax(probabilities.transpose(2, 0, 1)))
    q, scratch, other = crf.startInference()
    for expected in found["history"]:
        assert_same(as_image(q), np.asarray(expected), mean=8e-3)
        crf.stepInference(q, scratch, other)
    assert len(found["energies"]) == 6 and found["energies"][-1] < found["energies"][0]
