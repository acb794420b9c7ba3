"""Tokenizers of CLIPs and of BERT, fetched where they are not here.

An open_clip architecture has open_clip's byte pairs, or a tokenizer of transformers', which is read
without running code of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError, WeightsError, first_line
from ..nn.bert import import_transformers
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
    """Return the function from texts to ids [T, L].

    It is open_clip's byte pairs, or a tokenizer of transformers, whose files are fetched.
    """
    open_clip = import_open_clip()
    text = configuration(architecture)["text_cfg"]
    length = text.get("context_length", 77)
    name = text.get("hf_tokenizer_name")
    if not name:
        if isinstance(architecture, str):
            root = logging.getLogger()
            before = list(root.handlers)
            try:
                return open_clip.get_tokenizer(architecture)
            finally:
                root.handlers[:] = before  # it logs to the root, which then repeats our lines
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


class ClipTokenizer:
    """The tokenizer of an architecture as open_clip ships it, loaded on first use.

    Texts become ``[T, L]`` int64, L the architecture's context length. Those of transformers
    (SigLIP, CLIPA, multilingual models) are downloaded once.
    """

    def __init__(self, architecture: Architecture):
        self.architecture = architecture
        self._tokenizer: Callable | None = None

    def __getstate__(self) -> dict[str, Any]:
        # open_clip's holds caches that cannot be pickled.
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Return the ids [T, L] of texts."""
        return self._loaded()([texts] if isinstance(texts, str) else list(texts))

    def cut(self, texts: Sequence[str]) -> list[bool]:
        """Return which of ``texts`` exceed the context: a longer one holds more of them."""
        short = self(texts)
        context = short.shape[1]
        long = self._loaded()([*texts, ""], context_length=8 * context)
        pad = long[-1, -1]
        return [
            not torch.equal(a, b[:context]) or bool((b[context:] != pad).any())
            for a, b in zip(short, long[:-1], strict=True)
        ]

    def _loaded(self) -> Callable:
        if self._tokenizer is None:
            try:
                self._tokenizer = clip_tokenizer(self.architecture)
            # transformers fails in many ways where a file is missing.
            except (ImportError, OSError, ValueError, TypeError) as error:
                raise not_loaded("tokenizer", self.architecture, error) from error
        return self._tokenizer


def not_loaded(what: str, architecture: Architecture, error: Exception) -> InputError:
    """Return the error for a part of transformers' that ``architecture`` needs and does not get."""
    return InputError(
        f"the {what} of {architecture!r} cannot be loaded ({type(error).__name__}: "
        f"{first_line(error)}); it is transformers', which must be installed (pip install "
        "transformers), and comes from the Hugging Face Hub once: expected a connection, without "
        "HF_HUB_OFFLINE, or its files in the cache that HF_HOME names"
    )


class BertTokenizer:
    """Texts to ids [T, context_length], 0 is padding; transformers' own, loaded on first use."""

    def __init__(self, source: str, context_length: int):
        self.source = source
        self.context_length = context_length
        self._tokenizer: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tokenizer": None}

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Return the ids [T, context_length] of texts."""
        if self._tokenizer is None:
            self._tokenizer = self._load()
        found = self._tokenizer(
            [texts] if isinstance(texts, str) else list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.context_length,
            return_tensors="pt",
        )
        # Padding is 0, whatever the tokenizer pads with.
        return found["input_ids"] * found["attention_mask"]

    def _load(self) -> Any:
        folder = Path(self.source)
        if no_folder(folder) is not None:
            folder = fetch(
                self.source,
                ("tokenizer.json",),
                ways=", with tokenizer_config.json, in a folder that text.tokenizer names",
            ).parent
            fetch(self.source, ("tokenizer_config.json",))
        transformers = import_transformers()
        try:
            return transformers.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"text.tokenizer is {self.source!r}, of which transformers makes no tokenizer "
                f"({first_line(error)}); expected a folder or repository with tokenizer.json"
            ) from error
