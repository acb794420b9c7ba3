"""Prompt templates: sets of format strings with one ``{}`` for the label.

Text features are averaged over a set. A template, and a label, must hold no character that nobody
sees.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from ..errors import InputError, first_line

# Inside of Persian and Indian words, and of emoji.
_JOINERS = re.compile("(?<=[^\\x00-\\xff])[\u200c\u200d](?=[^\\x00-\\xff])")
_LINE_BREAKS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
TEMPLATES: dict[str, tuple[str, ...]] = {
    "label": ("{}",),
    "simple": ("a photo of a {}.",),
    # Labels of the scenes bring their article: 'a red seven', 'gravel'.
    "scenes": ("{}", "a photo of {}", "there is {}"),
    # The seven that PACL takes from CLIP's notebook on prompts.
    "pacl7": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
    "zegclip1": ("a photo of a {}",),  # without a full stop
    "zegclip15": (
        *(
            f"{start} a {size}{{}}."
            for start in ("a photo of", "This is a photo of")
            for size in ("", "small ", "medium ", "large ")
        ),
        "a {} in the scene.",
        "a photo of a {} in the scene.",
        "There is a {} in the scene.",
        "There is the {} in the scene.",
        "This is a {} in the scene.",
        "This is the {} in the scene.",
        "This is one {} in the scene.",
    ),
}
NAMES = (*TEMPLATES, "clip80")


def templates(which: str | Sequence[str]) -> tuple[str, ...]:
    """Return a named set or the given format strings, checked.

    ``clip80`` is CLIP's 80 for ImageNet, read from open_clip.

    Raises:
        InputError: as ``check_templates``.
    """
    check_templates(which)
    if isinstance(which, str):
        return _clip80() if which == "clip80" else TEMPLATES[which]
    return tuple(which)


def check_templates(which: Any) -> None:
    """Check that this is a named set or a list of format strings.

    Raises:
        InputError: for an unknown name, an empty list, what is no text, or a template without
            exactly one ``{}`` or with a line break or another invisible character.
    """
    if isinstance(which, str):
        if which not in NAMES:
            raise InputError(
                f"templates is {which!r}; expected one of {list(NAMES)} or a list of format strings"
            )
        return
    if not isinstance(which, (list, tuple)):
        raise InputError(
            f"templates is a {type(which).__name__}; expected one of {list(NAMES)} or a list of "
            "format strings"
        )
    if not which:
        raise InputError(
            "templates is empty; expected at least one format string such as 'a photo of a {}.'"
        )
    for i, template in enumerate(which):
        if not isinstance(template, str):
            raise InputError(
                f"templates[{i}] is a {type(template).__name__}; expected a format string such as "
                f"'a photo of a {{}}.'"
            )
        if template.count("{}") != 1:
            raise InputError(
                f"template {template!r} holds {template.count('{}')} '{{}}'; expected exactly one"
            )
        if "{" in template.replace("{}", "") or "}" in template.replace("{}", ""):
            raise InputError(
                f"template {template!r} holds other braces than its '{{}}'; expected none"
            )
        if (hidden := invisible_in(template)) is not None:
            raise InputError(f"template {template!r} holds {hidden}; expected one without it")


def _clip80() -> tuple[str, ...]:
    try:
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"templates 'clip80' come from open_clip, which does not import ({first_line(error)}): "
            "pip install 'ovseg-kernels[models]', with torch and torchvision of one release"
        ) from error
    return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)


def invisible_in(text: str) -> str | None:
    """Return the first invisible character inside a text, in words; None if there is none.

    Such are line breaks, "a line break (U+000A)", control characters, signs without width. Space
    around the text is not looked at, nor are the spaces of any language.
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
