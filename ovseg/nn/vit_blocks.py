"""Parts of ViTs and of packed text towers: positions, blocks, and texts without their padding.

Parameter names are those of timm and of the published checkpoints of GroupViT and OVSegmentor.

Of texts of 8 to 30 tokens, padded to 77, three quarters of the work is padding. So layers over
tokens see [N, D], and only attention goes through [T, L, D]: it is little of the work, runs padded
to the longest text, on any device and under its own kernels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from .blocks import AttentionBlock, attention, quick_gelu_linear, split_heads
from .features import Grid
from .tensors import upload

ACTIVATIONS = ("gelu", "quick_gelu")


def resize_positions(
    positions: Tensor,
    trained: Grid,
    grid: Grid,
    *,
    antialias: bool = True,
    prefix: int = 1,
    mode: str = "bicubic",
) -> Tensor:
    """Resize position embeddings to another grid than the one they were trained on.

    Args:
        positions: [prefix + h w, D].
        trained: (h, w).
        grid: (H, W) that they are wanted for: the result is [prefix + H W, D].
        antialias: open_clip's way; without it torch's bicubic has another kernel, also where it
            enlarges (SegCLIP's way).
        prefix: how many rows stand before the grid's, for class token and registers.
        mode: ``bilinear`` without antialiasing is DenseCLIP's way.
    """
    if trained == grid:
        return positions
    first, dense = positions[:prefix], positions[prefix:]
    dense = dense.float().view(1, *trained, -1).permute(0, 3, 1, 2)
    dense = F.interpolate(dense, grid, mode=mode, antialias=antialias, align_corners=False)
    dense = dense.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1)
    return torch.cat([first, dense.to(positions.dtype)])


def rotate(x: Tensor, rope: Tensor, *, prefix: int, half: bool) -> Tensor:
    """Turn queries or keys [B, heads, prefix + N, d] by their patch's place; the prefix has none.

    Args:
        x: queries or keys.
        rope: [N, 2 d], sines, then cosines, as timm makes them.
        prefix: how many tokens stand before the patches.
        half: whether dimensions turn in pairs (i, i + d / 2), in place of (2i, 2i + 1).
    """
    first = x[:, :, :prefix]
    x = x[:, :, prefix:]
    sin, cos = rope.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    x = x * cos + turned * sin
    return torch.cat([first.to(x.dtype), x], 2)


class Packing:
    """The places of the tokens of texts, padded [T, L', ...] and packed [N, ...].

    Args:
        keep: [T, L] bool, the tokens. A text without any is its first place.
        pads: compute the padding too, as published training does: it is looked at by nobody, but
            looks itself.
        device: where the tokens are computed. With ``keep`` on the CPU nothing waits for it; on a
            GPU the lengths do.

    Attributes:
        shape: (T, L'); L' is the longest text, or L with ``pads``.
        seen: [T, L'] bool, what may be looked at.
        rows: [N] int64, of each packed token among the T L' places.
        positions: [N] int64, of each packed token in its text.
        starts: [T] int64, the packed index of each text's first token.
        whole: whether every place is computed.
    """

    def __init__(self, keep: Tensor, pads: bool = False, device: torch.device | None = None):
        device = keep.device if device is None else device
        # Under torch.compile lengths are no numbers: everything is computed.
        self.whole = pads or torch.compiler.is_compiling()
        rows, starts, seen, self._firsts = places(keep, self.whole)
        self.shape = (seen.shape[0], seen.shape[1])
        self.rows = upload(rows, device)
        self.starts = upload(starts, device)
        self.seen = upload(seen, device)
        self.positions = (self.rows % self.shape[1]) if self.shape[1] else self.rows

    def split(self, sizes: Sequence[int]) -> list[Packing]:
        """Return the packings of neighbouring texts, so many each, with the places within them."""
        found = []
        L = self.shape[1]
        first = 0
        for size in sizes:
            last = first + size
            at = first * L if self.whole else self._firsts[first]
            end = last * L if self.whole else self._firsts[last]
            part = copy.copy(self)
            part.shape = (size, L)
            part.rows = self.rows[at:end] - first * L
            part.positions = self.positions[at:end]
            part.starts = self.starts[first:last] - at
            part.seen = self.seen[first:last]
            part._firsts = [x - at for x in self._firsts[first : last + 1]]
            found.append(part)
            first = last
        return found

    def take(self, x: Tensor) -> Tensor:
        """Pack [T, L', ...] to the tokens [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.whole else flat.index_select(0, self.rows)

    def pad(self, x: Tensor) -> Tensor:
        """Put the tokens [N, ...] back into [T, L', ...], zeros where there is none."""
        if not self.whole:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)


def places(keep: Tensor, whole: bool) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Return what a ``Packing`` is made of.

    Args:
        keep: [T, L] bool. It is read, unless ``whole``.
        whole: whether every place counts.

    Returns:
        rows [N] among the T L' places, starts [T], seen [T, L'], and without ``whole`` the starts
        and N as numbers.
    """
    keep = keep | (torch.arange(keep.shape[1], device=keep.device) == 0)
    if whole:
        every = torch.arange(keep.numel(), device=keep.device)
        L = keep.shape[1]
        return every, every[::L] if L else every.new_zeros(len(keep)), keep, []
    longest = 0
    if keep.numel():
        longest = int((keep.int() * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax())
    keep = keep[:, :longest]
    ends = keep.sum(1).cumsum(0)
    return keep.flatten().nonzero()[:, 0], ends - keep.sum(1), keep, [0, *ends.tolist()]


def drop_path(branch: Tensor, rate: float, training: bool) -> Tensor:
    """Leave a residual branch [B, ...] out for a share ``rate`` of the rows.

    The others are scaled up to keep the mean.
    """
    if not rate or not training:
        return branch
    kept = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


class Mlp(nn.Module):
    """Two linear layers, ``width`` to ``hidden`` to ``out`` (``width`` if None)."""

    def __init__(self, width: int, hidden: int, out: int | None = None, act: str = "gelu"):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act is {act!r}; expected one of {list(ACTIVATIONS)}")
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width if out is None else out)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., width] to [..., out]."""
        hidden = self.fc1(x)
        if self.act == "quick_gelu":
            return quick_gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
        return self.fc2(F.gelu(hidden))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)


class VitBlock(AttentionBlock):
    """A ViT's block with norms before the branches, one packed projection and stochastic depth.

    Args:
        width, heads: D and the number of heads, which no tensor shows.
        hidden: width of the MLP.
        drop_path: share of the rows that a branch is left out for in training; both branches have
            one rate.
        act: ``gelu`` (erf) or ``quick_gelu``.
        eps: of the norms.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        drop_path: float = 0.0,
        act: str = "gelu",
        eps: float = 1e-5,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width is {width} and heads {heads}; expected a whole number of channels a head"
            )
        self.heads = heads
        self.rate = drop_path
        self.norm1 = nn.LayerNorm(width, eps)
        self.attn = _Attention(width)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, hidden, act=act)

    @property
    @override
    def norm_1(self) -> nn.Module:  # type: ignore[override]
        return self.norm1

    @override
    def project(self, normed: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(self.attn.qkv(normed), self.heads)

    @override
    def merge(self, o: Tensor) -> Tensor:
        return drop_path(self.attn.proj(o.transpose(1, 2).flatten(2)), self.rate, self.training)

    @override
    def feed(self, x: Tensor) -> Tensor:
        return drop_path(self.mlp(self.norm2(x)), self.rate, self.training)


class PackedBlock(VitBlock):
    """The block of a text tower: over packed tokens [N, D], attention within each text."""

    def __init__(
        self, width: int, heads: int, hidden: int, act: str = "gelu", causal: bool = False
    ):
        super().__init__(width, heads, hidden, act=act)
        self.causal = causal

    def forward(self, x: Tensor, packing: Packing) -> Tensor:  # type: ignore[override]
        """Run over packed tokens; ``packing`` says which text each is of."""
        q, k, v = split_heads(packing.pad(self.attn.qkv(self.norm1(x))), self.heads)
        # Causal attention never looks at the padding behind a text.
        mask = None if self.causal else packing.seen[:, None, None, :]
        o = attention(q, k, v, mask=mask, causal=self.causal, backend=self.attention_backend)
        x = x + self.attn.proj(packing.take(o.transpose(1, 2).flatten(2)))
        return x + self.mlp(self.norm2(x))
