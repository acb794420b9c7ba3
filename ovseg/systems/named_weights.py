"""Systems that train upon frozen weights, which their files name in place of holding them.

Beside the name a file has a hash of those weights, so that others are noticed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from ..weights.files import hash_tensors
from ..weights.packaged import PACKAGED
from ..weights.timm_models import TIMM, is_path
from .base import OVSegModel

_TRUNK = "backbone.trunk"


@dataclass(frozen=True)
class NamedWeights:
    """Frozen weights, and where a saved folder says what they are.

    Attributes:
        what: ``CLIP`` or ``trunk``, for messages.
        source: their name.
        part: the module that they are the weights of.
        option: that names them.
        of_backbone: whether it is an option of the backbone, or else of the system.
        local: whether ``source`` is a path of this machine.
        portable: what others can name in its place, for messages.
        unhashed: how names of tensors end that may differ: positions that are resized.
    """

    what: str
    source: str
    part: str
    option: str
    of_backbone: bool
    local: bool
    portable: str
    unhashed: tuple[str, ...] = ()

    @property
    def hash_key(self) -> str:
        """The key of the hash in ``config.json``."""
        return f"{self.what.lower()}_hash"

    def write(self, options: dict[str, Any]) -> None:
        """Note the name in the options that a folder holds; a path as it is from anywhere."""
        place = options["backbone"] if self.of_backbone and "backbone" in options else options
        place[self.option] = str(Path(self.source).resolve()) if self.local else self.source


class NamedWeightsModel(OVSegModel):
    """Base of systems that leave frozen weights out of their files where those have a name.

    Here these are the trunk of a backbone that has one (``timm``), while it is in no trained part.
    """

    _trunk_trained = False

    def __init__(self, options: Any):
        super().__init__(options)
        self.register_load_state_dict_post_hook(_without_named)

    @property
    @override
    def named_weights(self) -> NamedWeights | None:
        source = self.backbone.trunk_weights
        if source is None or self._trunk_trained:
            return None
        names = " or ".join([*PACKAGED, TIMM])
        return NamedWeights("trunk", source, _TRUNK, "weights", True, is_path(source), names)

    @override
    def train_parts(self, names: Sequence[str]) -> None:
        super().train_parts(names)
        if self.backbone.trunk_weights is not None:
            # Once it was trained it is no longer what the name stands for.
            trunk = self.get_submodule(_TRUNK)
            self._trunk_trained |= any(p.requires_grad for p in trunk.parameters())

    @override
    def weights_hash(self, dtype: str | None = None) -> str:
        named = self.named_weights
        assert named is not None
        part = self.get_submodule(named.part)
        dtype = dtype or str(next(part.parameters()).dtype).removeprefix("torch.")
        kind = getattr(torch, dtype)
        tensors = (
            (name, x.to(kind))
            for name, x in sorted(part.state_dict().items())
            if not name.endswith(named.unhashed)
        )
        return f"{dtype}:{hash_tensors(tensors)}"

    @override
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the tensors by name, without those that are named."""
        found = super().state_dict(*args, **kwargs)
        named = self.named_weights
        if named is not None:
            prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "") + f"{named.part}."
            for name in [name for name in found if name.startswith(prefix)]:
                del found[name]
        return found


def _without_named(model: nn.Module, keys: Any) -> None:
    """Take a state dict without the named weights for whole."""
    assert isinstance(model, NamedWeightsModel)
    named = model.named_weights
    if named is not None:
        part = f"{named.part}."
        keys.missing_keys[:] = [
            name
            for name in keys.missing_keys
            if not name.startswith(part) and f".{part}" not in name
        ]
