import subprocess
import sys

import numpy as np
import pytest

from deeplab_jax.imaging import overlay
from deeplab_jax.imaging.palettes import voc_palette

PALETTE = voc_palette()
NAMES = ("background", "aeroplane", "bicycle")


def half_and_half(height=120, width=160):
    labels = np.zeros((height, width), np.uint8)
    labels[:, width // 2 :] = 1
    return np.full((height, width, 3), 100, np.uint8), labels


def test_overlay_blends_and_draws_outlines():
    image, labels = half_and_half()
    found = overlay.overlay(image, labels, PALETTE, NAMES, alpha=0.5, legend=False)
    assert found.shape == image.shape and found.dtype == np.uint8
    np.testing.assert_array_equal(found[0, 0], [50, 50, 50])
    np.testing.assert_array_equal(found[0, -1], [114, 50, 50])
    np.testing.assert_array_equal(found[:, 80], np.tile([128, 0, 0], (120, 1)))  # the outline is in full color


def test_legend_names_what_occurs_within_the_picture():
    image, labels = half_and_half()
    plain = overlay.overlay(image, labels, PALETTE, NAMES, legend=False)
    found = overlay.overlay(image, labels, PALETTE, NAMES)
    assert found.shape == image.shape
    changed = (found != plain).any(-1)
    assert changed.any() and not changed[: image.shape[0] // 2].any()  # lower left corner only
    assert (found == [128, 0, 0]).all(-1)[changed].any()  # the swatch of class 1
    labels[:] = 7  # a class without a name, and void
    labels[0] = 255
    assert overlay.overlay(image, labels, PALETTE, NAMES).shape == image.shape


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (12, 12)])
def test_pictures_too_small_for_a_legend_have_none(size):
    image, labels = np.zeros((*size, 3), np.uint8), np.ones(size, np.uint8)
    found = overlay.overlay(image, labels, PALETTE, NAMES)
    np.testing.assert_array_equal(found, overlay.overlay(image, labels, PALETTE, NAMES, legend=False))


def test_many_classes_do_not_outgrow_the_picture():
    labels = np.arange(60 * 200).reshape(60, 200) % 60
    found = overlay.overlay(np.zeros((60, 200, 3), np.uint8), labels, PALETTE, [f"c{i}" for i in range(60)])
    assert found.shape == (60, 200, 3)


def test_the_arguments_are_left_alone():
    image, labels = half_and_half()
    overlay.overlay(image, labels, PALETTE, NAMES)
    assert (image == 100).all() and labels.sum() == 120 * 80


def test_error_map_marks_wrong_pixels_but_not_void():
    image, truth = half_and_half()
    labels = np.zeros_like(truth)
    truth[:10] = 255
    found = overlay.error_map(image, labels, truth)
    red = (found == [214, 39, 40]).all(-1)
    np.testing.assert_array_equal(red, (truth == 1))


def test_side_by_side_keeps_every_pixel():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in ((40, 50), (60, 70))]
    found = overlay.side_by_side(images, ["a", "a title much too long for a picture this narrow"], gap=4)
    assert found.shape[1] == 4 + 50 + 4 + 70 + 4
    bar = found.shape[0] - 60 - 4
    np.testing.assert_array_equal(found[bar : bar + 40, 4:54], images[0])
    np.testing.assert_array_equal(found[bar : bar + 60, 58:128], images[1])
    assert (found[:bar] < 100).any()  # the titles
    with pytest.raises(ValueError, match="1 pictures but 2 titles"):
        overlay.side_by_side(images[:1], ["a", "b"])


def test_stack_pads_to_the_widest():
    found = overlay.stack([np.zeros((3, 5, 3), np.uint8), np.zeros((2, 9, 3), np.uint8)])
    assert found.shape == (5, 9, 3) and (found[0, 5:] == 250).all()


def test_heat_gets_lighter():
    found = overlay.heat(np.linspace(0, 1, 50)[None])[0].astype(int)
    lightness = found @ [0.299, 0.587, 0.114]
    assert (np.diff(lightness) > 0).all()
    np.testing.assert_array_equal(
        overlay.heat(np.array([[np.nan, -1, 2]]))[0], [[12, 7, 60], [12, 7, 60], [253, 231, 37]]
    )


def test_plots_are_pictures():
    confusion = np.array([[90, 10], [5, 15]])
    assert overlay.confusion_picture(confusion, ("sky", "car")).shape[2] == 3
    assert overlay.confusion_picture(np.zeros((60, 60), int), [str(i) for i in range(60)]).dtype == np.uint8
    band = {"mean_iou": 0.4, "pixel_accuracy": 0.7}
    bands = {"1": band | {"pixel_accuracy": None}, "10": band}
    results = [{"crf_iterations": n, "trimap": bands} for n in (0, 10)]
    assert overlay.trimap_plot(results).std() > 0


def test_matplotlib_is_loaded_for_plots_only():
    code = "import sys; import deeplab_jax.imaging.overlay; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_legends_have_names_of_many_scripts_and_numbers_for_others(monkeypatch, caplog):
    from deeplab_jax.imaging import fonts

    monkeypatch.setattr(fonts, "SYSTEM_FONTS", ("no such font.ttf",))
    for cached in (fonts.font_of, fonts._say):
        cached.cache_clear()
    names = ("road", "Straße", "дорога", "写", "شارع", "re\u0301sume\u0301", "a\u00a0b", "写")
    found = [overlay.legend_name(i, names) for i in range(9)]
    assert found == [*names[:3], "class 3", *names[4:7], "class 7", "8"]
    overlay.legend_name(3, names)
    told = [r.getMessage() for r in caplog.records]
    assert len(told) == 2 and told[0].startswith("'写': no font on this computer has these letters")  # each once
    labels = np.repeat(np.arange(4, dtype=np.uint8), 60)[:, None].repeat(300, 1)
    palette = np.full((256, 3), 90, np.uint8)
    image = np.zeros((240, 300, 3), np.uint8)
    first, second = (overlay.overlay(image, labels, palette, n) for n in (names, ("a", "b", "c", "d")))
    assert (first != second).any()


def test_a_font_of_the_system_is_taken_where_it_has_the_letters(monkeypatch):
    import os

    import matplotlib

    from deeplab_jax.imaging import fonts

    folder = os.path.join(matplotlib.get_data_path(), "fonts", "ttf")
    monkeypatch.setattr(fonts, "SYSTEM_FONTS", (os.path.join(folder, "STIXGeneral.ttf"),))
    fonts.font_of.cache_clear()
    letter = "\u1d81"  # in STIX, not in DejaVu
    assert fonts.font_of("дом", 20).path.endswith("DejaVuSans.ttf")
    assert fonts.font_of(letter, 20).path.endswith("STIXGeneral.ttf")
    assert fonts.font_of(f"{letter}写", 20) is None
    fonts.font_of.cache_clear()
