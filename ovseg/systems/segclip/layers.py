"""SegCLIP's group module, and the decoder that reconstructs pixels from its groups.

Learnable centers look at the patches, then every patch goes to one center (Luo et al.,
arXiv:2211.14813).

    c <- c + MHA(LN_x(c), LN_k([c; x]), LN_k([c; x]));  c <- c + MLP(LN_2(c))                    (1)
    q = LN(c);  pooled, index = segclip_center_assignment(q, x)                                  (2)
    z = quick_gelu(fc2(gelu(fc1(LN(q + pooled)))))                            no residual        (3)

(1) runs twice, c_0 is learned. Its attention has G queries and L + G keys, so its projections move
to the queries' side, exactly: with q_h the query of a head,

    q_h . (W_K,h k) = (W_K,h^T q_h) . k          sum_l a_l W_V,h k_l = W_V,h sum_l a_l k_l       (4)

no key and no value exists; the key's bias cancels in the softmax, the value's is a constant.

The decoder is that of masked autoencoders (He et al., arXiv:2111.06377). Parameter names are those
of the published checkpoint.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ovseg_kernels as ok

from ...nn.blocks import quick_gelu, quick_gelu_linear
from ...nn.features import Grid
from ...nn.vit_blocks import Mlp, VitBlock

_TINY = 1e-30  # below it log(soft) is cut: such a center has no share in any sum


class Groups(NamedTuple):
    """Groups of pictures, as the group module gives them.

    Attributes:
        tokens: [B, G, D] of (3).
        index: [B, L], the center of each patch.
        soft: [B, G, L], its shares without noise.
        centers: [B, G, D], q of (2).
    """

    tokens: Tensor
    index: Tensor
    soft: Tensor
    centers: Tensor

    def assignment(self, noise: Tensor | None, tau: float) -> Tensor:
        """Return 1 at each patch's center and 0 elsewhere, [B, G, L], straight-through.

        Its gradient is that of softmax((z + noise) / tau), z = log(soft).
        """
        z = self.soft.clamp(min=_TINY).log()
        y = ((z if noise is None else z + noise) / tau).softmax(1)
        return torch.zeros_like(y).scatter_(1, self.index[:, None], 1.0) + (y - y.detach())


class _Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu_linear(self.c_fc(x), self.c_proj.weight, self.c_proj.bias)


class CrossBlock(nn.Module):
    """One round of (1)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)  # its parameters; (4) is computed here
        self.ln_x = nn.LayerNorm(width)
        self.ln_k = nn.LayerNorm(width)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = _Mlp(width)

    def forward(self, centers: Tensor, tokens: Tensor, mix_batch: bool = False) -> Tensor:
        """Let centers look at themselves and the patches.

        Args:
            centers: [B, G, D].
            tokens: [B, L, D].
            mix_batch: read the normed keys as [S, B, D] where they are [B, S, D], as the published
                training did: an image's centers then see a few patches of every image of the batch.
                For one image both are the same.
        """
        heads = self.attn.num_heads
        B, G, D = centers.shape
        keys = self.ln_k(torch.cat([centers, tokens], 1))
        if mix_batch:
            keys = keys.reshape(keys.shape[1], B, D).transpose(0, 1)
        weight = self.attn.in_proj_weight.unflatten(0, (3, heads, D // heads))
        of_query, of_key, of_value = weight.unbind(0)
        bias = self.attn.in_proj_bias.unflatten(0, (3, heads, D // heads))
        q = torch.einsum("bgi,hdi->bhgd", self.ln_x(centers), of_query) + bias[0][:, None]
        folded = torch.einsum("bhgd,hdi->bhgi", q * (D // heads) ** -0.5, of_key)
        weights = (folded.flatten(1, 2) @ keys.transpose(1, 2)).softmax(-1)
        seen = (weights @ keys).unflatten(1, (heads, G))
        o = torch.einsum("bhgi,hdi->bghd", seen, of_value) + bias[2]
        centers = centers + self.attn.out_proj(o.flatten(2))
        return centers + self.mlp(self.ln_2(centers))


class _Output(nn.Module):
    """The layer of (3)."""

    def __init__(self, width: int):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return quick_gelu(self.mlp(self.ln(x)))


class SemanticGroups(nn.Module):
    """The group module, (1) to (3).

    Args:
        width: D of the patches.
        centers: G.
        heads: of the cross-attention, and groups of the key and value projections.
        cross_layers: how often (1) runs.
        mix_batch: see ``CrossBlock``; only to follow the published training.
    """

    def __init__(
        self,
        width: int,
        centers: int = 8,
        heads: int | None = None,
        cross_layers: int = 2,
        mix_batch: bool = False,
    ):
        super().__init__()
        heads = heads or width // 64
        self.mix_batch = mix_batch
        self.semantic_center = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(centers, width), std=0.02)
        )
        self.norm = nn.LayerNorm(width)
        self.cross_ln = nn.LayerNorm(width)
        self.k_ln = nn.LayerNorm(width)
        self.cross_att = nn.ModuleList(CrossBlock(width, heads) for _ in range(cross_layers))
        self.k_conv = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.v_conv = nn.Conv1d(width, width, 1, groups=heads, bias=False)
        self.proj_o = _Output(width)

    def forward(self, tokens: Tensor, noise: Tensor | None = None, tau: float = 1.0) -> Groups:
        """Gather patches.

        Args:
            tokens: [B, L, D].
            noise: of the assignment [B, G, L], in training.
            tau: of the assignment.
        """
        centers = self.semantic_center.expand(len(tokens), -1, -1)
        for block in self.cross_att:
            centers = block(centers, tokens, self.mix_batch)
        q = self.cross_ln(centers)
        pooled, index, soft = ok.segclip_center_assignment(
            q,
            tokens,
            self.k_conv.weight[..., 0],
            self.v_conv.weight[..., 0],
            self.norm.weight,
            self.norm.bias,
            self.k_ln.weight,
            self.k_ln.bias,
            eps=self.norm.eps,
            noise=noise,
            tau=tau,
            normalizer="mean",
            return_soft=True,
        )
        assert soft is not None
        return Groups(self.proj_o(q + pooled), index, soft, q)


def sincos_positions(grid: Grid, width: int, device: torch.device | None = None) -> Tensor:
    """Return positions [1 + h w, width], of which row 0 is zero.

    The first half encodes the column, the second the row, each sin then cos, base 10000.
    """
    exact = {"dtype": torch.float64, "device": device}
    frequencies = 10000.0 ** -(torch.arange(width // 4, **exact) / (width // 4))
    halves = []
    sides = (torch.arange(side, **exact) for side in grid)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    for place in (columns, rows):
        angle = place.flatten()[:, None] * frequencies
        halves += [angle.sin(), angle.cos()]
    return F.pad(torch.cat(halves, 1), (0, 0, 1, 0)).float()


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cut [B, 3, H, W] into [B, N, patch * patch * 3].

    A patch's numbers are ordered by row in it, column in it, channel.
    """
    cut = images.unfold(2, patch, patch).unfold(3, patch, patch)
    return cut.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


class MaeDecoder(nn.Module):
    """The decoder of masked autoencoders: pixels of removed patches from the kept ones.

    Args:
        token_dim: width of what comes in.
        patch: side of a patch in pixels.
        width, depth, heads: of the decoder.
    """

    def __init__(
        self, token_dim: int, patch: int, width: int = 384, depth: int = 3, heads: int = 8
    ):
        super().__init__()
        self.mask_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.decoder_embed = nn.Linear(token_dim, width)
        self.decoder_blocks = nn.ModuleList(
            VitBlock(width, heads, 4 * width, eps=1e-6) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_pred = nn.Linear(width, patch * patch * 3)

    def forward(
        self, kept: Tensor, restore: Tensor, grid: Grid, wanted: Tensor | None = None
    ) -> Tensor:
        """Predict pixels [B, N, patch * patch * 3], or [B, M, ...] of the wanted patches only.

        Args:
            kept: [B, K, token_dim] in shuffled order; their mean stands for the class token.
            restore: [B, N], where each patch lies in the shuffled order, the kept ones first.
            grid: (h, w).
            wanted: indices of patches [B, M].
        """
        x = self.decoder_embed(torch.cat([kept.mean(1, keepdim=True), kept], 1))
        B, N = restore.shape
        width = x.shape[2]
        hidden = self.mask_token.to(x.dtype).expand(B, N - kept.shape[1], -1)
        patches = torch.cat([x[:, 1:], hidden], 1)
        patches = patches.gather(1, restore[..., None].expand(-1, -1, width))
        x = torch.cat([x[:, :1], patches], 1) + sincos_positions(grid, width, x.device).to(x.dtype)
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, 1:]
        if wanted is not None:
            x = x.gather(1, wanted[..., None].expand(-1, -1, width))
        return self.decoder_pred(self.decoder_norm(x))
