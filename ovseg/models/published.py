"""The layout of a system's published checkpoints: their names to ours and back, strictly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import CheckpointError

State = dict[str, torch.Tensor]


def marked(state: State, marks: str | tuple[str, ...]) -> bool:
    """Whether a name begins with one of ``marks``."""
    return any(name.startswith(marks) for name in state)


@dataclass(frozen=True)
class Published:
    """How one system's published files differ from its own.

    Attributes:
        to_ours, to_theirs: a tensor's name there to its name here, and back.
        mark: the beginning of a name that only this system's files hold.
        optional: beginnings of their names that a file may lack: parts that only training needs.
        tables: of their names, fixed tensors that are computed here: left out on reading, made again on writing.
        surplus: beginnings of their names that a file may hold beside what the model has: left out.
        reshape, restore: their tensors to those that our names stand for one by one, and back: packed, transposed, of another rank.
        others: layouts that the same weights were published in too: read, not written.
    """

    to_ours: Callable[[str], str]
    to_theirs: Callable[[str], str]
    mark: str
    optional: tuple[str, ...] = ()
    tables: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)
    surplus: tuple[str, ...] = ()
    reshape: Callable[[State], State] = dict
    restore: Callable[[State], State] = dict
    others: tuple[Published, ...] = ()

    def recognises(self, state: State) -> bool:
        return self._of(state) is not None

    def _of(self, state: State) -> Published | None:
        return next((one for one in (self, *self.others) if marked(state, one.mark)), None)

    def load(self, model: nn.Module, state: State) -> list[str]:
        """Load a published state dict; returns the tensors that only training needs and that it lacks: they stay as they are.

        Raises:
            CheckpointError: for any other missing tensor, an unexpected one, or one of another shape; naming them.
        """
        layout = self._of(state)
        if layout is not None and layout is not self:
            return layout.load(model, state)
        own = model.state_dict()
        given = {self.to_ours(name): tensor for name, tensor in self.reshape(state).items() if name not in self.tables}
        given = {name: tensor for name, tensor in given.items()
                 if name in own or not self.surplus or not self.to_theirs(name).startswith(self.surplus)}
        lacking = [name for name in own if name not in given]
        allowed = [name for name in lacking if self.to_theirs(name).startswith(self.optional)]
        missing = [self.to_theirs(name) for name in lacking if name not in allowed]
        unexpected = [self.to_theirs(name) for name in given if name not in own]
        reshaped = [f"{self.to_theirs(name)} {list(given[name].shape)} instead of {list(own[name].shape)}"
                    for name in given if name in own and own[name].shape != given[name].shape]
        if missing or unexpected or reshaped:
            groups = (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
            text = "; ".join(f"{len(names)} {kind}: {', '.join(names[:5])}" for kind, names in groups if names)
            raise CheckpointError(f"the checkpoint does not fit {getattr(model, 'name', '') or type(model).__name__} ({text})")
        model.load_state_dict({**own, **{name: tensor.to(own[name].dtype) for name, tensor in given.items()}})
        return [self.to_theirs(name) for name in allowed]

    def state(self, model: nn.Module) -> State:
        """The model's tensors under their names."""
        found = {self.to_theirs(name): tensor for name, tensor in model.state_dict().items()}
        return {**self.restore(found), **{name: make() for name, make in self.tables.items()}}
