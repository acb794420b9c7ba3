"""``--offline``, ``--no-cache``, ``--readout`` and ``--proxy`` of every command that names a model, and the model that a name means."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import ConfigError, InputError

MODEL_HELP = ("NAME:TAG (ViT-B-16:laion2b_s34b_b88k, clip_dense_vit_b16:openai), a NAME with one set of weights (pacl_tiny), "
              "hf-hub:OWNER/NAME, or the PATH of a run, of a folder or a checkpoint of open_clip, transformers or a system")


def add_weights(sub: argparse.ArgumentParser, *, several: bool = False) -> None:
    sub.add_argument("--offline", action="store_true", help="take weights from the cache and ask nobody (HF_HUB_OFFLINE=1 does the same)")
    sub.add_argument("--no-cache", action="store_true", help="neither read nor write the cache of text embeddings (OVSEG_CACHE=off)")
    sub.add_argument("--readout", help=("comma-separated, of" if several else "of a") + " clip_dense model" + ("s" if several else "")
                     + ": clip, maskclip, sclip, clearclip, naclip, gem, proxyclip")
    sub.add_argument("--proxy", metavar="NAME[:FILE]", help="second encoder, for proxyclip: a ViT of timm's, such as "
                     "vit_base_patch8_224.dino, and its weights where timm shall not fetch them")


def proxy_option(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--proxy`` says, as an option of clip_dense."""
    if options.proxy is None:
        return {}
    name, _, file = options.proxy.partition(":")
    return {"proxy": {"name": name, "weights": file or "timm"}}


@contextmanager
def in_force(options: argparse.Namespace) -> Iterator[None]:
    """What the switches say, for the libraries that ask the environment."""
    asked = {"HF_HUB_OFFLINE": "1"} if getattr(options, "offline", False) else {}
    asked |= {"OVSEG_CACHE": "off"} if getattr(options, "no_cache", False) else {}
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def no_readouts(what: str, name: str) -> InputError:
    """The error for ``--readout`` or ``--proxy`` with a model that they do nothing for."""
    return InputError(f"{what} is given and {name} is no clip_dense model; its attention is part of its training. Expected a model that "
                      "needs none, such as clip_dense_vit_b16:openai, or the command without it")


def load_model(name: str | None, **options: Any) -> Any:
    """The model that ``-m`` names, on the CPU; the default one without it. ``options`` change how it was built."""
    from ..distributed import is_main
    from ..models import default_model, from_pretrained
    from ..progress import note, waiting

    asked = {"readout": "--readout", "proxy": "--proxy"}
    try:
        with waiting("loading the default model" if name is None else f"loading {name}", show=is_main()):
            model = default_model(**options) if name is None else from_pretrained(name, **options)
    except (ConfigError, TypeError) as error:  # TypeError: of a registered function
        bare = None if name is None or not asked.keys() & options else from_pretrained(name)
        if bare is None or hasattr(bare, "set_readout"):
            raise
        raise no_readouts(asked[next(key for key in asked if key in options)], bare.name) from error
    if model.name.endswith("_tiny") and hasattr(model.tokenizer, "unknown"):
        note(f"{model.name}: trained on synthetic scenes; it knows their words only")
    return model
