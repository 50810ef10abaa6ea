"""The O(N^2) definition in float64 NumPy, and small cases, for the CRF's tests."""

from types import SimpleNamespace

import numpy as np
import pytest


def gaussian_kernel(features):
    features = np.asarray(features, np.float64)
    return np.exp(-0.5 * ((features[:, None] - features[None]) ** 2).sum(-1))


def image_kernel_matrices(image, params):
    height, width, _ = image.shape
    y, x = np.mgrid[:height, :width].astype(np.float64)
    xy = np.stack([x.ravel(), y.ravel()], 1)
    colour = np.asarray(image, np.float64).reshape(-1, 3) / np.asarray(params.bilateral_rgb_std)
    bilateral = gaussian_kernel(np.concatenate([xy / np.asarray(params.bilateral_xy_std), colour], 1))
    return bilateral, gaussian_kernel(xy / np.asarray(params.gaussian_xy_std))


def separable_kernel(kernel, width):
    """The mean of filtering rows, then columns, and columns, then rows."""
    y, x = np.divmod(np.arange(len(kernel)), width)
    rows, columns = kernel * (y[:, None] == y), kernel * (x[:, None] == x)
    return 0.5 * (rows @ columns + columns @ rows)


def normalized(kernel, normalization, include_self=True):
    sums = kernel.sum(1)
    if not include_self:
        kernel = kernel - np.eye(len(kernel))
    before = {"before": 1 / sums, "symmetric": sums**-0.5}.get(normalization, np.ones_like(sums))
    after = {"after": 1 / sums, "symmetric": sums**-0.5}.get(normalization, np.ones_like(sums))
    return after[:, None] * kernel * before


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def mean_field_definition(unary, kernels, iterations, normalization, compatibility=None, include_self=True):
    """kernels: pairs of an [N, N] matrix and a weight (number, [C] or [C, C]); unary [N, C]."""
    unary = np.asarray(unary, np.float64)
    labels = unary.shape[1]
    mu = 1 - np.eye(labels) if compatibility is None else np.asarray(compatibility, np.float64)
    q = softmax(-unary)
    for _ in range(iterations):
        total = np.zeros_like(q)
        for kernel, weight in kernels:
            out = normalized(kernel, normalization, include_self) @ q
            weight = np.asarray(weight, np.float64)
            total += out @ weight.T if weight.ndim == 2 else out * weight
        q = softmax(-unary - total @ mu.T)
    return q


@pytest.fixture(scope="session")
def definition():
    """Functions of the definition: kernel, image_kernels, separable, normalized, mean_field, softmax."""
    return SimpleNamespace(
        kernel=gaussian_kernel,
        image_kernels=image_kernel_matrices,
        separable=separable_kernel,
        normalized=normalized,
        mean_field=mean_field_definition,
        softmax=softmax,
    )


@pytest.fixture(scope="session")
def scene():
    """A 12 x 15 image of two noisy regions and a unary with 4 labels that is right more often than not."""
    rng = np.random.default_rng(7)
    height, width, labels = 12, 15, 4
    y, x = np.mgrid[:height, :width]
    truth = (x > 6) + 2 * (y > 7)
    colours = np.array([[30, 60, 90], [200, 180, 40], [90, 200, 160], [240, 30, 200]])
    image = np.clip(colours[truth] + rng.normal(0, 12, (height, width, 3)), 0, 255).astype(np.uint8)
    logits = rng.normal(0, 1, (height, width, labels)) + 1.2 * np.eye(labels)[truth]
    return SimpleNamespace(image=image, unary=-np.log(softmax(logits)).astype(np.float32), truth=truth)


@pytest.fixture(scope="session")
def small_case(test_data):
    """crf_cases/v2_small: image, unary, parameters and exact marginals, 125 x 94 pixels, 21 labels."""
    return load_case(test_data / "crf_cases" / "v2_small.npz")


@pytest.fixture(scope="session")
def full_case(test_data):
    """crf_cases/v2_full: 500 x 375 pixels, 21 labels."""
    return load_case(test_data / "crf_cases" / "v2_full.npz")


def load_case(path):
    from deeplab_jax.crf import CRFParams

    case = np.load(path)
    names = ("bilateral_weight", "bilateral_xy_std", "bilateral_rgb_std", "gaussian_weight", "gaussian_xy_std")
    return SimpleNamespace(
        image=case["image"],
        unary=case["unary"],
        params=CRFParams(**{name: float(case[name]) for name in names}),
        iterations=int(case["iterations"]),
        exact={n: case[f"exact_{n}"].astype(np.float32) for n in ("symmetric", "after")},
    )
