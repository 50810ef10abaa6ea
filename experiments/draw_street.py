"""Draws the street photograph that the package ships, so that anyone may use it for any purpose (CC0).

python -m experiments.draw_street [--out deeplab_jax/box/street.jpg]

Not a photograph of any place: sky, houses with windows, trees, a road with its pavements, cars, lamps, signs and people
in perspective, with shadows, haze, lens blur and sensor noise, all from one seed.
"""

import io
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image, ImageDraw, ImageFilter

from deeplab_jax import cli
from deeplab_jax.files import write_atomically

FLAGS = flags.FLAGS
WIDTH, HEIGHT, HORIZON = 480, 360, 150
SCALE = 2  # drawn larger and scaled down, which smooths the outlines
MOST_BYTES = 60_000


def define_flags() -> None:
    """Declares the command's flags."""
    flags.DEFINE_string("out", "deeplab_jax/box/street.jpg", "the JPEG to write")
    flags.DEFINE_integer("seed", 7, "seed of all random choices")


def main(argv: Sequence[str]) -> None:
    """Writes the picture."""
    del argv
    data = encoded(draw(FLAGS.seed))
    write_atomically(FLAGS.out, lambda path: Path(path).write_bytes(data))
    print(f"{FLAGS.out}: {len(data)} bytes")


def encoded(image: np.ndarray) -> bytes:
    """JPEG of at most `MOST_BYTES`."""
    for quality in range(90, 30, -5):
        out = io.BytesIO()
        comment = b"Drawn by experiments/draw_street.py; CC0 1.0"
        Image.fromarray(image).save(out, "JPEG", quality=quality, optimize=True, comment=comment)
        if out.tell() <= MOST_BYTES:
            break
    return out.getvalue()


def draw(seed: int = 7) -> np.ndarray:
    """The scene, RGB uint8 [360, 480, 3]."""
    rng = np.random.default_rng(seed)
    image = Image.fromarray(_ground(rng))
    pen = ImageDraw.Draw(image)
    for side in (-1, 1):
        _houses(pen, rng, side)
    for side, depth in ((-1, 7.0), (1, 9.0), (-1, 14.0), (1, 16.0), (1, 26.0), (-1, 27.0)):
        _tree(image, rng, side * 5.6, depth)
    pen = ImageDraw.Draw(image)
    for x, depth, color in ((3.0, 22.0, (60, 62, 70)), (-3.1, 15.0, (142, 30, 28)), (3.1, 11.5, (186, 188, 192)),
                            (-1.2, 30.0, (220, 220, 218)), (-3.1, 8.2, (44, 62, 98))):  # fmt: skip
        _car(pen, x, depth, color)
    for x, depth in ((4.6, 20.0), (-4.6, 12.0), (4.6, 8.0)):
        _lamp(pen, x, depth)
    _sign(pen, -4.4, 9.5, (28, 70, 160))
    _sign(pen, 4.4, 13.0, (180, 24, 24))
    for x, depth, color in ((5.0, 10.5, (92, 40, 44)), (5.4, 11.0, (38, 44, 60)), (-5.2, 18.0, (64, 84, 58))):
        _person(pen, x, depth, color)
    small = image.filter(ImageFilter.GaussianBlur(SCALE * 0.7)).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    pixels = np.asarray(small, np.float32)
    y, x = np.mgrid[-1 : 1 : HEIGHT * 1j, -1 : 1 : WIDTH * 1j]
    pixels = pixels * (1 - 0.12 * (x**2 + y**2))[..., None]  # the lens is darker at its corners
    pixels += rng.normal(0, 2.2, (HEIGHT, WIDTH, 1)) + rng.normal(0, 1.2, pixels.shape)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _place(x: float, height: float, depth: float) -> tuple[float, float]:
    """The place of a point in the picture: metres to the right, above the road, and away from a camera at 1.5 m."""
    focal = 400.0
    return SCALE * (WIDTH / 2 + focal * x / depth), SCALE * (HORIZON + focal * (1.5 - height) / depth)


