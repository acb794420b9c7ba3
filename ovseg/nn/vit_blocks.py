"""Position embeddings for another grid than the one they were trained on.

Texts of different lengths without their padding: layers over tokens see [N, D], only attention goes
through [T, L, D].

Of texts of 8 to 30 tokens, padded to 77, three quarters of the work is padding. Attention itself is
little of it, so it runs padded to the longest text, on any device and under its own kernels; every
linear layer, norm and activation runs on the tokens alone.

A ViT's block with a packed projection, for pictures [B, L, D] and for packed texts [N, D];
stochastic depth.

Parameter names are those of timm and of the published checkpoints of GroupViT and OVSegmentor.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from .blocks import AttentionBlock, attention, quick_gelu_linear
from .tensors import upload


def resize_positions(
    positions: torch.Tensor,
    trained: tuple[int, int],
    grid: tuple[int, int],
    *,
    antialias: bool = True,
    prefix: int = 1,
    mode: str = "bicubic",
) -> torch.Tensor:
    """[prefix + h w, D] for the ``trained`` (h, w), class token and registers first, to [prefix + H
    W, D] for ``grid``.

    ``antialias`` is open_clip's way; without it torch's bicubic has another kernel, also where it
    enlarges (SegCLIP's way). ``mode`` bilinear without it is DenseCLIP's, and so ZegCLIP's.
    """
    if trained == grid:
        return positions
    first, dense = positions[:prefix], positions[prefix:]
    dense = dense.float().view(1, *trained, -1).permute(0, 3, 1, 2)
    dense = F.interpolate(dense, grid, mode=mode, antialias=antialias, align_corners=False)
    return torch.cat(
        [first, dense.permute(0, 2, 3, 1).reshape(grid[0] * grid[1], -1).to(positions.dtype)]
    )


def rotate(x: torch.Tensor, rope: torch.Tensor, *, prefix: int, half: bool) -> torch.Tensor:
    """Queries or keys [B, heads, prefix + N, d], turned by their patch's place; the prefix has
    none.

    ``rope`` [N, 2 d]: sines, then cosines, as timm makes them. Dimensions turn in pairs (2i, 2i +
    1), or (i, i + d / 2) if ``half``.
    """
    first, x = x[:, :, :prefix], x[:, :, prefix:]
    sin, cos = rope.chunk(2, -1)
    if half:
        a, b = x.chunk(2, -1)
        turned = torch.cat([-b, a], -1)
    else:
        turned = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    x = x * cos + turned * sin
    return torch.cat([first.to(x.dtype), x], 2)


class Packing:
    """Where the tokens of texts lie.

    Args:
        keep: [T, L] bool, the tokens. A text without any is its first place.
        pads: compute the padding too, as published training does: it is looked at by nobody, but
            looks itself.
        device: where the tokens are computed. With ``keep`` on the CPU nothing waits for it; on a
            GPU the lengths do.

    Attributes:
        seen: [T, L'] bool, what may be looked at; L' is the longest text, or L with ``pads``.
        positions: [N] int64, of each packed token in its text.
        starts: [T] int64, the packed index of each text's first token.
    """

    def __init__(self, keep: torch.Tensor, pads: bool = False, device: torch.device | None = None):
        device = keep.device if device is None else device
        self.whole = (
            pads or torch.compiler.is_compiling()
        )  # under torch.compile lengths are no numbers: everything is computed
        rows, starts, seen, self._firsts = places(keep, self.whole)
        self.shape = (seen.shape[0], seen.shape[1])
        self.rows, self.starts, self.seen = (
            upload(rows, device),
            upload(starts, device),
            upload(seen, device),
        )
        self.positions = (self.rows % self.shape[1]) if self.shape[1] else self.rows

    def split(self, sizes: Sequence[int]) -> list[Packing]:
        """Of neighbouring texts, so many each, with the places within them."""
        found, first = [], 0
        for size in sizes:
            part, last = copy.copy(self), first + size
            at, end = (
                (first * self.shape[1], last * self.shape[1])
                if self.whole
                else (self._firsts[first], self._firsts[last])
            )
            part.shape, part.rows = (size, self.shape[1]), self.rows[at:end] - first * self.shape[1]
            part.positions, part.starts, part.seen = (
                self.positions[at:end],
                self.starts[first:last] - at,
                self.seen[first:last],
            )
            part._firsts = [x - at for x in self._firsts[first : last + 1]]
            found.append(part)
            first = last
        return found

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[T, L', ...] to the tokens [N, ...]."""
        flat = x.flatten(0, 1)
        return flat if self.whole else flat.index_select(0, self.rows)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens [N, ...] to [T, L', ...]; zeros where there is none."""
        if not self.whole:
            x = x.new_zeros(self.shape[0] * self.shape[1], *x.shape[1:]).index_copy(0, self.rows, x)
        return x.unflatten(0, self.shape)


def places(
    keep: torch.Tensor, whole: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[int]]:
    """Where ``keep`` [T, L] has them, what a ``Packing`` is made of: rows [N] of [T L'], starts
    [T], seen [T, L'], and without ``whole`` the starts and N as numbers. Reads ``keep``, unless
    ``whole``.
    """
    keep = keep | (torch.arange(keep.shape[1], device=keep.device) == 0)
    if whole:
        every = torch.arange(keep.numel(), device=keep.device)
        return (
            every,
            every[:: keep.shape[1]] if keep.shape[1] else every.new_zeros(len(keep)),
            keep,
            [],
        )
    longest = (
        int((keep.int() * torch.arange(1, keep.shape[1] + 1, device=keep.device)).amax())
        if keep.numel()
        else 0
    )
    keep = keep[:, :longest]
    ends = keep.sum(1).cumsum(0)
    return keep.flatten().nonzero()[:, 0], ends - keep.sum(1), keep, [0, *ends.tolist()]


ACTIVATIONS = ("gelu", "quick_gelu")


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """A residual branch [B, ...] left out for a share ``rate`` of the rows, the others scaled up to
    keep the mean.
    """
    if not rate or not training:
        return branch
    kept = torch.empty(
        len(branch), *[1] * (branch.dim() - 1), dtype=branch.dtype, device=branch.device
    ).bernoulli_(1 - rate)
    return branch * kept / (1 - rate)


class Mlp(nn.Module):
    """Two layers, ``width`` to ``hidden`` to ``out`` (``width`` if None)."""

    def __init__(self, width: int, hidden: int, out: int | None = None, act: str = "gelu"):
        super().__init__()
        if act not in ACTIVATIONS:
            raise ValueError(f"act is {act!r}; expected one of {list(ACTIVATIONS)}")
        self.fc1, self.fc2, self.act = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width if out is None else out),
            act,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(x)
        if self.act == "quick_gelu":
            return quick_gelu_linear(hidden, self.fc2.weight, self.fc2.bias)
        return self.fc2(F.gelu(hidden))


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)


class VitBlock(AttentionBlock):
    """Norm before attention and MLP.

    Args:
        width, heads: D and the number of heads, which no tensor shows.
        hidden: width of the MLP.
        drop_path: share of the rows that a branch is left out for in training; both branches have
            one rate.
        act: ``gelu`` (erf) or ``quick_gelu``.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, drop_path: float = 0.0, act: str = "gelu"
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"width is {width} and heads {heads}; expected a whole number of channels a head"
            )
        self.heads, self.rate = heads, drop_path
        self.norm1, self.attn = nn.LayerNorm(width), _Attention(width)
        self.norm2, self.mlp = nn.LayerNorm(width), Mlp(width, hidden, act=act)

    @property
    def norm_1(self) -> nn.Module:  # type: ignore[override]
        return self.norm1

    def project(
        self, normed: torch.Tensor, rope: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.attn.qkv(normed).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def merge(self, o: torch.Tensor) -> torch.Tensor:
        return drop_path(self.attn.proj(o.transpose(1, 2).flatten(2)), self.rate, self.training)

    def feed(self, x: torch.Tensor) -> torch.Tensor:
        return drop_path(self.mlp(self.norm2(x)), self.rate, self.training)


class PackedBlock(VitBlock):
    """The block of a text tower: over packed tokens [N, D], attention within each text."""

    def __init__(
        self, width: int, heads: int, hidden: int, act: str = "gelu", causal: bool = False
    ):
        super().__init__(width, heads, hidden, act=act)
        self.causal = causal

    def forward(self, x: torch.Tensor, packing: Packing) -> torch.Tensor:  # type: ignore[override]
        q, k, v = (
            packing.pad(self.attn.qkv(self.norm1(x)))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
        )
        # Causal attention never looks at the padding behind a text.
        mask = None if self.causal else packing.seen[:, None, None, :]
        o = packing.take(
            attention(q, k, v, mask=mask, causal=self.causal, backend=self.attention_backend)
            .transpose(1, 2)
            .flatten(2)
        )
        x = x + self.attn.proj(o)
        return x + self.mlp(self.norm2(x))
