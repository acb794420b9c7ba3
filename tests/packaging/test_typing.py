"""What a type checker sees of the operators has no gaps. mypy's strict flags are in pyproject.toml."""

import inspect

import pytest

import ovseg_kernels as ok
from ovseg_kernels import nn

FUNCTIONS = [name for name in ok.__all__ if inspect.isfunction(getattr(ok, name))]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_are_typed_whole(name):
    signature = inspect.signature(getattr(ok, name))
    bare = [one.name for one in signature.parameters.values() if one.annotation is one.empty]
    assert not bare and signature.return_annotation is not signature.empty


@pytest.mark.parametrize("kind", [nn.ClipLoss, nn.SigLipLoss])
def test_losses_are_typed_whole(kind):
    for function in (kind.__init__, kind.forward):
        signature = inspect.signature(function)
        bare = [
            one.name
            for one in list(signature.parameters.values())[1:]
            if one.annotation is one.empty
        ]
        assert not bare and signature.return_annotation is not signature.empty
