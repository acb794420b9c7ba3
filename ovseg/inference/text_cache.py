"""Text embeddings of label sets on disk: 171 classes in 80 templates are 13 680 texts, a minute on a CPU and the same every time.

A file is named by all that its numbers depend on: the weights of the text tower, what is made of them (its activation is in no tensor),
the texts in their order, the templates, how they are averaged, the dtype. Only models with weights of their own are remembered, and not
the tiny ones, which are faster than a disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

import torch

from ..checkpoints.cache import cache_folder
from ..checkpoints.files import load_tensors, save_tensors
from ..data.templates import templates as resolve_templates
from ..errors import CheckpointError
from ..layers.kept import Version, autocast_type
from ..models import OVSegModel

_FEW = 1_000_000  # parameters of a text tower that is not worth a file
_HASHES: WeakKeyDictionary[OVSegModel, tuple[Version, str]] = WeakKeyDictionary()


def encode_labels(model: OVSegModel, texts: Sequence[str], templates: str | Sequence[str], *, unit: bool) -> torch.Tensor:
    """``model.encode_checked``, from the disk where it has been asked before.

    A file that is damaged is made again; a folder that cannot be written is left alone.
    """
    path = _path(model, texts, templates, unit)
    if path is None:
        return model.encode_checked(texts, templates, unit=unit)
    parameter = model.text_parameters()[0]
    if path.is_file():
        try:
            found = load_tensors(path)["texts"]
            if found.shape == (len(texts), model.spec.embed_dim) and bool(found.isfinite().all()):
                return found.to(parameter.device, parameter.dtype)
        except (CheckpointError, KeyError):
            pass
    rows = model.encode_checked(texts, templates, unit=unit)
    if bool(rows.isfinite().all()):
        with contextlib.suppress(OSError):  # no space, no permission: the next run encodes them again
            save_tensors({"texts": rows}, path)
    return rows


def _path(model: OVSegModel, texts: Sequence[str], templates: str | Sequence[str], unit: bool) -> Path | None:
    folder = cache_folder()
    if folder is None or model.source is None or sum(p.numel() for p in model.text_parameters()) < _FEW:
        return None
    asked = [_weights_hash(model), model.text_facts(), list(texts), list(resolve_templates(templates)), unit]
    cast = autocast_type(model.text_parameters()[0].device.type)
    asked += [] if cast is None else [str(cast)]
    return folder / "texts" / f"{hashlib.blake2b(json.dumps(asked).encode(), digest_size=20).hexdigest()}.safetensors"


def _weights_hash(model: OVSegModel) -> str:
    """Of the text tower; made again when a parameter has been written to or moved since."""
    parameters = model.text_parameters()
    version, value = _HASHES.get(model, (None, ""))
    if version is None or not version.holds(parameters):
        version, digest = Version(parameters), hashlib.blake2b(digest_size=20)
        for parameter in parameters:
            digest.update(f"{parameter.dtype} {tuple(parameter.shape)}".encode())
            digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        value = digest.hexdigest()
        _HASHES[model] = (version, value)
    return value
