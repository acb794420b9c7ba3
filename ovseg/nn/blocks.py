"""Attention, QuickGELU, and transformer blocks as modules in parts.

A block is called as a whole, or walked over by a readout. ``attention`` is scaled dot-product
attention behind one name: ``sdpa`` is torch's own; ``xformers`` is optional (``pip install
'ovseg-kernels[xformers]'``) and used when asked for.

QuickGELU followed by a projection keeps only its input for backward:

    y = W g(h) + b,   g(h) = h sigmoid(1.702 h)                                                  (1)
    dh = (W^T dy) g'(h),   g'(h) = s + 1.702 h s (1 - s),   s = sigmoid(1.702 h)                 (2)
    dW = dy g(h)^T                                                                               (3)

Plain torch keeps h, the sigmoid and g(h), three tensors of four times the width for every block of
a CLIP: most of what its training keeps. Here g(h) is computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from typing_extensions import override

from ..errors import first_line
from .features import Grid

BACKENDS = ("sdpa", "xformers")
LOCAL_PATCH = 4  # pixels from one token of the local stem to the next


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    backend: str = "sdpa",
) -> Tensor:
    """Return softmax(q k^T scale + mask) v.

    Args:
        q: [B, heads, L_q, D].
        k: [B, heads, L_k, D].
        v: [B, heads, L_k, D].
        mask: broadcastable to [B, heads, L_q, L_k]; bool (True = keep) or added to the scores.
        scale: multiplies the scores; 1 / sqrt(D) if None.
        causal: nothing looks behind itself; in place of ``mask``.
        dropout: share of the weights that is dropped.
        backend: ``sdpa`` or ``xformers``.
    """
    if backend == "sdpa":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
        )
    if backend != "xformers":
        raise ValueError(f"backend is {backend!r}; expected one of {list(BACKENDS)}")
    try:
        from xformers.ops import memory_efficient_attention

        if causal:
            from xformers.ops import LowerTriangularMask
    except ImportError as error:
        raise ImportError(
            "attention backend 'xformers' was asked for and does not import "
            f"({first_line(error)}); pip install --no-deps xformers, or use backend='sdpa'"
        ) from error
    bias: Any = LowerTriangularMask() if causal else None
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))
        bias = mask.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # xformers wants [B, L, heads, D]
    o = memory_efficient_attention(q, k, v, attn_bias=bias, p=dropout, scale=scale)
    return o.transpose(1, 2)


def quick_gelu(h: Tensor) -> Tensor:
    """Return g(h) of (1)."""
    return h * torch.sigmoid(1.702 * h)


class _QuickGeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, bias):
        ctx.save_for_backward(h, weight)
        ctx.has_bias = bias is not None
        return F.linear(quick_gelu(h), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        h, weight = ctx.saved_tensors
        dh = d_weight = d_bias = None
        s = torch.sigmoid(1.702 * h)
        if ctx.needs_input_grad[1]:
            d_weight = grad.flatten(0, -2).T @ (h * s).flatten(0, -2)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            d_bias = grad.flatten(0, -2).sum(0)
        if ctx.needs_input_grad[0]:
            slope = (1 - s).mul_(h).mul_(1.702).add_(1).mul_(s)
            dh = (grad @ weight).mul_(slope)
        return dh, d_weight, d_bias


def quick_gelu_linear(h: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [..., D] of (1); a second derivative raises.

    Args:
        h: [..., H].
        weight: [D, H].
        bias: [D], or None.
    """
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h = h.to(dtype)
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    return _QuickGeluLinear.apply(h, weight, bias)


