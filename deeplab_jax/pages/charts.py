"""Line charts as SVG text, for pages that must open without a network or scripts."""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

Point = tuple[float, float]

# Distinguishable with the common kinds of color blindness (Okabe and Ito 2008).
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f")

_LARGEST = 1e100
_WIDTH, _HEIGHT = 520, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 12, 12, 40


def line_chart(series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, marks: bool = False) -> Markup:
    """Draws lines with axes, grid and legend.

    Args:
      series: name -> (x, y) in order of x; points that are not finite, or beyond 1e100, break the line.
      x_label: below the axis.
      y_label: along the axis.
      marks: also a dot at each point, with its values as a tooltip.

    Returns:
      An <svg> element; names are escaped.
    """
    finite = [p for points in series.values() for p in points if _drawable(p)]
    if not finite:
        return Markup("")
    xs, ys = zip(*finite)
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    low_x, high_x = min(xs), max(max(xs), min(xs) + 1e-9)
    low_y, high_y = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def at(point: Point) -> tuple[float, float]:
        x = _LEFT + (point[0] - low_x) / ((high_x - low_x) or 1) * (_WIDTH - _LEFT - _RIGHT)
        y = _HEIGHT - _BOTTOM - (point[1] - low_y) / ((high_y - low_y) or 1) * (_HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(y_label)}" class="chart">']
    for tick in y_ticks:
        _, y = at((low_x, tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        if low_x <= tick <= high_x:
            x, _ = at((tick, low_y))
            parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:g}</text>')
    middle = (_WIDTH + _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(13 {(_HEIGHT - _BOTTOM + _TOP) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for number, (name, points) in enumerate(series.items()):
        color = COLORS[number % len(COLORS)]
        path, pen_down = [], False
        for point in points:
            if not _drawable(point):
                pen_down = False
                continue
            x, y = at(point)
            path.append(f"{'L' if pen_down else 'M'}{x} {y}")
            pen_down = True
            if marks:
                tip = f"{name}: {point[0]:g}, {point[1]:.4g}"
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"><title>{escape(tip)}</title></circle>')
        parts.append(f'<path d="{" ".join(path)}" fill="none" stroke="{color}" stroke-width="1.8"/>')
    parts.append("</svg>")
    if len(series) > 1:
        keys = "".join(
            f'<span><svg viewBox="0 0 10 10"><rect width="10" height="10" fill="{COLORS[n % len(COLORS)]}"/></svg>'
            f"{escape(name)}</span>"
            for n, name in enumerate(series)
        )
        parts.append(f'<div class="keys">{keys}</div>')
    return Markup("".join(parts))


def _drawable(point: Point) -> bool:
    """Finite, and small enough that differences are finite too: a run that diverged has losses of any size."""
    return all(abs(v) < _LARGEST for v in point)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover [low, high].

    >>> ticks(0.0, 0.93), ticks(3, 3)
    ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [2.0, 3.0, 4.0])
    """
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(1.0, 1e-3 * abs(low))
        low, high = low - margin, low + margin
        about = 2
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 5, 10) if f * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, last + 1)]


def thinned(points: Sequence[Point], most: int = 300) -> list[Point]:
    """At most about `most` points: means of runs of neighbors, so that noise is reduced and nothing is omitted."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / most)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
