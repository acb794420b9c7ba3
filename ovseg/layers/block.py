"""The transformer blocks of image and text towers as modules in parts: called as a whole, or walked over by a readout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attention
from .quick_gelu import quick_gelu_linear


class AttentionBlock(nn.Module):
    """x + merge(attention(project(norm_1(x)))), then x + feed(x). A block defines the four parts.

    Attributes:
        norm_1: the norm before the attention.
        attention_backend: of ``layers.attention``.
    """

    norm_1: Callable[[torch.Tensor], torch.Tensor]
    attention_backend: str = "sdpa"

    def project(self, normed: torch.Tensor, rope: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values, [B, heads, L, d] each; ``rope`` turns queries and keys of rotary blocks by their patch's place."""
        raise NotImplementedError

    def keys_values(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values alone [B, heads, T, d], of tokens that are only looked at."""
        return self.project(normed)[1:]

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        """[B, heads, L, d] to what is added to the residual stream [B, L, D]."""
        raise NotImplementedError

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        """The MLP's branch: what it adds to ``x``."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, k_x: None = None, v_x: None = None, attn_mask: torch.Tensor | None = None, *,
                first: int | None = None, rope: torch.Tensor | None = None,
                prefix: torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """The block as it is; positional arguments as open_clip's own blocks take them.

        Args:
            x: [B, L, D].
            k_x, v_x: not used; None.
            attn_mask: broadcastable to [B, heads, L, L]; bool (True = keep) or added to the scores.
            first: only so many of the leading positions are computed, for a last block read at its class token.
            rope: of ``project``.
            prefix: tokens [B or 1, T, D] that are looked at and not computed, or their ``keys_values``: prompts whose outputs nobody reads.
        """
        q, k, v = self.project(self.norm_1(x), rope)
        if prefix is not None:
            before = self.keys_values(self.norm_1(prefix)) if isinstance(prefix, torch.Tensor) else prefix
            k, v = (torch.cat([some.expand(len(x), -1, -1, -1), own], 2) for some, own in zip(before, (k, v), strict=True))
        x = x[:, :first] + self.merge(attention(q[:, :, :first], k, v, mask=attn_mask, backend=self.attention_backend))
        return x + self.feed(x)


class ClipBlock(AttentionBlock):
    """open_clip's ResidualAttentionBlock over its own parts, under their own names: state dicts do not change.

    Its MLP keeps one hidden tensor for backward instead of three where the activation is QuickGELU.
    """

    def __init__(self, block: nn.Module, attention_backend: str = "sdpa"):
        super().__init__()
        self.ln_1, self.attn, self.ls_1 = block.ln_1, block.attn, block.ls_1
        self.ln_2, self.mlp, self.ls_2 = block.ln_2, block.mlp, block.ls_2
        self.attention_backend = attention_backend

    @property
    def norm_1(self) -> nn.Module:  # type: ignore[override]
        return self.ln_1

    def project(self, normed: torch.Tensor, rope: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        attn, (B, L, D) = self.attn, normed.shape
        qkv = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = qkv.view(B, L, 3, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
        return q, k, v

    def keys_values(self, normed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        attn, (B, T, D) = self.attn, normed.shape
        kv = F.linear(normed, attn.in_proj_weight[D:], None if attn.in_proj_bias is None else attn.in_proj_bias[D:])
        k, v = kv.view(B, T, 2, attn.num_heads, D // attn.num_heads).permute(2, 0, 3, 1, 4)
        return k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        return self.ls_1(self.attn.out_proj(o.transpose(1, 2).flatten(2)))

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        mlp, normed = self.mlp, self.ln_2(x)
        last = mlp.c_proj
        # Only a plain layer may be passed by: one that was replaced (LoRA) or is hooked must be called.
        plain = type(last) is nn.Linear and not last._forward_hooks and not last._forward_pre_hooks
        if plain and type(mlp.gelu).__name__ == "QuickGELU":
            return self.ls_2(quick_gelu_linear(mlp.c_fc(normed), last.weight, last.bias))
        return self.ls_2(mlp(normed))

    def get_weight_dtype(self) -> torch.dtype:
        """open_clip's text transformer asks its first block what to compute in."""
        return self.mlp.c_fc.weight.dtype

    def reset_parameters(self) -> None:
        """Fresh weights, as torch draws them."""
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()
