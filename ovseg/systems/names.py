"""Names as the field writes them, for ``-m`` and ``from_pretrained``.

    NAME                a preset of ovseg (pacl_tiny) or an architecture of open_clip's
                        (ViT-B-16-SigLIP), with one set of weights
    NAME:TAG            clip_dense_vit_b16:openai, ViT-B-16:laion2b_s34b_b88k; TAG may be a path or
                        hf-hub:OWNER/NAME
    hf-hub:OWNER/NAME   a repository that open_clip, transformers or save_pretrained wrote
    PATH                a folder of theirs or of a run, a checkpoint of open_clip's, a published
                        checkpoint of a system

What fits two of them, or none, is refused with the forms to choose from.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any, NamedTuple

from ..errors import InputError
from ..libraries import installed, remedy
from ..nn.clip_architectures import architectures, tags_of
from ..paths import address, exists
from ..weights.hub import PREFIX
from .registry import (
    CLIP_SYSTEM,
    architecture_of,
    bundled_weights,
    is_name,
    list_bundled,
    list_models,
    system_of,
)

# The best published readout without training at ViT-B/16, and the view it was published with:
# docs/weights.md.
DEFAULT_MODEL = "clip_dense_vit_b16:openai"
# where open_clip has it: asked before anything else is loaded
DEFAULT_REPO = "timm/vit_base_patch16_clip_224.openai"
DEFAULT_READOUT = "naclip"
# Bundled, trained on photographs: it answers where the default model cannot be had.
PHOTO_MODEL = "pacl_lite0:photos"
DEFAULT_VIEW = {"short_side": 336, "crop": 224, "stride": 112}


class Named(NamedTuple):
    """The model and the weights that a text names.

    Attributes:
        name: of a model; None where the weights say it.
        weights: a tag, a path or ``hf-hub:OWNER/NAME``; None: the only ones there are.
    """

    name: str | None
    weights: str | None


def parse(text: str) -> Named:
    """Tell the forms of names apart.

    Raises:
        InputError: for what is ambiguous or unknown, with the forms to choose from.
    """
    if not text:  # as a path, the present folder
        raise InputError("model is ''; expected a name or a path (ovseg models lists names)")
    if text.startswith(PREFIX):
        return Named(None, text)
    name, _, tag = text.partition(":")
    named = is_name(text) or (bool(tag) and is_name(name))
    if exists(text):
        if named:
            raise _ambiguous(text)
        return Named(None, text)
    if not named:
        raise unknown(text)
    return Named(name, tag or None)


def _ambiguous(text: str) -> InputError:
    """Return the error for a name that is a path here too."""
    other = "another folder to work in"
    if is_name(text):
        other = f"{text}:TAG ({', '.join(own_tags(text, tags(text)))})"
    return InputError(
        f"model is {text!r}, which is a path here and a name; expected ./{text} for the path or "
        f"{other} for the name"
    )


def tags(name: str) -> dict[str, Any]:
    """Look up the tags that may stand behind a name.

    Return the folder of each one that is inside the package, else what open_clip knows of each one
    of the architecture below the name.
    """
    inside = {tag: path for (known, tag), path in bundled_weights().items() if known == name}
    architecture = architecture_of(name)
    return inside or ({} if architecture is None else dict(sorted(tags_of(architecture).items())))


def own_tags(name: str, found: Iterable[str]) -> list[str]:
    """List the tags, of those that ``tags`` found, that are weights of the model itself.

    For a system that is trained upon a CLIP, open_clip's are none.
    """
    trained = architecture_of(name) is not None and system_of(name) != CLIP_SYSTEM
    return [] if trained else list(found)


def only_tag(name: str, found: list[str]) -> str:
    """Return the one tag that a name without a tag stands for.

    Raises:
        InputError: if there is none, or several.
    """
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"model is {name!r}, of which no weights are published; expected {name}:PATH, the "
            f"folder of a run or of save_pretrained, or {PREFIX}OWNER/NAME. With weights: "
            f"{', '.join(dict.fromkeys(n for n, _ in list_bundled()))}, "
            f"{DEFAULT_MODEL}, ViT-B-16:laion2b_s34b_b88k (ovseg models)"
        )
    raise InputError(
        f"model is {name!r}, of which there are {len(found)} sets of weights; expected one of "
        f"{', '.join(f'{name}:{tag}' for tag in found)}"
    )


def check_name(text: str) -> str:
    """Return ``text`` itself, the name of a model without weights.

    Raises:
        InputError: if there is none of this name.
    """
    if not is_name(text):
        raise unknown(text)
    return text


def unknown(text: str, what: str = "model") -> InputError:
    """Return the error for a name that does not exist, with the closest that do.

    Args:
        text: the name, or a pattern of names.
        what: ``model``, or ``pattern``.
    """
    if (problem := address(text)) is not None:
        return InputError(
            f"{what} is {text!r}, which {problem}; expected NAME, NAME:TAG, {PREFIX}OWNER/NAME "
            "or PATH"
        )
    name, colon, tag = text.partition(":")
    ways = [f"{one}{colon}{tag}" for one in _closest(name)]
    without = ""
    if not installed("open_clip"):
        without = f". Names of open_clip's are known where it is installed: {remedy('open_clip')}"
    if what == "model" and name.count("/") == 1 and not colon and not name.startswith("."):
        ways.append(f"{PREFIX}{text}")
    hint = f"did you mean {' or '.join(ways)}? " if ways else ""
    if what == "pattern":
        return InputError(
            f"pattern is {text!r} and no name matches it; {hint}expected a name or a pattern such "
            f"as '*ViT-B*' (ovseg models lists all){without}"
        )
    return InputError(
        f"model is {text!r}, no path that exists and no known name; {hint}expected NAME, "
        f"NAME:TAG, {PREFIX}OWNER/NAME or PATH (ovseg models lists names){without}"
    )


def _closest(name: str) -> list[str]:
    """List the names that are meant, or up to three that are close."""
    known = {one.lower(): one for one in (*list_models(), *architectures())}
    cleaned = name.replace("/", "-").lower()
    if cleaned in known:
        return [known[cleaned]]
    return [known[one] for one in get_close_matches(cleaned, known, 3, 0.7)]


def unknown_tag(name: str | None, weights: str, found: list[str]) -> InputError:
    """Return the error for weights that are no tag, of those that were found, and no path."""
    if (what := address(weights)) is not None:
        return InputError(f"pretrained is {weights!r}, which {what}; expected a tag or a path")
    close = get_close_matches(weights, found, 1, 0.6)
    hint = f"; did you mean {name}:{close[0]}?" if close else ""
    return InputError(
        f"pretrained is {weights!r}; expected a path that exists or one of the tags {found}{hint}"
    )
