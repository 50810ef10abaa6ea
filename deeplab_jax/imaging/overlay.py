"""Pictures for people to look at: overlays with a legend, panels side by side, strips of marginals, plots."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from deeplab_jax.imaging import fonts
from deeplab_jax.imaging.palettes import VOID

_INK, _PAPER = (32, 32, 36), (250, 250, 250)

# Dark blue, teal, green, yellow: rises in lightness, so that it is also readable in gray and with colour blindness.
_HEAT = np.array([(12, 7, 60), (48, 60, 140), (34, 120, 142), (40, 175, 128), (160, 218, 57), (253, 231, 37)], float)


def overlay(
    image: np.ndarray,
    labels: np.ndarray,
    palette: np.ndarray,
    names: Sequence[str],
    alpha: float = 0.55,
    legend: bool = True,
) -> np.ndarray:
    """Paints the classes over the photograph, with their outlines and a legend, at the photograph's own size.

    Args:
      image: [H, W, 3] uint8 RGB.
      labels: [H, W] integers, class ids; 255 = void.
      palette: [256, 3] uint8 RGB.
      names: name of each class id.
      alpha: how much of the class colour covers the photograph, 0..1.
      legend: names the classes that occur, largest first, as many as there is room for.

    Returns:
      [H, W, 3] uint8 RGB.
    """
    colors = palette[labels]
    painted = np.empty(image.shape, np.uint8)
    for rows in _row_blocks(image.shape):  # no float copy of a 50-megapixel photograph
        painted[rows] = np.rint(image[rows] * np.float32(1 - alpha) + colors[rows] * np.float32(alpha))
    edge = np.zeros(labels.shape, bool)
    edge[1:] |= labels[1:] != labels[:-1]
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    painted[edge] = colors[edge]
    return draw_legend(painted, labels, palette, names) if legend else painted


def legend_name(i: int, names: Sequence[str]) -> str:
    """The legend's text for class `i`: its name, or its number if no available font has every letter of the name."""
    return fonts.drawable(names[i], f"class {i}") if i < len(names) else str(i)


