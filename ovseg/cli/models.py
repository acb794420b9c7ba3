"""List the models and the weights that -m can name.

  ovseg models
  ovseg models "ViT-B-16*"

Beside the presets stand open_clip's architectures, each with its tags: NAME:TAG. Others:
hf-hub:OWNER/NAME and paths.
"""

from __future__ import annotations

import argparse
from fnmatch import fnmatch


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    sub.add_argument("pattern", nargs="?", default="*")


def run(options: argparse.Namespace) -> int:
    """Print the names; returns the exit code."""
    from ..nn.clip_architectures import import_open_clip
    from ..progress import note
    from ..systems import DEFAULT_MODEL, list_bundled, list_models, list_pretrained
    from ..systems.names import unknown

    bundled: dict[str, list[str]] = {}
    for model, tag in list_bundled():
        bundled.setdefault(model, []).append(tag)
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
    for name in others:
        print(f"{name:24} {', '.join(tags[name])}")
    try:
        import_open_clip()
    except ImportError as error:
        note(f"Without names of open_clip's: {error}")
    print(f"default: {DEFAULT_MODEL}; forms: NAME:TAG, NAME:PATH, hf-hub:OWNER/NAME, PATH")
    return 0
