"""Numbers and strings as a figure can show them."""

from __future__ import annotations

from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font


def number(value: float, digits: int = 2) -> str:
    """A number with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def signed(value: float, digits: int = 2) -> str:
    """A difference, with its sign always."""
    return f"{value:+.{digits}f}".replace("-", "\N{MINUS SIGN}")


def plain(text: str, letters: int = 0) -> str:
    """A string of the user's as a figure can show it, in one line and, if told, of so many letters.

    What the font cannot draw becomes a box, and a dollar is a dollar, not the start of a formula.
    """
    text = "".join(c if c == " " or _drawable(c) else "\N{WHITE SQUARE}" for c in _visible(text))
    if letters and len(text) > letters:
        half = (letters - 1) // 2
        text = text[: letters - 1 - half] + "\N{HORIZONTAL ELLIPSIS}" + text[-half:]
    return text.replace("$", r"\$")


def _visible(text: str) -> str:
    return " ".join(text.replace("\n", "\N{RETURN SYMBOL}").replace("\t", " ").split())


def _drawable(character: str) -> bool:
    return ord(character) in _characters()


@cache
def _characters() -> frozenset[int]:
    return frozenset(get_font(findfont(FontProperties(family="DejaVu Sans"))).get_charmap())
