"""List the models and which weights come with the package.

  ovseg models
  ovseg models "pacl*"
"""

from __future__ import annotations

import argparse


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("pattern", nargs="?", default="*")


def run(options: argparse.Namespace) -> int:
    from ..models import list_models, list_pretrained

    tags: dict[str, list[str]] = {}
    for model, tag in list_pretrained():
        tags.setdefault(model, []).append(tag)
    for name in list_models(options.pattern):
        print(f"{name:24} {'bundled: ' + ', '.join(tags[name]) if name in tags else 'no weights bundled'}")
    return 0
