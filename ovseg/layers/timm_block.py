"""The blocks of timm's ViTs as modules in parts, like ``ClipBlock``. timm itself is not imported."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attention
from .block import AttentionBlock
from .positions import rotate

KINDS = ("Block", "EvaBlock", "EvaBlockPostNorm")


def check_timm_block(block: nn.Module) -> None:
    """Raises ValueError for a block that ``TimmBlock`` would not compute as timm does."""
    kind, attn = type(block).__name__, getattr(block, "attn", None)
    if kind not in KINDS or type(attn).__name__ not in ("Attention", "EvaAttention", "AttentionRope"):
        raise ValueError(f"blocks are {kind} with {type(attn).__name__}; expected one of {list(KINDS)} with plain or rotary attention")
    if getattr(attn, "gate", None) is not None or getattr(attn, "num_kv_groups", 1) != 1 or attn.attn_drop.p > 0:  # type: ignore[union-attr]
        raise ValueError(f"blocks are {kind} with gates, grouped queries or dropout in the attention; expected none of them")


class TimmBlock(AttentionBlock):
    """timm's Block, EvaBlock or EvaBlockPostNorm over its own parts, under their own names: state dicts do not change.

    Queries and keys are normed where the block does that, then turned (``rope``); values are neither. With norms after the branches
    ``norm_1`` is the identity, and what ``merge`` and ``feed`` return has been normed.
    """

    def __init__(self, block: nn.Module, attention_backend: str = "sdpa"):
        super().__init__()
        check_timm_block(block)
        for name, parameter in block.named_parameters(recurse=False):  # EVA's layer scales
            self.register_parameter(name, parameter)
        for name, module in block.named_children():
            self.add_module(name, module)
        self.after = type(block).__name__ == "EvaBlockPostNorm"
        self.attention_backend = attention_backend

    def norm_1(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.after else self.norm1(x)

    def project(self, normed: torch.Tensor, rope: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attn = self.attn
        if attn.qkv is None:
            q, k, v = (layer(normed).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
                       for layer in (attn.q_proj, attn.k_proj, attn.v_proj))
        else:
            if getattr(attn, "q_bias", None) is None:
                qkv = attn.qkv(normed)
            else:
                qkv = F.linear(normed, attn.qkv.weight, torch.cat([attn.q_bias, attn.k_bias, attn.v_bias]))
            q, k, v = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        if rope is not None:
            half = getattr(attn, "rotate_half", False)
            q, k = (rotate(t, rope, prefix=attn.num_prefix_tokens, half=half).to(v.dtype) for t in (q, k))
        return q, k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        attn = self.attn
        return self._branch(attn.proj_drop(attn.proj(attn.norm(o.transpose(1, 2).flatten(2)))), "1")

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return self._branch(self.mlp(x if self.after else self.norm2(x)), "2")

    def _branch(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """What stands between a branch and the residual stream: a norm, or a layer scale; then stochastic depth."""
        if self.after:
            x = getattr(self, f"norm{which}")(x)
        elif (scale := getattr(self, f"gamma_{which}", None)) is not None:
            x = scale * x
        elif hasattr(self, f"ls{which}"):
            x = getattr(self, f"ls{which}")(x)
        return getattr(self, f"drop_path{which}")(x)

    def forward(self, x: torch.Tensor, rope: torch.Tensor | None = None,  # type: ignore[override]
                attn_mask: torch.Tensor | None = None, is_causal: bool = False, *, first: int | None = None) -> torch.Tensor:
        """The block as it is; the first arguments as timm's own forward gives them. ``first`` as in ``AttentionBlock``."""
        if is_causal:
            raise ValueError("is_causal is True; expected False: the patches of an image tower see each other")
        q, k, v = self.project(self.norm_1(x), rope)
        x = x[:, :first] + self.merge(attention(q[:, :, :first], k, v, mask=attn_mask, backend=self.attention_backend))
        return x + self.feed(x)
