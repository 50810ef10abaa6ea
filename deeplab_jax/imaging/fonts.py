"""Fonts for names in any script."""

import functools
import logging
import os
import unicodedata

from PIL import ImageFont

# System fonts for scripts that matplotlib's font lacks; Pillow looks for them in the system's font folders.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "msyh.ttc",
    "msgothic.ttc", "malgun.ttf", "Arial Unicode.ttf", "arialuni.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansBengali-Regular.ttf", "NotoSansTamil-Regular.ttf", "NotoSansThai-Regular.ttf",
    "NotoSansEthiopic-Regular.ttf", "Nirmala.ttf", "LeelawUI.ttf", "FreeSans.ttf", "unifont.ttf",
)  # fmt: skip


@functools.cache
def font_of(text: str, size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont | None:
    """A font of this size in pixels with every letter of a text; None if this computer has none.

    Pillow's own font for ASCII, else matplotlib's font of many scripts, else one of `SYSTEM_FONTS`.
    """
    if text.isascii():
        return ImageFont.load_default(size)
    import matplotlib

    for name in (os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), *SYSTEM_FONTS):
        try:
            font = ImageFont.truetype(name, size)
        except OSError:  # not on this computer
            continue
        if _has(font, text):
            return font
    return None


def drawable(text: str, otherwise: str) -> str:
    """The text, or `otherwise` if no font has its letters, which is reported once."""
    if font_of(text, 20) is not None:
        return text
    _say(text, otherwise)
    return otherwise


@functools.cache
def _say(text: str, otherwise: str) -> None:
    logging.getLogger(__name__).warning(
        "'%s': no font on this computer has these letters, so legends show '%s'; install a font such as Noto Sans CJK "
        "to show them",
        text,
        otherwise,
    )


def _has(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has every letter: a missing one is drawn like a character that Unicode does not define."""
    lacking = bytes(font.getmask("\U0010fffe"))
    unseen = ("Mn", "Me", "Cf", "Zs")  # marks, joiners and spaces may draw nothing by themselves
    return all(unicodedata.category(c) in unseen or bytes(font.getmask(c)) != lacking for c in text)