def draw_legend(image: np.ndarray, labels: np.ndarray, palette: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Draws the classes that occur into the lower left corner of a copy of `image`, [H, W, 3] uint8."""
    height, width = image.shape[:2]
    size = int(np.clip(min(height, width) / 28, 9, 72))
    counts = np.bincount(labels.ravel(), minlength=256)
    present = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    entries = [(palette[i], "void" if i == VOID else legend_name(i, names)) for i in present]
    row, gap = round(1.45 * size), size // 2
    room = (height - 2 * gap) // row
    lengths = [round(font.getlength(text)) for _, text in entries if (font := fonts.font_of(text, size))]
    box = max(lengths, default=0) + 2 * gap + size + gap // 2
    if room < 1 or box + 2 * gap > width:
        return image.copy()
    entries = entries[:room]
    picture = Image.fromarray(np.ascontiguousarray(image))
    top = height - gap - row * len(entries)
    corner = (gap, top - gap // 2, gap + box, height - gap // 2)
    shade = picture.crop(corner)
    picture.paste(Image.blend(shade, Image.new("RGB", shade.size, _INK), 0.65), corner[:2])
    draw = ImageDraw.Draw(picture)
    for i, (color, text) in enumerate(entries):
        y = top + i * row
        x = 2 * gap
        draw.rectangle((x, y + row // 6, x + size, y + row // 6 + size), fill=tuple(color.tolist()), outline=_PAPER)
        draw.text((x + size + gap, y + row / 2), text, fill=_PAPER, font=fonts.font_of(text, size), anchor="lm")
    return np.asarray(picture)


def error_map(image: np.ndarray, labels: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The photograph in gray, wrong pixels red, void pixels dark; all [H, W(, 3)] uint8, returns [H, W, 3] uint8."""
    gray = np.asarray(Image.fromarray(np.ascontiguousarray(image)).convert("L"))
    picture = np.repeat((gray // 2 + 110)[..., None], 3, axis=-1).astype(np.uint8)
    picture[truth == VOID] //= 3
    picture[(labels != truth) & (truth != VOID)] = (214, 39, 40)
    return picture


def side_by_side(images: Sequence[np.ndarray], titles: Sequence[str], gap: int = 6) -> np.ndarray:
    """Puts pictures in a row, each under its title.

    Args:
      images: [h, w, 3] uint8 each; smaller ones are aligned at the top.
      titles: one per picture, shortened to fit.
      gap: pixels between pictures.

    Returns:
      [H, W, 3] uint8.

    Raises:
      ValueError: there are not as many titles as pictures.
    """
    if len(images) != len(titles):
        raise ValueError(f"{len(images)} pictures but {len(titles)} titles; each picture needs one")
    size = int(np.clip(min(i.shape[1] for i in images) / 24, 10, 48))
    bar = round(1.8 * size)
    canvas = Image.new(
        "RGB",
        (sum(i.shape[1] for i in images) + gap * (len(images) + 1), max(i.shape[0] for i in images) + bar + gap),
        _PAPER,
    )
    draw, font, x = ImageDraw.Draw(canvas), ImageFont.load_default(size), gap
    for image, title in zip(images, titles, strict=True):
        canvas.paste(Image.fromarray(np.ascontiguousarray(image)), (x, bar))
        draw.text((x, bar / 2), _fit(title, font, image.shape[1]), fill=_INK, font=font, anchor="lm")
        x += image.shape[1] + gap
    return np.asarray(canvas)


def stack(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Puts pictures of any width, [h, w, 3] uint8, under one another."""
    width = max(r.shape[1] for r in rows)
    padded = [np.pad(r, [(0, 0), (0, width - r.shape[1]), (0, 0)], constant_values=_PAPER[0]) for r in rows]
    return np.concatenate(padded)


def heat(values: np.ndarray) -> np.ndarray:
    """Colours of values in 0..1: [H, W] to [H, W, 3] uint8, dark blue for 0, yellow for 1."""
    at = np.clip(np.nan_to_num(values.astype(np.float32)), 0, 1) * (len(_HEAT) - 1)
    knots = np.arange(len(_HEAT))
    return np.stack([np.interp(at, knots, _HEAT[:, c]) for c in range(3)], -1).round().astype(np.uint8)


def confusion_picture(confusion: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The confusion matrix [C, C] (rows are the truth) in percent of the true pixels, as [H, W, 3] uint8."""
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    number = len(names)
    side = float(np.clip(2.2 + 0.42 * number, 5, 22))
    figure = _figure(side + 0.8, side)
    axes = figure.add_subplot()
    shown = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(number), names, rotation=90)
    axes.set_yticks(range(number), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("truth")
    if number <= 40:
        for y, x in np.argwhere(share >= 0.005):
            ink = "white" if share[y, x] > 0.5 else "black"
            axes.text(x, y, f"{100 * share[y, x]:.0f}", ha="center", va="center", color=ink, fontsize=7)
    figure.colorbar(shown, ax=axes, fraction=0.046, label="share of the true pixels")
    return _pixels(figure)


def trimap_plot(results: Sequence[dict]) -> np.ndarray:
    """Mean IoU and pixel accuracy in bands around boundaries (v1, Figure 5), as [H, W, 3] uint8.

    Args:
      results: entries as `evaluation.evaluate` returns them, one line each.
    """
    figure = _figure(10, 4)
    for place, (key, title) in enumerate((("pixel_accuracy", "pixel accuracy"), ("mean_iou", "mean IoU")), start=1):
        axes = figure.add_subplot(1, 2, place)
        for r in results:
            widths = sorted(int(w) for w in r["trimap"])
            values = [r["trimap"][str(w)][key] for w in widths]
            label = f"CRF, {r['crf_iterations']} iterations" if r["crf_iterations"] else "network alone"
            axes.plot(widths, [np.nan if v is None else 100 * v for v in values], marker="o", markersize=3, label=label)
        axes.set_xticks(widths if len(widths) <= 10 else [w for w in widths if w == widths[0] or w % 5 == 0])
        axes.set_xlabel("trimap width [pixels]")
        axes.set_ylabel(f"{title} [%]")
        axes.grid(alpha=0.3)
        axes.legend()
    return _pixels(figure)


def _figure(width: float, height: float):
    """An empty figure of this size in inches, without the global state of pyplot; imports matplotlib only for plots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _pixels(figure) -> np.ndarray:
    out = io.BytesIO()
    figure.savefig(out, format="png", bbox_inches="tight")
    return np.asarray(Image.open(out).convert("RGB"))


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-2].rstrip() + "…"
    return text


def _row_blocks(shape: tuple[int, ...]):
    step = max(1, 1_000_000 // max(shape[1], 1))
    return (slice(y, y + step) for y in range(0, shape[0], step))
