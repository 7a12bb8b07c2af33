"""Captions with one attribute's value exchanged, false and otherwise the same (section 5.6)."""

from __future__ import annotations

import re

SKIN_TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

_TONE = re.compile(r"\b(medium-light|medium-dark|light|medium|dark)(?= skin tone\b)")
_MALE = {"man": "woman", "men": "women"}
_FEMALE = {"woman": "man", "women": "men"}
_EXCHANGED = _MALE | _FEMALE
_PERSON = re.compile(rf"\b({'|'.join(_EXCHANGED)})\b")


def exchanged_attributes(caption: str) -> dict[str, list[str]]:
    """The name of an emoji with one attribute's value exchanged for every other value.

    Args:
        caption: such as "woman detective medium skin tone".

    Returns:
        By "skin_tone" four false captions, if the caption has exactly one tone, and by "gender" one
        with all men and women exchanged, if only one of the two occurs. Chance is 0.2 and 0.5.
    """
    found = {}
    tones = _TONE.findall(caption)
    if len(tones) == 1:
        found["skin_tone"] = [_TONE.sub(t, caption) for t in SKIN_TONES if t != tones[0]]
    people = set(_PERSON.findall(caption))
    if people and (people <= _MALE.keys() or people <= _FEMALE.keys()):
        found["gender"] = [_PERSON.sub(lambda word: _EXCHANGED[word.group()], caption)]
    return found
