"""A few shapes for photographs of many sizes: each shape is a program to compile, each pixel of padding is computed."""

from collections import Counter
from collections.abc import Sequence

from deeplab_jax.inference.tiling import padded_size

Size = tuple[int, int]

MOST = 3  # shapes for one set of photographs, if the padding allows it
# Sides of shared shapes are multiples of this, so that another set of sizes finds them compiled.
COARSE = 128
# Pixels whose network and CRF take about as long as compiling the two programs of one more shape, on CPUs.
PROGRAM_PIXELS = 4_000_000
# Above `MOST` shapes are merged as long as all photographs together do not grow beyond this factor.
MOST_GROWTH = 3.0


def choose(sizes: Sequence[Size], multiple: int, extra: int = 1, most: int = MOST) -> list[Size]:
    """Chooses the shapes to which photographs of known sizes are padded.

    Up to `most` different padded sizes stay as they are. Of more, the two that need the fewest additional
    pixels are merged repeatedly, until one more program would be cheaper than the padding.

    Args:
      sizes: (H, W) of each photograph; repeated sizes count repeatedly.
      multiple: sides are multiples of this plus `extra`.
      extra: the network's `Architecture.size_extra`.
      most: the number of shapes up to which nothing is merged.

    Returns:
      Shapes (H, W), the smallest first; every photograph fits in one of them.

    >>> choose([(375, 500)] * 9 + [(333, 500)], 32)
    [(353, 513), (385, 513)]
    >>> choose([(90, 90), (120, 200), (160, 130), (200, 230), (250, 170)], 32)
    [(257, 257)]
    """
    exact = Counter((padded_size(h, multiple, extra), padded_size(w, multiple, extra)) for h, w in sizes)
    if len(exact) <= most:
        return sorted(exact, key=_area)
    coarse = max(COARSE // multiple, 1) * multiple
    groups: Counter = Counter()
    for (height, width), count in exact.items():
        groups[padded_size(height, coarse, extra), padded_size(width, coarse, extra)] += count
    least = sum(_area(shape) * count for shape, count in exact.items())
    total = sum(_area(shape) * count for shape, count in groups.items())
    while len(groups) > 1:
        added, one, two = min(_merging(groups))
        if added > PROGRAM_PIXELS and not (len(groups) > most and total + added <= MOST_GROWTH * least):
            break
        count = groups.pop(one) + groups.pop(two)
        groups[max(one[0], two[0]), max(one[1], two[1])] += count
        total += added
    return sorted(groups, key=_area)


def smallest_holding(size: Size, shapes: Sequence[Size]) -> Size | None:
    """The first of `shapes`, which are sorted by area, that an image of `size` fits in."""
    return next((s for s in shapes if size[0] <= s[0] and size[1] <= s[1]), None)


def _merging(groups: Counter) -> list[tuple[int, Size, Size]]:
    """For each pair of shapes, the pixels that merging them adds."""
    shapes = sorted(groups)
    pairs = []
    for i, one in enumerate(shapes):
        for two in shapes[i + 1 :]:
            area = max(one[0], two[0]) * max(one[1], two[1])
            pairs.append((groups[one] * (area - _area(one)) + groups[two] * (area - _area(two)), one, two))
    return pairs


def _area(shape: Size) -> int:
    return shape[0] * shape[1]
