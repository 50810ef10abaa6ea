"""A label map, and a photograph, in every kind that the tables have: written, and read back."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from deeplab_jax.errors import UserError
from deeplab_jax.imaging import decoding, masks, photographs
from tests.imaging.writers import gray_and_opacity16_png, gray_png, pillow, rgb16_png, tiff

ROOT = Path(__file__).resolve().parents[2]
PALETTE = np.random.default_rng(0).permutation(256)[:, None].repeat(3, 1).astype(np.uint8)


def pgm(samples: np.ndarray, largest: int, plain: bool = False) -> bytes:
    head = f"P{2 if plain else 5}\n{samples.shape[1]} {samples.shape[0]}\n{largest}\n".encode()
    if plain:
        return head + " ".join(map(str, samples.ravel().tolist())).encode()
    return head + samples.astype(">u2" if largest > 255 else np.uint8).tobytes()


# (kind of the table, largest id, how it is written)
WRITERS = [
    ("8 bits", 3, lambda m: gray_png(m, 2)), ("8 bits", 15, lambda m: gray_png(m, 4)),
    ("8 bits", 255, lambda m: gray_png(m, 8)), ("16 bits", 255, lambda m: gray_png(m, 16)),
    ("1 bit", 1, lambda m: gray_png(m, 1)),
    *(("1 bit", 1, lambda m, p=p: tiff(m, 1, p)) for p in (0, 1)),
    *(("8 bits", 3, lambda m, p=p: tiff(m, 2, p)) for p in (0, 1)),
    *(("8 bits", 15, lambda m, p=p: tiff(m, 4, p)) for p in (0, 1)),
    *(("8 bits", 255, lambda m, p=p: tiff(m, 8, p)) for p in (0, 1)),
    *(("16 bits", 255, lambda m, o=o: tiff(m, 16, 1, order=o)) for o in (b"II", b"MM")),
    ("8 bits", 12, lambda m: pgm(m, 12)), ("8 bits", 12, lambda m: pgm(m, 12, plain=True)),
    ("8 bits", 255, lambda m: pgm(m, 255)), ("16 bits", 255, lambda m: pgm(m, 1000)),
    ("1 bit", 1, lambda m: pillow(m == 0, "PPM")),  # PBM stores 1 for black
    ("float", 255, lambda m: pillow(m.astype(np.float32), "TIFF")),
    ("16 bits", 255, lambda m: pillow(m.astype(np.int32), "TIFF")),
    *(("palette", 255, lambda m, k=k: pillow(m, k, PALETTE)) for k in ("PNG", "BMP", "TIFF", "TGA")),
    ("palette", 255, lambda m: pillow(m, "GIF", PALETTE, optimize=False)),
    *(("palette", 2, lambda m, b=b: pillow(m, "PNG", PALETTE[:3], bits=b)) for b in (2, 4)),
    ("gray with opacity", 255, lambda m: pillow(np.stack([m, m], -1), "PNG")),
    ("8 bits", 255, lambda m: pillow(m, "JPEG2000")),
    ("color", 255, lambda m: pillow(np.stack([m, m, m], -1), "PNG")),
    ("color", 255, lambda m: pillow(np.stack([m, m, m, m // 2], -1), "PNG")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "largest", "write"), WRITERS, ids=lambda v: str(v) if not callable(v) else "")
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_a_label_map_is_read_back_in_every_kind(kind, largest, write, data):
    seed = data.draw(st.integers(0, 2**16))
    height, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 19))
    label = np.random.default_rng(seed).integers(0, largest + 1, (height, width)).astype(np.uint8)
    encoded = write(label)
    np.testing.assert_array_equal(masks.read_label(encoded), label)
    image = decoding.open_image(encoded, load=False)
    # Pillow keeps no palette that is a gray ramp, nor a gray TIFF's tag of 32 bits.
    found = next(k for k in masks.MASK_KINDS if k.fits(image)).name
    assert found == kind


def rows(heading: str) -> list[tuple[str, ...]]:
    """The table of docs/own_data.md under this heading."""
    _, _, rest = (ROOT / "docs" / "own_data.md").read_text().partition(f"\n{heading}\n|---|---|\n")
    lines = rest.partition("\n\n")[0].splitlines()
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def test_every_kind_of_mask_has_its_line_and_its_writer():
    assert rows("| mask | its samples |") == [(kind.name, kind.reads) for kind in masks.MASK_KINDS]
    assert {kind for kind, _, _ in WRITERS} == {kind.name for kind in masks.MASK_KINDS}


PHOTO = np.random.default_rng(3).integers(0, 256, (5, 7, 3)).astype(np.uint8)
PHOTO[0, 0] = 255  # all bits are in use
DEEP = PHOTO.astype(np.uint16) * 257
GRAY = PHOTO[..., 0]
SEEN = np.random.default_rng(4).integers(0, 2, (5, 7, 1)).astype(bool)
RGBA = np.dstack([PHOTO, SEEN * np.uint8(255)])
CMYK = Image.fromarray(PHOTO).convert("CMYK")


def saved(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def gray(values: np.ndarray) -> np.ndarray:
    return values[..., None].repeat(3, -1)


# kind of the table -> (files, the expected reading)
PHOTOGRAPHS = {
    "planar 16 bits": ([tiff(DEEP, 16, 2, True, o) for o in (b"II", b"MM")], PHOTO),
    "16-bit transparent": (
        [rgb16_png(np.dstack([DEEP, SEEN * np.uint16(65535)])), rgb16_png(np.where(SEEN, DEEP, 256), (256,) * 3)],
        np.where(SEEN, PHOTO, 255),
    ),
    "16-bit color": ([rgb16_png(DEEP), tiff(DEEP, 16, 2)], PHOTO),
    "16-bit gray": ([gray_png(DEEP[..., 0], 16), tiff(DEEP[..., 0], 16, 1), pgm(DEEP[..., 0], 65535)], gray(GRAY)),
    "float": ([pillow(GRAY.astype(np.float32), "TIFF"), pillow((GRAY / 255).astype(np.float32), "TIFF")], gray(GRAY)),
    "transparent": ([pillow(RGBA, "PNG"), tiff(RGBA, 8, 2, extra=2)], np.where(SEEN, PHOTO, 255)),
    "other bands": ([tiff(np.dstack([PHOTO, GRAY]), 8, 2, extra=0)], PHOTO),
    "cmyk": ([saved(CMYK, "TIFF")], np.array(CMYK.convert("RGB"))),
    "gray": ([pillow(GRAY, k) for k in ("PNG", "TIFF", "BMP")] + [pgm(GRAY, 255)], gray(GRAY)),
    "palette": ([pillow(GRAY, k, PALETTE) for k in ("PNG", "BMP", "TIFF")], PALETTE[GRAY]),
    "color": ([pillow(PHOTO, k) for k in ("PNG", "BMP", "TIFF", "PPM", "TGA")] + [pillow(PHOTO, "JPEG2000")], PHOTO),
}


def test_opacity_of_16_bits_leaves_the_colors_their_own():
    """Colors of 12 bits: an opaque 65535 beside them must not make them a sixteenth as bright."""
    twelve = np.rint(PHOTO / 255 * 4095).astype(np.uint16)
    opaque = np.full((5, 7, 1), 65535, np.uint16)
    for data in (rgb16_png(np.dstack([twelve, opaque])), tiff(np.dstack([twelve, opaque]), 16, 2, True)):
        np.testing.assert_array_equal(photographs.read_photograph(data), PHOTO)
    seen = SEEN * np.uint16(65535)
    for white in (4095, 65535):
        deep = np.rint(GRAY / 255 * white).astype(np.uint16)
        expected = np.where(SEEN, gray(GRAY), 255)
        found = photographs.read_photograph(gray_and_opacity16_png(np.dstack([deep, seen])))
        np.testing.assert_array_equal(found, expected)


def test_every_kind_of_image_has_its_line_and_its_files():
    assert rows("| image | read as |") == [(kind.name, kind.reads) for kind in photographs.IMAGE_KINDS]
    assert list(PHOTOGRAPHS) == [kind.name for kind in photographs.IMAGE_KINDS]


@pytest.mark.parametrize("kind", PHOTOGRAPHS)
def test_a_photograph_of_every_kind_is_read_as_its_line_says(kind):
    encoded, expected = PHOTOGRAPHS[kind]
    for data in encoded:
        row = photographs.kind_of(decoding.open_image(data, load=False), data)
        assert row.name == kind
        assert bool(row.note) == ("; a note" in row.reads)
        np.testing.assert_array_equal(photographs.read_photograph(data), expected)


def test_colors_of_any_palette_are_looked_up_whatever_their_order():
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255]], np.uint8)
    rng = np.random.default_rng(1)
    for _ in range(20):
        palette = rng.permutation(np.concatenate([colors[:3], [[255, 255, 255]], [[224, 224, 192]]]))
        indices = rng.integers(0, 5, (6, 7)).astype(np.uint8)
        shown = palette[indices]
        expected = np.full((6, 7), 255, np.uint8)
        for i, color in enumerate(colors):
            expected[(shown == color).all(-1)] = i
        found = masks.read_label(pillow(indices, "PNG", palette), colors=colors)
        np.testing.assert_array_equal(found, expected)


def test_a_transparent_sample_of_16_bits_is_white_and_does_not_count_as_in_use():
    deep = np.array([[[0, 100, 500], [1023, 0, 7], [65535, 0, 0], [65535, 0, 1]]], np.uint16)
    expected = np.rint(deep * np.float32(255 / 65535)).astype(np.uint8)
    expected[0, 2] = 255
    np.testing.assert_array_equal(photographs.read_photograph(rgb16_png(deep, (65535, 0, 0))), expected)
    gray_samples = np.array([[0, 512, 1023, 40000]], np.uint16)
    expected = gray(np.array([[0, 128, 255, 255]], np.uint8))
    np.testing.assert_array_equal(photographs.read_photograph(gray_png(gray_samples, 16, 40000)), expected)
    row = photographs.kind_of(decoding.open_image(rgb16_png(deep, (1, 2, 3)), load=False), b"")
    assert "16 bits and transparency" in row.note


def test_the_bits_in_use_decide_what_is_white():
    deep = np.array([[[0, 100, 500], [1023, 0, 7]]], np.uint16)
    for scale, white in ((1, 1023), (4, 4095), (16, 16383), (64, 65535)):
        values = deep * np.uint16(scale)
        values[0, 1, 0] = white
        expected = np.rint(values * np.float32(255 / white)).astype(np.uint8)
        for encoded in (rgb16_png(values), *(tiff(values, 16, 2, p, o) for p in (0, 1) for o in (b"II", b"MM"))):
            np.testing.assert_array_equal(photographs.read_photograph(encoded), expected)
        gray = gray_png(values[..., 0], 16)
        np.testing.assert_array_equal(photographs.read_photograph(gray)[..., 1], expected[..., 0])
    low = np.array([[0, 200]], np.uint16)  # 8 bits are enough
    np.testing.assert_array_equal(photographs.read_photograph(gray_png(low, 16))[..., 2], low)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[-1.0, 2]], np.float32), "holds values from -1 to 2; scale them to 0..255"),
        (np.array([[np.nan, 2]], np.float32), "holds NaN or infinite values"),
        (np.array([[0, 70000]], np.int32), "holds values from 0 to 70000"),
    ],
)
def test_samples_that_are_no_photograph_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        photographs.read_photograph(pillow(values, "TIFF"), "a.tif")


def test_other_bands_are_told():
    with pytest.raises(UserError, match=r"a.tif: is a TIFF of 7 bands of 16 bits .*; export its visible bands as RGB"):
        photographs.read_photograph(tiff(np.zeros((3, 4, 7), np.uint16), 16, 1), "a.tif")


def test_of_several_frames_the_first_is_read_and_said():
    frames = [Image.fromarray(np.full((4, 5, 3), v, np.uint8)) for v in (10, 90)]
    for kind in ("TIFF", "GIF", "WEBP"):
        out, said = io.BytesIO(), []
        options = {"lossless": True} if kind == "WEBP" else {}
        frames[0].save(out, kind, save_all=True, append_images=frames[1:], **options)
        found = photographs.read_photograph(out.getvalue(), f"a.{kind}", remark=said.append)
        assert np.abs(found.astype(int) - 10).max() <= 1
        assert said == [f"a.{kind}: has 2 frames; the first is read"]


def test_500_damaged_files_give_a_sentence():
    rng = np.random.default_rng(5)
    label = rng.integers(0, 4, (9, 11)).astype(np.uint8)
    photo = rng.integers(0, 256, (9, 11, 3)).astype(np.uint8)
    whole = [write(np.minimum(label, largest)) for _, largest, write in WRITERS]
    whole += [pillow(photo, k) for k in ("JPEG", "PNG", "BMP", "TIFF", "GIF", "WEBP", "TGA")] + [rgb16_png(photo * 16)]
    refused = 0
    for n in range(500):
        data = bytearray(whole[n % len(whole)])
        for _ in range(int(rng.integers(1, 5))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        if n % 3 == 0:
            del data[int(rng.integers(len(data))) :]
        for read in (masks.read_label, photographs.read_photograph):
            try:
                read(bytes(data), "a.x", **({} if read is masks.read_label else {"refuse_above": 10_000}))
            except UserError as e:
                refused += 1
                assert str(e).startswith("a.x: ") and "\n" not in str(e)
    assert refused > 300
