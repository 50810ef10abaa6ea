"""Lattices built on the host: exact keys, symmetric operators, the scale, and closeness to the sum over all pairs."""

import numpy as np
import pytest

from deeplab_jax.crf import host_lattice, lattice_design

FORMS = ("direct", "axes", "dense")


def pairs(features, others):
    return np.exp(-0.5 * ((features[:, None] - others[None]) ** 2).sum(-1))


def operator(lattice, form):
    """S B S^T of one lattice as a matrix, not scaled."""
    points, count = len(lattice.weights), lattice.count
    splat = np.zeros((count, points))
    for v, w in zip(lattice.vertices.T, lattice.weights.T):
        np.add.at(splat, (v, np.arange(points)), w)
    between = np.stack([host_lattice.between(lattice, form, e.astype(np.float32)) for e in np.eye(count)], 1)
    return splat.T @ between @ splat


def cloud(dimensions, points=60, side=2.5, seed=0):
    return np.random.default_rng(seed).uniform(0, side, (points, dimensions)).astype(np.float32)


@pytest.mark.parametrize("dimensions", range(1, 9))
@pytest.mark.parametrize("form", ["direct", "axes"])
def test_keys_are_exact(dimensions, form):
    """Each key belongs to one vertex: there are as many vertex coordinates, found from the definition."""
    features = cloud(dimensions, 300, 5)
    features = features - features.min(0)
    vertices, weights, keys, steps, _ = host_lattice._embedded(features.T, form, 1)
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-5)
    assert weights.min() > -1e-5
    matrix, shift = lattice_design.embedding(form, dimensions, 1)
    elevated = features.astype(np.float64) @ matrix + shift
    # A point is the mean of its vertices: solve for coordinates of all vertices, and compare with whole numbers.
    splat = np.zeros((len(features), len(keys)))
    for v, w in zip(vertices.T, weights.T):
        np.add.at(splat, (np.arange(len(features)), v), w)
    coordinates = host_coordinates(features, form)
    np.testing.assert_allclose(splat @ coordinates, elevated, atol=2e-3)
    assert len(np.unique(coordinates, axis=0)) == len(keys) == len(np.unique(keys))
    # Steps of keys are steps of coordinates.
    number = {tuple(c): k for c, k in zip(coordinates, keys)}
    joined = 0
    for c, k in zip(coordinates, keys):
        for j, step in enumerate(steps):
            ahead = c + 1
            ahead[j] -= dimensions + 1
            if tuple(ahead) in number:
                joined += 1
                assert number[tuple(ahead)] == k + step
    assert joined > 0


@pytest.mark.parametrize("size", range(2, 10))
def test_the_network_sorts(size):
    """A network that sorts all zeros and ones sorts everything."""
    values = (np.arange(1 << size)[None] >> np.arange(size)[:, None]) & 1
    for i, j in host_lattice._network(size):
        values[i], values[j] = np.maximum(values[i], values[j]), np.minimum(values[i], values[j])
    assert (np.diff(values, axis=0) <= 0).all()


def host_coordinates(features, form):
    """The vertices' coordinates in order of their numbers, by the definition (Adams et al., section 3.1)."""
    dimensions = features.shape[1]
    order = dimensions + 1
    matrix, shift = lattice_design.embedding(form, dimensions, 1)
    elevated = (features @ matrix.astype(np.float32) + shift.astype(np.float32)).astype(np.float64)
    found = {}
    vertices = host_lattice._embedded(features.T, form, 1)[0]
    for n, e in enumerate(elevated):
        base = np.rint(e / order) * order
        above = e - base
        rank = np.array([(above > a).sum() + (above[:i] == a).sum() for i, a in enumerate(above)])
        rank = rank + int(base.sum()) // order
        base, rank = base + order * ((rank < 0) * 1 - (rank >= order)), rank % order
        for k in range(order):  # ours come in another order: by how many coordinates are raised above their floor
            at = (-k - int(np.floor(e / order).sum())) % order
            found[int(vertices[n, at])] = np.where(rank < order - k, base + k, base + k - order)
    return np.stack([found[v] for v in range(len(found))])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dimensions", [1, 2, 5, pytest.param(8, marks=pytest.mark.long)])
def test_operators_are_symmetric(form, dimensions):
    _, lattices = host_lattice.build(cloud(dimensions, 24), form)
    whole = sum(operator(lattice, form) for lattice in lattices)
    asymmetry = np.abs(whole - whole.T).max() / np.abs(whole).max()
    assert asymmetry < (0.05 if form == "axes" else 1e-5)


