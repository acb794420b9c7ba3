"""Characters in a name that nobody sees: line breaks, control characters, signs without width."""

from __future__ import annotations

import re
import unicodedata

_JOINERS = re.compile(
    "(?<=[^\\x00-\\xff])[\u200c\u200d](?=[^\\x00-\\xff])"
)  # inside of Persian and Indian words, and of emoji
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def invisible_in(text: str) -> str | None:
    """The first invisible character inside a text, in words: "a line break (U+000A)".

    None if there is none.

    Space around the text is not looked at, nor are the spaces of any language.
    """
    for character in _JOINERS.sub("", text.strip()):
        category = unicodedata.category(character)
        code = f"(U+{ord(character):04X})"
        if character in _LINE_BREAKS:
            return f"a line break {code}"
        if character == "\t":
            return f"a tab {code}"
        if category == "Cc":
            return f"a control character {code}"
        if category == "Cf":
            return f"an invisible character {code}"
        if category == "Cs":
            return f"a byte that is no UTF-8 {code}"
    return None
