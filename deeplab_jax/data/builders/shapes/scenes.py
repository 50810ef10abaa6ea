"""Draws scenes of seven classes: textured, shaded objects that occlude each other in front of a patchwork background.

Color is only a hint: each class has its own, but colors scatter so widely that ball and melon can often be
distinguished only by the melon's stripes, and box and star, like ring and tree, only by their outlines. Every color is
drawn far from those already in the scene, so that edges are as strong as a photograph's while textures stay faint.
"""

from collections.abc import Callable, Iterable

import numpy as np

from deeplab_jax.imaging.classes import KNOWN
from deeplab_jax.imaging.palettes import VOID

CLASS_NAMES = KNOWN["shapes"].names
HEIGHT, WIDTH = 96, 128
# Mean RGB of each class; drawn colors scatter widely about it.
_COLORS = {
    "background": (135, 130, 115), "ball": (205, 65, 70), "melon": (215, 125, 45), "box": (55, 105, 210),
    "star": (125, 75, 205), "ring": (105, 180, 55), "tree": (45, 150, 100),
}  # fmt: skip
_FINE = 2  # scenes are drawn this much finer, then averaged, for soft edges

Mask = np.ndarray  # bool [H, W]


def draw(seed: int, split: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    """One scene, a pure function of its three numbers.

    Returns:
      image uint8 `[96, 128, 3]` RGB and label uint8 `[96, 128]`, 255 in a rim of about two pixels around each object.
    """
    rng = np.random.default_rng([seed, split, index])
    height, width = HEIGHT * _FINE, WIDTH * _FINE
    y, x = np.mgrid[:height, :width].astype(np.float32) / _FINE
    colors: list[np.ndarray] = []
    canvas = _background(rng, y, x, colors)
    label = np.zeros((height, width), np.uint8)
    instance = np.zeros((height, width), np.uint8)
    for number in range(1, int(rng.integers(4, 8)) + 1):
        kind = int(rng.integers(1, len(CLASS_NAMES)))
        radius = float(np.exp(rng.uniform(np.log(12), np.log(36))))  # several scales
        center = rng.uniform(0, HEIGHT), rng.uniform(0, WIDTH)
        window = tuple(
            slice(int(max(0, c - 1.4 * radius)) * _FINE, int(min(n, c + 1.4 * radius + 1)) * _FINE)
            for c, n in zip(center, (HEIGHT, WIDTH))
        )
        dy, dx = y[window] - center[0], x[window] - center[1]
        for mask, texture in _PARTS[CLASS_NAMES[kind]](rng, dy, dx, radius):
            color, shading = _new_color(rng, colors, CLASS_NAMES[kind]), _shading(rng, dy, dx, radius)
            _paint(canvas[window], mask, [c * shading for c in color], texture)
            np.copyto(label[window], kind, where=mask)
            np.copyto(instance[window], number, where=mask)
    canvas *= (1 + 0.12 * _ramp(rng, y, x))[..., None]  # the light fades across the scene
    image = sum(canvas[i::_FINE, j::_FINE] for i in range(_FINE) for j in range(_FINE)) / np.float32(_FINE**2)
    image += rng.normal(0, 2.0, image.shape)  # sensor noise
    label, instance = label[::_FINE, ::_FINE].copy(), instance[::_FINE, ::_FINE]
    label[_rim(instance)] = VOID
    return np.clip(np.rint(image), 0, 255).astype(np.uint8), label


def _background(rng: np.random.Generator, y: np.ndarray, x: np.ndarray, colors: list[np.ndarray]) -> np.ndarray:
    """Patches of several colors and textures with sharp borders: edges of no object. float32 `[H, W, 3]`."""
    canvas = np.zeros((*y.shape, 3), np.float32)
    for patch in range(int(rng.integers(2, 4))):
        color = _new_color(rng, colors)
        angle, offset = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5)
        wave = 6 * np.sin((x + y) / rng.uniform(8, 20) + rng.uniform(0, 6))
        side = (y - HEIGHT / 2) * np.sin(angle) + (x - WIDTH / 2) * np.cos(angle) + wave > offset * HEIGHT
        mask = side if patch else np.ones_like(side)
        texture = (_clouds, _grain, _stripes, _spots)[int(rng.integers(4))](rng, y, x)
        _paint(canvas, mask, color, texture)
    for _ in range(int(rng.integers(0, 3))):  # poles: as thin as a trunk, but not trees
        at, slant = rng.uniform(0, WIDTH), rng.uniform(-0.2, 0.2)
        canvas[np.abs(x - at - slant * y) < rng.uniform(0.8, 2.0)] = _new_color(rng, colors)
    return canvas


def _paint(canvas: np.ndarray, mask: Mask, color: Iterable, texture: np.ndarray) -> None:
    for channel, value in enumerate(color):  # three times as fast as all channels under one mask
        np.copyto(canvas[..., channel], value + texture, where=mask)


# Each object is a list of (mask, texture) parts, painted in order, each in its own color.


def _ball(rng, y, x, r):
    return [(_ellipse(rng, y, x, r), _grain(rng, y, x) * 0.5)]


def _melon(rng, y, x, r):
    return [(_ellipse(rng, y, x, r), 2 * _stripes(rng, y, x))]