@pytest.mark.parametrize("dimensions", [2, 5])
def test_the_dense_form_is_positive_semi_definite_and_the_others_nearly(dimensions):
    for form in FORMS:
        _, lattices = host_lattice.build(cloud(dimensions, 40), form)
        whole = sum(operator(lattice, form) for lattice in lattices)
        values = np.linalg.eigvalsh(0.5 * (whole + whole.T))
        assert values[0] > -(1e-5 if form == "dense" else 0.03) * values[-1]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("dimensions", "points", "side"), [(2, 3000, 9), (3, 3000, 6)])
def test_scale_and_closeness_on_dense_points(form, dimensions, points, side):
    features = cloud(dimensions, points, side)
    at = np.arange(0, points, 10)
    exact = pairs(features[at], features)
    _, lattices = host_lattice.build(features, form)
    sums = np.mean([host_lattice.sums(lattice, form)[0] for lattice in lattices], axis=0)
    ratio = sums[at] / exact.sum(1)
    assert abs(np.median(ratio) - 1) < 0.03
    assert np.std(ratio) < 0.06


@pytest.mark.parametrize("form", FORMS)
def test_no_vertex_exceeds_the_peak(form):
    """Values at most 1 in, values at most the peak at the vertices, before and after the operator."""
    features = cloud(2, 400, 3)
    _, lattices = host_lattice.build(features, form)
    for lattice in lattices:
        total, peak = host_lattice.sums(lattice, form)
        grid = np.bincount(lattice.vertices.ravel(), lattice.weights.ravel(), lattice.count).astype(np.float32)
        after = host_lattice.between(lattice, form, grid)
        assert peak == pytest.approx(max(grid.max(), after.max()), rel=1e-6)
        whole = operator(lattice, form) * lattice_design.scale(form, 2)
        np.testing.assert_allclose(total, whole.sum(1), rtol=1e-4)


def test_the_form_follows_the_number_of_vertices():
    few, many = cloud(2, 20000, 6), cloud(5, 20000, 9)
    assert host_lattice.build(few)[0] == "dense"
    assert host_lattice.build(many)[0] == "direct"
    assert host_lattice.build(cloud(5, 150000, 4))[0] == "axes"


def test_of_very_many_points_the_axes_form_is_for_fewer_vertices(monkeypatch):
    features = cloud(5, 150000, 7)
    share = host_lattice.build(features, "direct")[1][0].count / 150000
    assert lattice_design.FEW_OF_MORE < share < lattice_design.FEW[1 << 20]
    assert host_lattice.build(features)[0] == "axes"
    monkeypatch.setattr(lattice_design, "FEW", {65_536: 0.3, 100_000: 0.2})
    assert host_lattice.build(features)[0] == "direct"


@pytest.mark.parametrize("side", [3, 5])
def test_the_direct_form_needs_more_vertices_than_the_limit(side, monkeypatch):
    features = cloud(5, 20000, side)
    shifted = np.ascontiguousarray((features - features.min(0)).T)
    count = host_lattice._embedded(shifted, "direct", 0)[2].size
    monkeypatch.setattr(lattice_design, "FEW_IN_ALL", count - 1)
    monkeypatch.setitem(lattice_design.FEW, 65_536, 0.0)
    assert host_lattice.build(features)[0] == "direct"
    monkeypatch.setattr(lattice_design, "FEW_IN_ALL", count)
    assert host_lattice.build(features)[0] == "axes"


def test_blocks_do_not_show(monkeypatch):
    """Vertices have the same numbers, in order of use, however many points are looked at once."""
    features = cloud(5, 3000, 6)
    whole = host_lattice.build(features, "direct")[1]
    monkeypatch.setattr(host_lattice, "BLOCK", 700)
    for one, other in zip(host_lattice.build(features, "direct")[1], whole, strict=True):
        np.testing.assert_array_equal(one.vertices, other.vertices)
        np.testing.assert_array_equal(one.neighbors, other.neighbors)
        assert np.unique(one.vertices.ravel(), return_index=True)[1].argsort().tolist() == list(range(one.count))


@pytest.mark.parametrize("spread", [1e4, 1e9, 1e30])
def test_too_wide_features_are_refused(spread):
    with pytest.raises(host_lattice.TooWide):
        host_lattice.build(cloud(8, 50, spread))


def test_far_from_each_other_vertices_of_the_dense_form_do_not_hear_each_other():
    """Differences of their squares are rounding errors in float32."""
    places = (np.arange(40.0)[:, None] * [250, 170]).astype(np.float32)
    form, lattices = host_lattice.build(places)
    assert form == "dense"
    ones, _ = host_lattice.sums(lattices[0], form, None)
    alone, _ = host_lattice.sums(host_lattice.build(places[:1])[1][0], form, None)
    assert alone == pytest.approx(1, abs=0.1)
    np.testing.assert_allclose(ones, 1, atol=0.15)
