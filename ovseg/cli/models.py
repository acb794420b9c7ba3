"""List the models and the weights that -m can name.

  ovseg models
  ovseg models "ViT-B-16*"

  ovseg models pacl_lite0              and the names that its bundled weights know

Beside the presets stand open_clip's architectures, each with its tags: NAME:TAG. Others:
hf-hub:OWNER/NAME and paths.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    sub.add_argument("pattern", nargs="?", default="*")


def run(options: argparse.Namespace) -> int:
    """Print the names; returns the exit code."""
    from ..nn.clip_architectures import import_open_clip
    from ..progress import note
    from ..systems import DEFAULT_MODEL, PHOTO_MODEL, list_models, list_pretrained
    from ..systems.names import unknown
    from ..systems.registry import bundled_weights

    bundled: dict[str, dict[str, Path]] = {}
    for (model, tag), folder in bundled_weights().items():
        bundled.setdefault(model, {})[tag] = folder
    tags: dict[str, list[str]] = {}
    for model, tag in list_pretrained():
        tags.setdefault(model, []).append(tag)
    own = list_models(options.pattern)
    others = [name for name in tags if name not in list_models() and fnmatch(name, options.pattern)]
    if not own and not others:
        raise unknown(options.pattern, "pattern")
    for name in own:
        how = "weights by tag, Hub or path" if "clip_dense" in name else "by path"
        if name in bundled:
            how = f"bundled: {', '.join(bundled[name])}"
        print(f"{name:24} {how}")
        for tag, folder in bundled.get(name, {}).items():
            _print_facts(f"{name}:{tag}", folder, words=name == options.pattern)
    for name in others:
        print(f"{name:24} {', '.join(tags[name])}")
    try:
        import_open_clip()
    except ImportError as error:
        note(f"Without names of open_clip's: {error}")
    photo, _, tag = PHOTO_MODEL.partition(":")
    stand_in = f", {PHOTO_MODEL} where it cannot be had" if tag in bundled.get(photo, {}) else ""
    print(f"default: {DEFAULT_MODEL}{stand_in}")
    print("forms: NAME:TAG, NAME:PATH, hf-hub:OWNER/NAME, PATH")
    return 0


def _print_facts(named: str, folder: Path, *, words: bool) -> None:
    """Print what a bundled folder says of its weights.

    Args:
        named: what ``-m`` takes.
        folder: of ``save_bundled``.
        words: whether the names of its vocabulary are listed.
    """
    from ..weights.saving import read_config

    config = read_config(folder)
    known = _vocabulary(config)
    if {"saw", "licence"} <= config.keys():
        count = f"{len(known)} names; " if known else ""
        print(f"{'':24} {count}licence {config['licence']}; saw {config['saw']}")
    if words and known:
        print(f"{named} knows these names, and what else they are called: {', '.join(known)}")


def _vocabulary(config: Mapping[str, Any]) -> list[str]:
    """Return the names that a saved model holds vectors of; none of other text towers."""
    text = config["options"].get("backbone", {}).get("text")
    names = text.get("words") if isinstance(text, dict) else None
    return list(names) if isinstance(names, dict) else []
