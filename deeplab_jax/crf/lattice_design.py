"""The design of the permutohedral lattice filters: their forms, constants, rotations and shifts.

The filter is K = s / L sum_l S_l B_l S_l^T. S_l holds the barycentric weights of the points in the simplices of lattice
l (Adams, Baek and Davis 2010), B_l acts between the lattice's vertices:

- "direct": B = I + c A, with A joining each vertex to its 2 (D + 1) axis neighbors. Only vertices in use are
  needed, so nothing is lost where points are sparse. Best where vertices are many.
- "axes": blurs (1/4, 1/2, 1/4) along the D + 1 axes in sequence, for every other lattice in reverse, so that their mean
  is nearly symmetric. It keeps the tail of the Gaussian, which matters where a kernel reaches over much of a
  photograph. It also needs the neighbors of the vertices in use.
- "dense": one matrix between all vertices, the Gaussian of the variance that splat and slice leave. Symmetric and
  positive semi-definite. For few vertices.

Each lattice sees the features rotated by an orthogonal matrix of its own and shifted within a cell, so that effects of
the lattice's own directions average out. The constants follow from the shape of the kernel: a least-squares fit of its
mean over positions and directions to exp(-r^2 / 2).
"""

import math

import numpy as np

# (alpha, c) of the direct form for D = 1, 2, ...: features are multiplied by alpha, axis neighbors have weight c.
DIRECT = (
    (1.05, 0.006),
    (1.54, 0.291),
    (1.47, 0.323),
    (1.42, 0.342),
    (1.40, 0.367),
    (1.34, 0.358),
    (1.32, 0.379),
    (1.30, 0.413),
)
AXES = 2.13  # alpha of the axes form
# In more than three dimensions points fill a sheet of two to four dimensions, where the mean kernel sums to more than
# in the full space: by Monte Carlo over sheets in five dimensions, 5 % more in the axes form and 2 to 8 % in the direct
# form, depending on the sheet's direction.
SHEET = {"direct": 1.03, "axes": 1.05}
# Lattices that are averaged: the error falls as more are.
MOST = 4
SMALL = 24_576  # points up to which there are MOST
# Vertices of the direct form up to which the axes form is taken: for any number of points, and per point, for up to so
# many points. It is two to four times as accurate there and touches ten times the vertices, which takes the longer the
# less of them fits into the cache.
FEW_IN_ALL = 4096
FEW = {65_536: 0.3, 1 << 20: 0.2}
FEW_OF_MORE = 0.05
DENSE = 2.5  # alpha of the dense form: 1 / alpha^2 of the variance is splat and slice's


def few(points: int) -> float:
    """Vertices of the direct form up to which the axes form is taken."""
    share = next((share for most, share in FEW.items() if points <= most), FEW_OF_MORE)
    return max(share * points, FEW_IN_ALL)


def lattices(points: int) -> int:
    """The least number of lattices for this many points."""
    return MOST if points <= SMALL else 2


def constants(form: str, dimensions: int) -> tuple[float, float]:
    """(alpha, weight of a neighbor) of a form in D dimensions."""
    if form == "direct":
        return DIRECT[min(dimensions, len(DIRECT)) - 1]
    return {"axes": (AXES, 0.25), "dense": (DENSE, 0.0)}[form]


def scale(form: str, dimensions: int) -> float:
    """The factor s that gives filter(1) the definition's sum for dense points; from D = 4 on they lie in a sheet."""
    alpha, side = constants(form, dimensions)
    cell = (dimensions + 1) ** -0.5 * 6 ** (dimensions / 2) / alpha**dimensions
    if form == "dense":
        return (1 - 1 / alpha**2) ** (-dimensions / 2)
    total = 1 + 2 * (dimensions + 1) * side if form == "direct" else 1.0
    sheet = SHEET[form] if dimensions > 3 else 1.0
    return (2 * math.pi) ** (dimensions / 2) / cell / total / sheet


def basis(dimensions: int) -> np.ndarray:
    """The permutohedral lattice's hyperplane: float64 [D + 1, D], orthogonal columns of one length (Adams et al. 2010).

    Each vertex then represents a volume of 6^(D/2) / sqrt(D + 1) in feature space: splat and slice without blur have
    the kernel's variance, 1.
    """
    axis = np.arange(1, dimensions + 1)
    columns = np.zeros((dimensions + 1, dimensions))
    for j in axis:
        columns[:j, j - 1] = 1
        columns[j, j - 1] = -j
    return columns * (dimensions + 1) / np.sqrt(6) / np.sqrt(axis * (axis + 1))


def embedding(form: str, dimensions: int, lattice: int) -> tuple[np.ndarray, np.ndarray]:
    """The map of features [N, D] into lattice coordinates, features @ matrix + shift.

    Returns:
      matrix: float64 [D, D + 1]; splat and slice on the lattice have the variance 1 / alpha^2 of the features.
      shift: float64 [D + 1], spread over a cell.
    """
    order = dimensions + 1
    random = np.random.RandomState(lattice + 1)  # its sequence of numbers is stable across NumPy versions
    turn, upper = np.linalg.qr(random.normal(size=(dimensions, dimensions)))
    turn = turn * np.sign(np.diag(upper))
    shift = random.uniform(0, order, order)
    return constants(form, dimensions)[0] * turn @ basis(dimensions).T, shift - shift.mean()