def split_heads(packed: Tensor, heads: int, parts: int = 3) -> Any:
    """Cut [B, L, parts heads d], queries before keys before values, into [B, heads, L, d] each."""
    return packed.unflatten(2, (parts, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


class AttentionBlock(nn.Module):
    """x + merge(attention(project(norm_1(x)))), then x + feed(x).

    A block defines ``norm_1`` and the three parts.

    Attributes:
        norm_1: the norm before the attention.
        attention_backend: of ``attention``.
    """

    norm_1: Callable[[Tensor], Tensor]
    attention_backend: str = "sdpa"

    def project(self, normed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, [B, heads, L, d] each.

        Args:
            normed: [B, L, D].
            rope: turns queries and keys of rotary blocks by their patch's place.
        """
        raise NotImplementedError

    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values [B, heads, T, d] alone, of tokens that are only looked at."""
        return self.project(normed)[1:]

    def merge(self, o: Tensor) -> Tensor:
        """Bring [B, heads, L, d] to what is added to the residual stream [B, L, D]."""
        raise NotImplementedError

    def feed(self, x: Tensor) -> Tensor:
        """Return what the MLP's branch adds to ``x``."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor,
        k_x: None = None,
        v_x: None = None,
        attn_mask: Tensor | None = None,
        *,
        first: int | None = None,
        rope: Tensor | None = None,
        prefix: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Run the block as it is; positional arguments are those of open_clip's own blocks.

        Args:
            x: [B, L, D].
            k_x: not used; None.
            v_x: not used; None.
            attn_mask: broadcastable to [B, heads, L, L]; bool (True = keep) or added to the scores.
            first: only so many of the leading positions are computed, for a last block read at its
                class token.
            rope: of ``project``.
            prefix: tokens [B or 1, T, D] that are looked at and not computed, or their
                ``keys_values``: prompts whose outputs nobody reads.
        """
        q, k, v = self.project(self.norm_1(x), rope)
        if prefix is not None:
            if isinstance(prefix, Tensor):
                prefix = self.keys_values(self.norm_1(prefix))
            k, v = (
                torch.cat([before.expand(len(x), -1, -1, -1), own], 2)
                for before, own in zip(prefix, (k, v), strict=True)
            )
        o = attention(q[:, :, :first], k, v, mask=attn_mask, backend=self.attention_backend)
        x = x[:, :first] + self.merge(o)
        return x + self.feed(x)


class ClipBlock(AttentionBlock):
    """open_clip's ResidualAttentionBlock over its own parts.

    They keep their names: state dicts do not change. Its MLP keeps one hidden tensor for backward
    instead of three where the activation is QuickGELU.
    """

    def __init__(self, block: nn.Module, attention_backend: str = "sdpa"):
        super().__init__()
        self.ln_1 = block.ln_1
        self.attn = block.attn
        self.ls_1 = block.ls_1
        self.ln_2 = block.ln_2
        self.mlp = block.mlp
        self.ls_2 = block.ls_2
        self.attention_backend = attention_backend

    @property
    @override
    def norm_1(self) -> nn.Module:  # type: ignore[override]
        return self.ln_1

    @override
    def project(self, normed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        qkv = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        return split_heads(qkv, attn.num_heads)

    @override
    def keys_values(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        attn = self.attn
        D = normed.shape[2]
        bias = None if attn.in_proj_bias is None else attn.in_proj_bias[D:]
        kv = F.linear(normed, attn.in_proj_weight[D:], bias)
        return split_heads(kv, attn.num_heads, 2)

    @override
    def merge(self, o: Tensor) -> Tensor:
        return self.ls_1(self.attn.out_proj(o.transpose(1, 2).flatten(2)))

    @override
    def feed(self, x: Tensor) -> Tensor:
        mlp = self.mlp
        normed = self.ln_2(x)
        last = mlp.c_proj
        # Only a plain layer may be passed by: one that was replaced (LoRA) or is hooked must be
        # called.
        plain = type(last) is nn.Linear and not last._forward_hooks and not last._forward_pre_hooks
        if plain and type(mlp.gelu).__name__ == "QuickGELU":
            return self.ls_2(quick_gelu_linear(mlp.c_fc(normed), last.weight, last.bias))
        return self.ls_2(mlp(normed))

    def get_weight_dtype(self) -> torch.dtype:
        """Return what open_clip's text transformer computes in: it asks its first block."""
        return self.mlp.c_fc.weight.dtype

    def reset_parameters(self) -> None:
        """Draw fresh weights, as torch does."""
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module._reset_parameters()
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()


class LocalBlock(nn.Module):
    """Depth-wise 3x3 convolution and an MLP over channels, the front of the tiny models.

    Without it a model of their size learns to retrieve captions and not where things are. Three of
    them see 30 pixels, an object and little else.
    """

    def __init__(self, width: int):
        super().__init__()
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width, padding_mode="replicate")
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, D, h, w] to the same."""
        return x + self.mlp(self.norm(self.mix(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


def local_tokens(stem: nn.Module, local: nn.Module, images: Tensor) -> tuple[Tensor, Grid]:
    """Run stem and local blocks; return (tokens [B, N, D], grid)."""
    # Channels last: the norm and the MLP of a local block then read the convolution in place.
    x = local(stem(images.contiguous(memory_format=torch.channels_last)))
    return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])


def local_stem(width: int) -> nn.Sequential:
    """Return what makes a map of pictures, a token every ``LOCAL_PATCH`` pixels.

    Replicated borders: zeros would be a texture of their own along the edge of every picture.
    """
    return nn.Sequential(
        nn.Conv2d(3, width // 2, 3, 2, 1, padding_mode="replicate"),
        nn.GELU(),
        nn.Conv2d(width // 2, width, 3, 2, 1, padding_mode="replicate"),
    )
