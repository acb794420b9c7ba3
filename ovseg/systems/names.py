"""Names as the field writes them, for ``-m`` and ``from_pretrained``:

    NAME                a preset of ovseg (pacl_tiny) or an architecture of open_clip's (ViT-B-16-SigLIP) with one set of weights
    NAME:TAG            clip_dense_vit_b16:openai, ViT-B-16:laion2b_s34b_b88k; TAG may be a path or hf-hub:OWNER/NAME
    hf-hub:OWNER/NAME   a repository that open_clip, transformers or save_pretrained wrote
    PATH                a folder of theirs or of a run, a checkpoint of open_clip's, a published checkpoint of a system

What fits two of them, or none, is refused with the forms to choose from."""

from __future__ import annotations

from difflib import get_close_matches
from typing import NamedTuple

from ..errors import InputError
from ..libraries import installed, remedy
from ..nn.clip_architectures import architectures, tags_of
from ..paths import address, exists
from ..weights.hub import PREFIX
from .registry import CLIP_SYSTEM, architecture_of, is_name, list_bundled, list_models, preset_of

# The best published readout without training at ViT-B/16, and the view it was published with:
# docs/weights.md.
DEFAULT_MODEL = "clip_dense_vit_b16:openai"
# where open_clip has it: asked before anything else is loaded
DEFAULT_REPO = "timm/vit_base_patch16_clip_224.openai"
DEFAULT_READOUT = "naclip"
DEFAULT_VIEW = {"short_side": 336, "crop": 224, "stride": 112}


class Named(NamedTuple):
    """``name`` of a model, None where the weights say it; ``weights``: a tag, a path or
    ``hf-hub:OWNER/NAME``.
    """

    name: str | None
    weights: str


def parse(text: str) -> Named:
    """What ``text`` names.

    Raises:
        InputError: for what is ambiguous, unknown, or a name without one set of weights; with the
            forms to choose from.
    """
    if not text:  # as a path, the present folder
        raise InputError("model is ''; expected a name or a path (ovseg models lists names)")
    if text.startswith(PREFIX):
        return Named(None, text)
    name, _, tag = text.partition(":")
    named = is_name(text) or (bool(tag) and is_name(name))
    if exists(text):
        if named:
            raise InputError(
                f"model is {text!r}, which is a path here and a name; expected ./{text} for the "
                "path or "
                + (
                    f"{text}:TAG ({', '.join(tags(text))})"
                    if is_name(text)
                    else "another folder to work in"
                )
                + " for the name"
            )
        return Named(None, text)
    if not named:
        raise unknown(text)
    return Named(name, tag or only_tag(name))


def tags(name: str) -> list[str]:
    """The tags that go behind a name: bundled ones, else open_clip's for systems that need no
    training of their own.
    """
    bundled = [tag for known, tag in list_bundled() if known == name]
    architecture = architecture_of(name)
    if bundled or architecture is None or preset_of(name)["system"] != CLIP_SYSTEM:
        return bundled
    return sorted(tags_of(architecture))


def only_tag(name: str) -> str:
    found = tags(name)
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(
            f"model is {name!r}, of which no weights are published; expected {name}:PATH, the "
            "folder of a run or of "
            f"save_pretrained, or {PREFIX}OWNER/NAME. With weights: "
            f"{', '.join(sorted({n for n, _ in list_bundled()}))}, "
            f"{DEFAULT_MODEL}, ViT-B-16:laion2b_s34b_b88k (ovseg models)"
        )
    raise InputError(
        f"model is {name!r}, of which there are {len(found)} sets of weights; expected one of "
        f"{', '.join(f'{name}:{tag}' for tag in found)}"
    )


def check_name(text: str) -> str:
    """``text`` itself, which names an architecture without weights.

    Raises:
        InputError: if there is none of this name.
    """
    if not is_name(text):
        raise unknown(text)
    return text


def unknown(text: str, what: str = "model") -> InputError:
    """The error for a name, or a ``pattern`` of names, that does not exist, with the closest that
    do.
    """
    if (what_it_is := address(text)) is not None:
        return InputError(
            f"{what} is {text!r}, which {what_it_is}; expected NAME, NAME:TAG, {PREFIX}OWNER/NAME "
            "or PATH"
        )
    known = [*list_models(), *architectures()]
    name, colon, tag = text.partition(":")
    plain = {one.lower(): one for one in known}
    cleaned = name.replace("/", "-").lower()
    close = (
        [plain[cleaned]]
        if cleaned in plain
        else [plain[one] for one in get_close_matches(cleaned, plain, 3, 0.7)]
    )
    ways = [f"{one}{colon}{tag}" for one in close]
    without = (
        ""
        if installed("open_clip")
        else f". Names of open_clip's are known where it is installed: {remedy('open_clip')}"
    )
    if what == "pattern":
        return InputError(
            f"pattern is {text!r} and no name matches it; "
            + (f"did you mean {' or '.join(ways)}? " if ways else "")
            + f"expected a name or a pattern such as '*ViT-B*' (ovseg models lists all){without}"
        )
    if name.count("/") == 1 and not colon and not name.startswith("."):
        ways.append(f"{PREFIX}{text}")
    hint = f"did you mean {' or '.join(ways)}? " if ways else ""
    return InputError(
        f"model is {text!r}, no path that exists and no known name; {hint}expected NAME, "
        f"NAME:TAG, {PREFIX}OWNER/NAME or "
        f"PATH (ovseg models lists names){without}"
    )


def unknown_tag(name: str | None, weights: str) -> InputError:
    """The error for weights that are no tag and no path."""
    if (what := address(weights)) is not None:
        return InputError(f"pretrained is {weights!r}, which {what}; expected a tag or a path")
    found = tags(name) if name else []
    close = get_close_matches(weights, found, 1, 0.6)
    hint = f"; did you mean {name}:{close[0]}?" if close else ""
    return InputError(
        f"pretrained is {weights!r}; expected a path that exists or one of the tags {found}{hint}"
    )