def _noise(rng: np.random.Generator, size: tuple[int, int], cell: int) -> np.ndarray:
    """Smooth noise of about -1..1, [H, W]."""
    coarse = rng.normal(0, 127, (size[0] // cell + 2, size[1] // cell + 2)).clip(-127, 127) + 128
    picture = Image.fromarray(coarse.astype(np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    return (np.asarray(picture, np.float32) - 128) / 127


def _ground(rng: np.random.Generator) -> np.ndarray:
    """Sky and the plane of road, pavements and kerbs, [H, W, 3] uint8."""
    height, width = HEIGHT * SCALE, WIDTH * SCALE
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    sky_share = (rows / (HORIZON * SCALE)).clip(0, 1)[..., None]
    clouds = 0.6 * _noise(rng, (height, width), 160) + 0.4 * _noise(rng, (height, width), 60)
    sky = np.array([150, 180, 214]) * (1 - sky_share) + np.array([214, 222, 230]) * sky_share
    sky = sky + 26 * np.clip(clouds, 0, 1)[..., None]
    below = np.maximum(rows - HORIZON * SCALE, 0.5)
    depth = 400.0 * 1.5 * SCALE / below
    x = (columns - width / 2) * depth / (400.0 * SCALE)
    grain = 5 * _noise(rng, (height, width), 3) + 6 * _noise(rng, (height, width), 24)
    road = np.array([96, 96, 99]) + grain[..., None]
    pavement = (
        np.array([152, 146, 138])
        + grain[..., None]
        - 10 * ((np.mod(depth, 1.2) < 0.06) | (np.mod(x, 1.2) < 0.05))[..., None]
    )
    land = np.where((np.abs(x) < 4.0)[..., None], road, pavement)
    land = np.where(((np.abs(x) >= 3.95) & (np.abs(x) < 4.12))[..., None], [184, 182, 176], land)
    dashes = (np.abs(x) < 0.08) & (np.mod(depth, 4.0) < 2.0) & (depth < 60)
    land = np.where(dashes[..., None], [220, 218, 208], land)
    haze = (1 - np.exp(-depth / 140))[..., None]
    land = land * (1 - haze) + np.array([206, 212, 218]) * haze
    return np.where((rows < HORIZON * SCALE)[..., None], sky, land).clip(0, 255).astype(np.uint8)


def _hazy(color: Sequence[int], depth: float) -> tuple[int, ...]:
    share = 1 - np.exp(-depth / 140)
    return tuple(int(c * (1 - share) + h * share) for c, h in zip(color, (206, 212, 218)))


def _wall(pen: ImageDraw.ImageDraw, x: float, low: float, high: float, near: float, far: float, color) -> None:
    corners = [_place(x, low, near), _place(x, high, near), _place(x, high, far), _place(x, low, far)]
    pen.polygon(corners, fill=_hazy(color, (near + far) / 2))


def _houses(pen: ImageDraw.ImageDraw, rng: np.random.Generator, side: int) -> None:
    """A row of houses along one side of the road, the far ones first."""
    starts = [2.5]
    while starts[-1] < 75:
        starts.append(starts[-1] + rng.uniform(6, 10))
    light = 1.0 if side > 0 else 0.72  # the sun is on the left
    for near, far in reversed(list(itertools.pairwise(starts))):
        tall = rng.uniform(6.5, 11)
        brick = np.array([(164, 112, 88), (190, 172, 142), (150, 142, 136), (204, 196, 184)][rng.integers(4)])
        color = brick * light * rng.uniform(0.9, 1.05)
        x = side * 7.0
        _wall(pen, x, 0, tall, near, far, color)
        _wall(pen, x, tall, tall + 0.5, near, far, color * 0.55)
        _wall(pen, x, 0, 0.7, near, far, color * 0.75)
        for floor in np.arange(1.1, tall - 1.6, 2.9):
            for at in np.arange(near + 0.9, far - 1.2, 2.2):
                _wall(pen, x, floor - 0.1, floor + 1.8, at - 0.1, at + 1.2, color * 1.15)
                _wall(pen, x, floor, floor + 1.7, at, at + 1.1, np.array([62, 72, 84]) * rng.uniform(0.7, 1.3))


def _tree(image: Image.Image, rng: np.random.Generator, x: float, depth: float) -> None:
    """A trunk and a crown of many dabs, dark below and light above."""
    pen = ImageDraw.Draw(image)
    (left, foot), (right, top) = _place(x - 0.14, 0, depth), _place(x + 0.14, 2.8, depth)
    pen.rectangle([left, top, right, foot], fill=_hazy((74, 62, 52), depth))
    for _ in range(420):
        angle, reach = rng.uniform(0, 2 * np.pi), np.sqrt(rng.uniform())
        dx, dy = 1.5 * reach * np.cos(angle), 1.7 * reach * np.sin(angle)
        px, py = _place(x + dx, 4.1 + dy, depth)
        size = SCALE * 400 * rng.uniform(0.08, 0.22) / depth
        shade = 0.75 + 0.2 * dy / 1.7 + rng.normal(0, 0.12)
        color = _hazy([max(0, min(255, c * shade)) for c in (84, 112, 54)], depth)
        pen.ellipse([px - size, py - size, px + size, py + size], fill=color)


def _car(pen: ImageDraw.ImageDraw, x: float, depth: float, color: tuple[int, int, int]) -> None:
    """A car seen from behind."""

    def shape(points, fill) -> None:
        pen.polygon([_place(x + dx, h, depth) for dx, h in points], fill=_hazy(fill, depth))

    (left, low), (right, high) = _place(x - 1.0, 0.0, depth - 0.4), _place(x + 1.0, 0.16, depth)
    pen.ellipse([left, high, right, low], fill=(52, 52, 55))
    for wheel in (-0.72, 0.72):
        shape([(wheel - 0.14, 0), (wheel + 0.14, 0), (wheel + 0.14, 0.5), (wheel - 0.14, 0.5)], (26, 26, 28))
    shape([(-0.9, 0.22), (0.9, 0.22), (0.9, 0.95), (0.6, 1.46), (-0.6, 1.46), (-0.9, 0.95)], color)
    shape([(-0.68, 0.97), (0.68, 0.97), (0.5, 1.36), (-0.5, 1.36)], (40, 48, 56))
    shape([(-0.9, 0.22), (0.9, 0.22), (0.9, 0.36), (-0.9, 0.36)], tuple(int(c * 0.6) for c in color))
    shape([(-0.26, 0.5), (0.26, 0.5), (0.26, 0.62), (-0.26, 0.62)], (226, 222, 190))
    for lamp in (-0.78, 0.6):
        shape([(lamp, 0.72), (lamp + 0.18, 0.72), (lamp + 0.18, 0.9), (lamp, 0.9)], (190, 34, 28))


def _lamp(pen: ImageDraw.ImageDraw, x: float, depth: float) -> None:
    """A street lamp whose arm reaches over the road."""
    width = max(1, round(SCALE * 400 * 0.12 / depth))
    arm = x - np.sign(x) * 1.3
    color = _hazy((92, 96, 98), depth)
    pen.line([_place(x, 0, depth), _place(x, 5.6, depth), _place(arm, 5.9, depth)], fill=color, width=width)


def _sign(pen: ImageDraw.ImageDraw, x: float, depth: float, color: tuple[int, int, int]) -> None:
    """A round road sign on its pole."""
    width = max(1, round(SCALE * 400 * 0.07 / depth))
    pen.line([_place(x, 0, depth), _place(x, 2.6, depth)], fill=_hazy((120, 122, 124), depth), width=width)
    for radius, fill in ((0.36, color), (0.25, (232, 232, 230))):
        (left, high), (right, low) = _place(x - radius, 2.5 + radius, depth), _place(x + radius, 2.5 - radius, depth)
        pen.ellipse([left, high, right, low], fill=_hazy(fill, depth))


def _person(pen: ImageDraw.ImageDraw, x: float, depth: float, color: tuple[int, int, int]) -> None:
    """A person walking away."""

    def part(low: float, high: float, half: float, fill) -> None:
        corners = [_place(x - half, low, depth), _place(x + half, low, depth), _place(x + half * 0.8, high, depth)]
        pen.polygon([*corners, _place(x - half * 0.8, high, depth)], fill=_hazy(fill, depth))

    part(0.0, 0.85, 0.17, (44, 46, 56))
    part(0.8, 1.45, 0.24, color)
    (left, high), (right, low) = _place(x - 0.12, 1.74, depth), _place(x + 0.12, 1.47, depth)
    pen.ellipse([left, high, right, low], fill=_hazy((176, 134, 112), depth))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
