"""What the embedded model learned to draw, and what in a prompt it did not."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache

from zimage_core.assets import NANO
from zimage_core.errors import printable

WORDS = NANO / "words.json"
"""Kind of word -> the words of all training prompts; `benchmarks.nano.export` writes it."""
_MOST = {"colours": 2, "shapes": 1, "sizes": 1, "places": 1, "counts": 1}


@cache
def learned() -> dict[str, list[str]]:
    """The words of the training prompts by kind: colours, shapes, places, glyphs and so on."""
    found: dict[str, list[str]] = json.loads(WORDS.read_text("utf-8"))
    return found


@cache
def _reader() -> tuple[re.Pattern[str], dict[str, str]]:
    """A pattern that cuts a prompt into words, and the kind of each word."""
    kinds = {word: kind for kind, words in learned().items() if kind != "glyphs" for word in words}
    together = "|".join(sorted((word for word in kinds if not word.isascii()), key=len, reverse=True))
    named = f"(?:{'|'.join(learned()['kinds'])}) ?(?P<glyph>[{''.join(learned()['glyphs'])}])(?![A-Za-z])"
    return re.compile(rf"{named}|{together}|[A-Za-z]+|\S"), kinds


def remark(prompt: str) -> str:
    """One sentence on what in a prompt the embedded model never learned; "" if it can draw it all."""
    pattern, kinds = _reader()
    seen: Counter[str] = Counter()
    unknown: list[str] = []
    end = -1
    text = prompt.strip().rstrip(".!。")
    for found in pattern.finditer(text):
        word = found[0]
        kind = kinds.get(word) or (kinds.get(word[0].lower() + word[1:]) if found.start() == 0 else None)
        if found["glyph"] or (kind is None and word in learned()["glyphs"]):
            kind = "glyphs"
        if kind is not None:
            seen[kind] += 1
        elif found.start() == end:
            unknown[-1] += word
        else:
            unknown.append(word)
        end = found.end() if kind is None else -1
    if not (seen["shapes"] or seen["glyphs"]) and re.search(f"[{''.join(learned()['glyphs'])}]", text):
        seen["glyphs"], seen["sizes"] = 1, 0  # one that is an article or a size elsewhere, such as A or 大
    subjects = seen["shapes"] + seen["glyphs"]
    unknown = list(dict.fromkeys(unknown))
    if unknown:
        fault = "the word " if len(unknown) == 1 else "the words "
        fault += ", ".join(f"'{printable(word, 30)}'" for word in unknown[:3])
    elif subjects != 1:
        fault = "several things in one image" if subjects else "a prompt that names no shape or letter"
    elif any(seen[kind] > most for kind, most in _MOST.items()):
        fault = "so many colours, sizes or places"
    elif seen["sizes"] + seen["places"] and seen["glyphs"] + seen["counts"]:
        fault = "sizes and places of letters or of several shapes"
    else:
        return ""
    colours, shapes = ([word for word in learned()[kind] if word.isascii()] for kind in ("colours", "shapes"))
    singular = [word for word in shapes if not word.endswith("s") or f"{word}es" in shapes]
    return (
        f"the embedded model never learned {fault}; it draws one {', '.join(singular)}, letter, digit or "
        f'Chinese character in {", ".join(colours)} on a background, such as "a small red circle on the left '
        'of a blue background"; docs/explanation/nano.md has all its words'
    )
