"""Sources of weights: each way to name some is looked up once.

``find`` turns what ``names.parse`` has told apart into a ``WeightSource``, fetching what is not
here; ``loading.py`` loads it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import CheckpointError, InputError
from ..paths import no_file, no_folder
from ..weights.clip import (
    ClipSource,
    clip_of_folder,
    clip_of_tag,
    fetch_folder,
    is_clip_file,
    is_clip_folder,
    model_type_of,
)
from ..weights.hub import PREFIX
from ..weights.saving import is_saved
from .names import only_tag, own_tags, tags, unknown_tag
from .registry import CLIP_SYSTEM, architecture_of, system_of, system_of_folder

SAVED = "saved"
THEIRS = "transformers"
CLIP = "clip"
FILE = "file"


@dataclass(frozen=True)
class WeightSource:
    """Weights that have been found and are not read yet.

    Attributes:
        kind: ``saved``, a folder of ``save_pretrained``; ``transformers``, a folder of a system
            that transformers has too; ``clip``, a CLIP that stands alone; ``file``, any other.
        name: of the model; None where the weights say it.
        text: the weights, as they were named.
        path: the folder or the file; None for a CLIP of a tag.
        clip: the CLIP, for its kind.
    """

    kind: str
    name: str | None
    text: str
    path: Path | None = None
    clip: ClipSource | None = None


def find(name: str | None, weights: str | None) -> WeightSource:
    """Find weights.

    Args:
        name: of a model; None where the weights say it.
        weights: a tag of the name, a path, ``hf-hub:OWNER/NAME``; None: the only tag.

    Raises:
        InputError: for what is none of these; WeightsError: for weights that cannot be had;
            CheckpointError: for a folder or a repository of something else.
    """
    found = tags(name) if name is not None else {}
    if name is not None and weights is None:
        weights = only_tag(name, own_tags(name, found))
    assert weights is not None
    if name is not None and weights in found:
        facts = found[weights]
        if isinstance(facts, Path):
            return WeightSource(SAVED, name, weights, facts)
        check_takes_clip(name, weights)
        architecture = architecture_of(name)
        assert architecture is not None
        clip = clip_of_tag(architecture, weights, facts)
        return WeightSource(CLIP, name, clip.where, clip=clip)
    if weights.startswith(PREFIX):
        path = fetch_folder(weights.removeprefix(PREFIX))
    else:
        path = _saved_in(Path(weights), name)
    if no_folder(path) is None:
        return _of_folder(path, name, weights)
    if (what := no_file(path)) is None:
        if is_clip_file(path):
            return _of_folder(path.parent, name, weights)
        return WeightSource(FILE, name, weights, path)
    if os.path.lexists(path):
        raise CheckpointError(f"model {str(path)!r} {what}; expected a folder or a file of weights")
    raise unknown_tag(name, weights, own_tags(name, found) if name else [])


def check_takes_clip(name: str | None, weights: str) -> None:
    """Refuse a CLIP as the weights of a system that is trained upon one.

    Raises:
        InputError: if ``name`` is a model of such a system.
    """
    takes = name is None or name == CLIP_SYSTEM
    if name is not None and not takes:
        takes = architecture_of(name) is not None and system_of(name) == CLIP_SYSTEM
    if not takes:
        raise InputError(
            f"pretrained is {weights!r}, a CLIP, and {name} is trained upon one; expected weights "
            f"of {name} itself. create_model({name!r}, clip={weights!r}) trains from that CLIP"
        )


def _saved_in(path: Path, name: str | None) -> Path:
    """Return the saved folder that a path stands for: a run's, or that of its weights."""
    if no_file(path / "model" / "config.json") is None:
        return path / "model"  # of a run
    weights_alone = name is None and path.name == "model.safetensors" and no_file(path) is None
    return path.parent if weights_alone and is_saved(path.parent) else path


def _of_folder(folder: Path, name: str | None, weights: str) -> WeightSource:
    """Tell whose folder it is."""
    if system_of_folder(model_type_of(folder)) is not None:
        return WeightSource(THEIRS, name, weights, folder)
    if is_clip_folder(folder):
        check_takes_clip(name, weights)
        return WeightSource(CLIP, name, weights, folder, clip_of_folder(folder, str(folder)))
    return WeightSource(SAVED, name, weights, folder)
