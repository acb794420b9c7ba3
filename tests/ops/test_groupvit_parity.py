"""center_assignment inside a small wrapper against transformers' GroupViTAssignAttention: training
with its noise, and evaluation.
"""

import pytest
import torch
from torch import nn

import ovseg_kernels as ok

groupvit = pytest.importorskip("transformers.models.groupvit.modeling_groupvit")


class Wrapper(nn.Module):
    """The projections of the other module around our operator."""

    def __init__(self, other, folded):
        super().__init__()
        self.folded = folded
        self.q_proj, self.k_proj, self.v_proj, self.proj = (
            other.q_proj,
            other.k_proj,
            other.v_proj,
            other.proj,
        )
        self.scale = other.scale

    def forward(self, query, key, noise):
        options = {
            "scale": self.scale,
            "noise": noise,
            "normalizer": "mean_plus_one",
            "return_soft": True,
        }
        if self.folded:
            weights = self.k_proj.weight, self.v_proj.weight, self.k_proj.bias, self.v_proj.bias
            pooled, _, soft = ok.folded_center_assignment(
                self.q_proj(query), key, *weights, **options
            )
        else:
            pooled, _, soft = ok.center_assignment(
                self.q_proj(query), self.k_proj(key), self.v_proj(key), **options
            )
        return self.proj(pooled), soft


@pytest.mark.parametrize("groups,tokens", [(8, 49), (64, 100)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("folded", [False, True])
def test_values_and_gradients(groups, tokens, training, folded, monkeypatch):
    noise = -torch.log(-torch.log(torch.rand(2, groups, tokens)))
    monkeypatch.setattr(torch.distributions.gumbel.Gumbel, "sample", lambda self, shape: noise)
    other = groupvit.GroupViTAssignAttention(groupvit.GroupViTVisionConfig(hidden_size=48)).train(
        training
    )
    assert other.assign_eps == 1.0
    mine = Wrapper(other, folded)
    query, key = (
        torch.randn(2, groups, 48, requires_grad=True),
        torch.randn(2, tokens, 48, requires_grad=True),
    )
    upstream = torch.randn(2, groups, 48)
    leaves = [query, key, *other.parameters()]

    def gradients(out, soft):
        return torch.autograd.grad((out * upstream).sum() + soft.square().sum(), leaves)

    expected, found = other(query, key), mine(query, key, noise if training else None)
    for a, b in zip((*found, *gradients(*found)), (*expected, *gradients(*expected)), strict=True):
        assert float((a - b).detach().abs().max()) <= 1e-5 * max(1.0, float(b.detach().abs().max()))