def _box(rng, y, x, r):
    u, v = _turn(y, x, rng.uniform(0, np.pi))
    mask = (np.abs(u) < r * rng.uniform(0.5, 0.9)) & (np.abs(v) < r * rng.uniform(0.5, 0.9))
    return [(mask, _any_texture(rng, y, x))]


def _star(rng, y, x, r):
    points, phase, inner = int(rng.integers(4, 7)), rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 0.5)
    # Between tip (radius r) and notch (radius inner * r) the outline is straight.
    angle = np.abs((np.arctan2(y, x) + phase) % (2 * np.pi / points) - np.pi / points)
    half = np.pi / points
    tip, notch = np.array([np.cos(half), np.sin(half)]), np.array([inner, 0.0])
    normal = np.array([tip[1] - notch[1], notch[0] - tip[0]])
    distance = np.hypot(y, x)
    along = distance * (np.cos(angle) * normal[0] + np.sin(angle) * normal[1])
    return [(along < 1.15 * r * (normal @ notch), _any_texture(rng, y, x))]


def _ring(rng, y, x, r):
    u, v = _turn(y, x, rng.uniform(0, np.pi))
    distance = np.hypot(u, v / rng.uniform(0.6, 1.0))
    return [((distance < r) & (distance > r * rng.uniform(0.5, 0.75)), _any_texture(rng, y, x))]


def _tree(rng, y, x, r):
    trunk = (np.abs(x + 0.1 * y) < max(1.0, 0.1 * r)) & (y > 0) & (y < 1.3 * r)
    crown = np.zeros_like(trunk)
    for _ in range(5):
        dy, dx = rng.uniform(-0.6, 0.2) * r, rng.uniform(-0.45, 0.45) * r
        crown |= np.hypot(y - dy, x - dx) < r * rng.uniform(0.3, 0.5)
    return [(trunk, _grain(rng, y, x) * 0.5), (crown, _grain(rng, y, x) * 1.5)]


_PARTS: dict[str, Callable] = {
    "ball": _ball, "melon": _melon, "box": _box, "star": _star, "ring": _ring, "tree": _tree,
}  # fmt: skip


def _ellipse(rng, y, x, r) -> Mask:
    u, v = _turn(y, x, rng.uniform(0, np.pi))
    return np.hypot(u, v / rng.uniform(0.65, 1.0)) < 0.8 * r


# Textures: float32 [H, W], added to the color; their amplitude is small beside the step at an edge.


def _any_texture(rng, y, x):
    return (_grain, _stripes, _spots, _clouds)[int(rng.integers(4))](rng, y, x)


def _grain(rng, y, x):
    coarse = rng.normal(0, 7, (y.shape[0] // _FINE, y.shape[1] // _FINE)).astype(np.float32)
    return coarse.repeat(_FINE, 0).repeat(_FINE, 1)


def _stripes(rng, y, x):
    u, _ = _turn(y, x, rng.uniform(0, np.pi))
    return 9 * np.sign(np.sin(2 * np.pi * u / rng.uniform(4, 7)))


def _spots(rng, y, x):
    u, v = _turn(y, x, rng.uniform(0, np.pi))
    period = 2 * np.pi / rng.uniform(5, 8)
    return 9 * np.sign(np.sin(u * period) * np.sin(v * period) - 0.3)


def _clouds(rng, y, x):
    grid = rng.normal(0, 7, (8, 10)).astype(np.float32)
    rows, columns = np.linspace(0, 6.9, y.shape[0], dtype=np.float32), np.linspace(0, 8.9, y.shape[1], dtype=np.float32)
    i, a = rows.astype(int), (rows % 1)[:, None]
    j, b = columns.astype(int), columns % 1
    stretched = grid[i] * (1 - a) + grid[i + 1] * a
    return stretched[:, j] * (1 - b) + stretched[:, j + 1] * b


def _shading(rng, y, x, r):
    angle = rng.uniform(0, 2 * np.pi)
    return 1 + 0.15 * np.clip((y * np.sin(angle) + x * np.cos(angle)) / r, -1, 1)


def _ramp(rng, y, x):
    angle = rng.uniform(0, 2 * np.pi)
    return (y / HEIGHT - 0.5) * np.sin(angle) + (x / WIDTH - 0.5) * np.cos(angle)


def _turn(y, x, angle):
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return y * cos - x * sin, y * sin + x * cos


def _new_color(rng: np.random.Generator, colors: list[np.ndarray], name: str = "background") -> np.ndarray:
    """A color of the class far from those already in the scene: the farthest of a few draws."""
    draws = np.array(_COLORS[name]) * rng.uniform(0.6, 1.25, (8, 1)) + rng.normal(0, 20, (8, 3))
    draws = np.clip(draws, 15, 240).astype(np.float32)
    if colors:
        distance = np.linalg.norm(draws[:, None] - np.array(colors), axis=2).min(axis=1)
        chosen = draws[int(distance.argmax())]
    else:
        chosen = draws[0]
    colors.append(chosen)
    return chosen


def _rim(instance: np.ndarray) -> Mask:
    """Pixels with a 4-neighbour in another object: a line of two pixels on every visible outline."""
    rim = np.zeros(instance.shape, bool)
    for axis in (0, 1):
        change = np.diff(instance, axis=axis) != 0
        first, second = [slice(None)] * 2, [slice(None)] * 2
        first[axis], second[axis] = slice(None, -1), slice(1, None)
        rim[tuple(first)] |= change
        rim[tuple(second)] |= change
    return rim
