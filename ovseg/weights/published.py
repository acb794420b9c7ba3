"""The layout of a system's published checkpoints: their names to ours and back, strictly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from .files import check_fit
from .state_dicts import State, plain_state


def marked(state: State, marks: str | tuple[str, ...]) -> bool:
    """Return whether a name begins with one of ``marks``."""
    return any(name.startswith(marks) for name in state)


@dataclass(frozen=True)
class Published:
    """How one system's published files differ from its own.

    Attributes:
        to_ours: a tensor's name there to its name here.
        to_theirs: its name here to its name there.
        mark: the beginning of a name that only this system's files hold.
        optional: beginnings of their names that a file may lack: parts that only training needs.
        tables: of their names, fixed tensors that are computed here: left out on reading, made
            again on writing.
        surplus: beginnings of their names that a file may hold beside what the model has: left out.
        reshape: their tensors to those that our names stand for one by one: packed, transposed, of
            another rank.
        restore: back again.
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
        """Return whether tensors are in this layout or one of the others."""
        return self._of(state) is not None

    def _of(self, state: State) -> Published | None:
        return next((one for one in (self, *self.others) if marked(state, one.mark)), None)

    def load(
        self, model: nn.Module, state: State, resize: Callable[[State], State] | None = None
    ) -> list[str]:
        """Load a published state dict.

        Return the names of tensors that only training needs and that it lacks: they stay as they
        are.

        Args:
            model: of the system.
            state: tensors under their names.
            resize: what is done with the tensors under our names before they are compared:
                positions of another size.

        Raises:
            CheckpointError: for any other missing tensor, an unexpected one, or one of another
                shape or kind; naming them.
        """
        layout = self._of(state)
        if layout is not None and layout is not self:
            return layout.load(model, state, resize)
        own = model.state_dict()
        given = {
            self.to_ours(name): tensor
            for name, tensor in self.reshape(state).items()
            if name not in self.tables
        }
        if self.surplus:
            given = {
                name: tensor
                for name, tensor in given.items()
                if name in own or not self.to_theirs(name).startswith(self.surplus)
            }
        if resize is not None:
            given = resize(given)
        lacking = [name for name in own if name not in given]
        allowed = [name for name in lacking if self.to_theirs(name).startswith(self.optional)]
        present = {name: tensor for name, tensor in own.items() if name not in allowed}
        title = getattr(model, "name", "") or type(model).__name__
        check_fit("the checkpoint", given, present, title, self.to_theirs)
        cast = {name: tensor.to(own[name].dtype) for name, tensor in given.items()}
        model.load_state_dict({**own, **cast})
        return [self.to_theirs(name) for name in allowed]

    def state(self, model: nn.Module, own: State | None = None) -> State:
        """Return the model's tensors under their names.

        Args:
            model: of the system.
            own: its tensors under ours, where they are taken from elsewhere.
        """
        own = plain_state(model) if own is None else own
        found = self.restore({self.to_theirs(name): tensor for name, tensor in own.items()})
        return {**found, **{name: make() for name, make in self.tables.items()}}
