"""Labels that win nowhere are left out, and nothing else changes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from deeplab_jax.crf import PRESETS, CRFParams, mean_field, mean_field_features, pruning

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


def test_masked_pixels_have_no_say(case):
    unary, image = case
    mask = np.ones((24, 32), bool)
    mask[20:] = False
    logits = -unary.at[20:, :, 3].set(0)  # a label that wins there alone
    _, kept = pruning.candidates(logits.reshape(-1, 9), jnp.asarray(mask).reshape(-1))
    np.testing.assert_array_equal(np.flatnonzero(kept), [1, 4, 7])
    options = {"bilateral": "permutohedral", "mask": mask}
    plain, pruned = (mean_field(-logits, image, PARAMS, 5, prune=p, **options) for p in (False, True))
    assert (plain[:20].argmax(-1) != pruned[:20].argmax(-1)).mean() <= 0.0005
    assert float(jnp.abs(plain - pruned)[:20].mean()) < 1e-3
    np.testing.assert_allclose(pruned[20:], 1 / 9, rtol=1e-5)  # as ever where the mask is False


def test_same_labels_and_close_marginals(case):
    unary, image = case
    plain, pruned = (mean_field(unary, image, PARAMS, 5, bilateral="exact", prune=p) for p in (False, True))
    np.testing.assert_allclose(pruned.sum(-1), 1, atol=1e-5)
    assert (plain.argmax(-1) != pruned.argmax(-1)).mean() <= 0.0005
    assert float(jnp.abs(plain - pruned).mean()) < 1e-3


@pytest.mark.parametrize("traced", [False, True])
def test_off_where_labels_repel_themselves(traced):
    """Unlikely labels are then the likeliest in the end: pixels avoid what their neighbors are."""
    image = np.full((10, 12, 3), 128, np.uint8)
    p = np.full((10, 12, 21), 1e-5, np.float32)
    p[..., 0], p[..., 1] = 0.95, 0.05
    params = CRFParams(-3.0, 20.0, 15.0, -2.0, 2.0)
    run = lambda w, prune: mean_field(-np.log(p), image, params.replace(bilateral_weight=w), 40, prune=prune)  # noqa: E731
    run = jax.jit(run, static_argnames="prune") if traced else run
    whole, pruned = (run(np.float32(-3), prune=prune) for prune in (False, True))
    np.testing.assert_allclose(pruned, whole, atol=1e-4)
    if not traced:
        plain = [
            mean_field(-np.log(p), image, params, 40, prune=prune, bilateral="permutohedral") for prune in (False, None)
        ]
        np.testing.assert_allclose(plain[1], plain[0], atol=1e-4)


@pytest.mark.parametrize("update", ["convergent", "frank_wolfe"])
def test_off_with_other_updates(update):
    """They return log q: the labels left out would keep a share that is not theirs."""
    image = np.full((10, 12, 3), 128, np.uint8)
    p = np.full((10, 12, 21), 0.025, np.float32)
    p[..., 0] = 0.5
    options = {"bilateral": "exact", "normalization": "symmetric", "update": update}
    whole, pruned = (mean_field(-np.log(p), image, PARAMS, 5, prune=prune, **options) for prune in (False, True))
    np.testing.assert_allclose(pruned, whole, atol=1e-5)
    assert float(whole[..., 0].min()) > 0.9


def test_off_where_gradients_are_taken(case):
    unary, image = case

    def loss(prune):
        return lambda u: (mean_field(u, image, PARAMS, 2, bilateral="exact", prune=prune) ** 2).sum()

    pruned, plain = (jax.jit(jax.grad(loss(prune)))(unary) for prune in (True, False))
    np.testing.assert_allclose(pruned, plain, rtol=1e-5, atol=1e-6)


def plausible_unary(label, classes, rng):
    """-log P such as a network of stride 8 might give: the classes' shares of cells, with errors, enlarged."""
    height, width = (n // 8 * 8 for n in label.shape)
    present = np.eye(classes + 1)[np.minimum(label[:height, :width], classes)][..., :classes]
    shares = present.reshape(height // 8, 8, width // 8, 8, classes).mean((1, 3))
    logits = np.log(shares + 0.002) + rng.normal(0, 0.7, shares.shape)
    logits = jax.image.resize(jnp.asarray(logits, jnp.float32), (*label.shape, classes), "bilinear")
    return -jax.nn.log_softmax(logits)


def cost(unary, image, params):
    """Percent of labels changed by pruning, and mean |dQ|."""
    plain, pruned = (mean_field(unary, image, params, 10, bilateral="permutohedral", prune=p) for p in (False, True))
    return 100 * float((plain.argmax(-1) != pruned.argmax(-1)).mean()), float(jnp.abs(plain - pruned).mean())


@pytest.mark.long
def test_cost_on_the_exact_case(small_case):
    """That of the whole photograph is in test_mean_field."""
    changed, difference = cost(small_case.unary, small_case.image, small_case.params)
    assert changed <= 0.05
    assert difference <= 2e-3


@pytest.mark.long
def test_cost_on_photographs(test_data):
    folder = test_data / "camvid"
    names = sorted(path.name for path in (folder / "val").iterdir())[::5][:20]
    rng = np.random.default_rng(0)
    costs = []
    for name in names:
        image = np.asarray(Image.open(folder / "val" / name).convert("RGB"))
        label = np.asarray(Image.open((folder / "valannot" / name).with_suffix(".png")))
        label = np.where(label < 11, label, 255)
        unary = plausible_unary(label, 21, rng)  # as from a network of 21 classes: CamVid's 11, and 10 that never occur
        costs.append(cost(unary, image, PRESETS["v2_resnet101"].params))
    changed, difference = np.mean(costs, 0)
    assert len(costs) == 20
    assert difference > 0  # labels were dropped
    assert changed <= 0.05
    assert difference <= 2e-3


def test_a_label_that_is_second_everywhere_is_kept():
    """Confident noise of twenty labels cancels in the filter; the one that all pixels hold a little wins."""
    rng = np.random.default_rng(0)
    p = np.full((40, 40, 40), 0.002 / 38, np.float32)
    p[..., 0] = 0.108
    np.put_along_axis(p, rng.integers(1, 21, (40, 40, 1)), 0.89, axis=-1)
    image = np.full((40, 40, 3), 128, np.uint8)
    params = CRFParams(30.0, 20.0, 10.0, 3.0, 3.0)
    assert p.max(axis=(0, 1))[0] < pruning.RATIO * p.max()
    plain = partial(mean_field, iterations=5, bilateral="permutohedral")
    traced = jax.jit(lambda unary, image: plain(unary, image, params, prune=True))
    for q in (plain(-np.log(p), image, params), traced(-np.log(p), image)):
        assert (q.argmax(-1) == 0).all()
    features = np.stack([*np.mgrid[:40, :40][::-1] / 20.0, *np.zeros((3, 40, 40))], -1).reshape(-1, 5)
    for prune in (None, False):
        kernels = [(np.float32(features), 30.0)]
        q = mean_field_features(-np.log(p).reshape(-1, 40), kernels, 5, bilateral="permutohedral", prune=prune)
        assert (q.argmax(-1) == 0).all()


def test_without_kernels_nothing_is_pruned():
    unary = np.random.default_rng(0).random((5, 12)).astype(np.float32)
    found = mean_field_features(unary, [], prune=True)
    np.testing.assert_allclose(found, jax.nn.softmax(-unary), atol=1e-6)
