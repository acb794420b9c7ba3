"""The tokenizer of an open_clip architecture: open_clip's byte pairs, or one of transformers'
without code of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, WeightsError, first_line
from ..nn.clip_architectures import Architecture, configuration, import_open_clip, title
from ..paths import no_folder
from .hub import fetch

_OPTIONS = (
    "clean",
    "strip_sep_token",
    "language",
    "reduction_mask",
    "additional_special_tokens",
)
TOKENIZER_FILES = (
    ("tokenizer.json", "spiece.model", "vocab.txt"),
    ("tokenizer_config.json",),
    ("special_tokens_map.json",),
)


def clip_tokenizer(architecture: Architecture) -> Callable[[Sequence[str]], torch.Tensor]:
    """Texts to ids [T, L]: open_clip's byte pairs, or a tokenizer of transformers whose files are
    fetched.
    """
    open_clip, text = import_open_clip(), configuration(architecture)["text_cfg"]
    length, name = text.get("context_length", 77), text.get("hf_tokenizer_name")
    if not name:
        if isinstance(architecture, str):
            return open_clip.get_tokenizer(architecture)
        return open_clip.tokenizer.SimpleTokenizer(
            context_length=length, **_tokenizer_options(text)
        )
    folder = Path(name)
    if no_folder(folder) is not None:
        folder = fetch(
            name,
            TOKENIZER_FILES[0],
            ways=f", with tokenizer_config.json, into {name} below the present folder",
        ).parent
        for files in TOKENIZER_FILES[1:]:
            fetch_optional(name, files)
    try:
        # None, transformers' default, would ask on the terminal whether to run a folder's code.
        return open_clip.tokenizer.HFTokenizer(
            str(folder),
            context_length=length,
            tokenizer_mode=text.get("tokenizer_mode"),
            **_tokenizer_options(text),
            trust_remote_code=False,
        )
    except ImportError as error:
        raise ImportError(
            f"the words of {title(architecture)} need transformers ({first_line(error)}): "
            "pip install transformers"
        ) from error


def _tokenizer_options(text: dict[str, Any]) -> dict[str, Any]:
    """Return what a configuration, which may come from anybody, says about how texts are cut."""
    given = text.get("tokenizer_kwargs") or {}
    for key in given:
        if key not in _OPTIONS:
            raise CheckpointError(
                f"text_cfg.tokenizer_kwargs holds {key!r}; expected some of {list(_OPTIONS)}"
            )
    return dict(given)


def fetch_optional(repo: str, files: Sequence[str]) -> None:
    """Fetch the first of ``files`` that a repository holds, if it holds one."""
    with suppress(WeightsError):  # many models have none
        fetch(repo, files)
