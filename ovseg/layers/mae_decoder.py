"""The decoder of masked autoencoders (He et al., arXiv:2111.06377), as SegCLIP reconstructs pixels from its groups.

Parameter names are those of the published checkpoint.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from .attention import attention


def sincos_positions(grid: tuple[int, int], width: int, device: torch.device | None = None) -> torch.Tensor:
    """[1 + h w, width]: row 0 is zero; the first half encodes the column, the second the row, each sin then cos, base 10000."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64, device=device) / (width // 4))
    halves = []
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64, device=device) for side in grid), indexing="ij")
    for place in (columns, rows):
        angle = place.flatten()[:, None] * frequencies
        halves += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(halves, 1), (0, 0, 1, 0)).float()


def patchify(images: torch.Tensor, patch: int) -> torch.Tensor:
    """[B, 3, H, W] to [B, N, patch * patch * 3]: row in the patch, column in the patch, channel."""
    return images.unfold(2, patch, patch).unfold(3, patch, patch).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class MaeDecoder(nn.Module):
    """Pixels of the removed patches from what is known of the kept ones.

    Args:
        token_dim: width of what comes in.
        patch: side of a patch in pixels.
        width, depth, heads: of the decoder.
    """

    def __init__(self, token_dim: int, patch: int, width: int = 384, depth: int = 3, heads: int = 8):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_embed = nn.Linear(token_dim, width)
        self.decoder_blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.decoder_norm, self.decoder_pred = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, patch * patch * 3)

    def forward(self, kept: torch.Tensor, restore: torch.Tensor, grid: tuple[int, int], wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Predicted pixels [B, N, patch * patch * 3], or [B, M, ...] of the ``wanted`` patches [B, M] only.

        Args:
            kept: [B, K, token_dim] in shuffled order; their mean stands for the class token.
            restore: [B, N], where each patch lies in the shuffled order, the kept ones first.
            grid: (h, w).
            wanted: indices of patches.
        """
        x = self.decoder_embed(torch.cat([kept.mean(1, keepdim=True), kept], 1))
        B, N, width = restore.shape[0], restore.shape[1], x.shape[2]
        patches = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(B, N - kept.shape[1], -1)], 1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, width))
        x = torch.cat([x[:, :1], patches], 1) + sincos_positions(grid, width, x.device).to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:] if wanted is None else x[:, 1:].gather(1, wanted[..., None].expand(-1, -1, width))
        return self.decoder_pred(self.decoder_norm(x))
