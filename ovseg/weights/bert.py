"""Pretrained weights of BERT for the text tower ``nn.bert``."""

from __future__ import annotations

from pathlib import Path

from ..errors import CheckpointError
from ..nn.bert import Bert
from ..paths import no_file, no_folder
from .files import check_numbers
from .hub import PREFIX, fetch
from .pickles import read_published

_FILES = ("model.safetensors", "pytorch_model.bin")
# Heads of pretraining, and a table of positions' numbers in files of older versions.
_UNUSED = ("cls.", "embeddings.position_ids")
_RENAMED = {".gamma": ".weight", ".beta": ".bias"}  # of norms, in files of older versions


def load_bert(tower: Bert, source: str) -> None:
    """Load weights of BERT itself.

    Args:
        tower: the text tower; its pooler, which nothing uses, may lack in the file.
        source: a folder or file of transformers', or a repository of the Hub.

    Raises:
        CheckpointError: for a file that lacks a tensor of this tower.
    """
    path = Path(source)
    if no_folder(path) is None:
        files = [path / name for name in _FILES]
        path = next((file for file in files if file.is_file()), files[0])
    elif no_file(path) is not None:
        path = fetch(source.removeprefix(PREFIX), _FILES, ways=", named by text.weights")
    own = tower.transformer.state_dict()
    state = {name: x for name, x in own.items() if name.startswith("pooler.")}
    for name, tensor in read_published(path).items():
        if not (plain := _plain(name)).startswith(_UNUSED):
            state[plain] = tensor
    wrong = sorted(
        name
        for name in own.keys() | state.keys()
        if name not in own or name not in state or own[name].shape != state[name].shape
    )
    if wrong:
        raise CheckpointError(
            f"{path} does not fit the text tower ({len(wrong)} tensors: {', '.join(wrong[:5])}); "
            f"expected those of transformers' BertModel of width {tower.options.width} and depth "
            f"{tower.options.depth}"
        )
    check_numbers(path, state, own)
    tower.transformer.load_state_dict(state)


def _plain(name: str) -> str:
    """Return a name as ``BertModel`` has it now: without a prefix, norms by weight and bias."""
    name = name.removeprefix("bert.")
    for old, new in _RENAMED.items():
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name
