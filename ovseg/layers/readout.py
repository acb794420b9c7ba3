"""Dense readouts: what the last attention of a CLIP becomes so that a patch says what lies under it. Nothing is trained.

    o = sum over the terms t of softmax(s Q_t K_t^T + b) V,    (Q_t, K_t) in {(q, k), (q, q), (k, k), (v, v)}      (1)
    o = V                                                                                     without terms     (2)
    x' = x + out(o), then x' + mlp(norm(x')); either residual branch may be left out                            (3)

q, k, v are the block's own, s = 1 / sqrt(d), b an additive bias. Published methods are settings of these three lines:

=========  ============================================  ==============================================================
clip       (q, k)                                        CLIP as it is
maskclip   identity (2), out(o) alone                    Zhou et al., arXiv:2112.01071: proj(v(x))
sclip      (q, q) + (k, k), block otherwise as it is     Wang et al., arXiv:2312.01597
clearclip  (q, q), out(o) alone                          Lan et al., arXiv:2407.12442
naclip     (k, k) + Gaussian of std 5 patches, out(o)    Hajimiri et al., arXiv:2404.08181
gem        mean of (q, q), (k, k), (v, v) of unit        Bousselham et al., arXiv:2312.00878: a path beside the last 7
           vectors, smoothed once by themselves          blocks, which sums their out(o) and leaves their MLPs out
=========  ============================================  ==============================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

from .attention import attention
from .block import AttentionBlock

TERMS = ("qk", "qq", "kk", "vv")


@dataclass(frozen=True)
class Readout:
    """Settings of equations (1) to (3).

    Attributes:
        terms: of (1); empty is (2).
        mean: over the terms, in place of their sum.
        residual, mlp: whether the branches of (3) are kept.
        window_std: of a Gaussian over the distance of two patches, in patches, added to the scores; None without.
        depth: how many of the last blocks are changed.
        parallel: the changed attention runs beside unchanged blocks, on their input, and its outputs are summed (GEM).
        iterations: how often each of Q_t = K_t, made of unit vectors, is replaced by its own attention of itself (GEM).
    """

    terms: tuple[str, ...] = ("qk",)
    mean: bool = False
    residual: bool = True
    mlp: bool = True
    window_std: float | None = None
    depth: int = 1
    parallel: bool = False
    iterations: int | None = None

    def __post_init__(self):
        if not set(self.terms) <= set(TERMS):
            raise ValueError(f"readout.terms is {list(self.terms)}; expected some of {list(TERMS)}")
        if self.depth < 1 or (self.depth > 1 and not self.parallel):
            raise ValueError(f"readout.depth is {self.depth}; expected 1, or more with parallel=True")
        if self.window_std is not None and not self.window_std > 0:
            raise ValueError(f"readout.window_std is {self.window_std}; expected a positive number of patches, or None")
        if self.iterations is not None and (self.iterations < 0 or "qk" in self.terms):
            raise ValueError(f"readout.iterations is {self.iterations} with terms {list(self.terms)}; expected 0 or more, without 'qk'")


READOUTS = {
    "clip": Readout(),
    "maskclip": Readout((), residual=False, mlp=False),
    "sclip": Readout(("qq", "kk")),
    "clearclip": Readout(("qq",), residual=False, mlp=False),
    "naclip": Readout(("kk",), residual=False, mlp=False, window_std=5.0),
    "gem": Readout(("qq", "kk", "vv"), mean=True, mlp=False, depth=7, parallel=True, iterations=1),
}


def resolve_readout(which: str | dict[str, Any] | Readout) -> Readout:
    """A named readout, or one of the given settings."""
    if isinstance(which, Readout):
        return which
    if isinstance(which, str):
        if which not in READOUTS:
            raise ValueError(f"readout is {which!r}; expected one of {list(READOUTS)}, or the fields of a Readout")
        return READOUTS[which]
    unknown = set(which) - {field.name for field in fields(Readout)}
    if unknown:
        raise ValueError(f"readout has unknown fields {sorted(unknown)}; expected some of {[field.name for field in fields(Readout)]}")
    return Readout(**{**which, "terms": tuple(which.get("terms", ("qk",)))})


def run_blocks(blocks: Sequence[AttentionBlock], x: torch.Tensor, readout: Readout,
               grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """(patch tokens [B, N, D], class token [B, D]) of ``x`` [B, 1 + N, D], class token first, before the final norm.

    The class token is CLIP's own, whatever the readout.
    """
    if readout == READOUTS["clip"]:
        for block in blocks:
            x = block(x)
        return x[:, 1:], x[:, 0]
    depth = min(readout.depth, len(blocks))
    for block in blocks[:-depth]:
        x = block(x)
    bias = None if readout.window_std is None else gaussian_window(grid, readout.window_std, x)
    dense = x
    for block in blocks[-depth:]:
        o = block.merge(_attend(block, x, readout, bias))
        if readout.parallel:
            dense = dense + o
        else:
            dense = x + o if readout.residual else o
            dense = dense + block.feed(dense) if readout.mlp else dense
        x = block(x, first=1 if block is blocks[-1] else None)
    return dense[:, 1:], x[:, 0]


def gaussian_window(grid: tuple[int, int], std: float, like: torch.Tensor) -> torch.Tensor:
    """[1 + N, 1 + N]: exp(-distance^2 / (2 std^2)) between patches, 0 where the class token takes part."""
    rows, columns = (torch.arange(side, device=like.device, dtype=like.dtype) for side in grid)
    at = torch.cartesian_prod(rows, columns)
    near = torch.exp(-(at[:, None] - at[None]).square().sum(-1) / (2 * std * std))
    return F.pad(near, (1, 0, 1, 0))


def _attend(block: AttentionBlock, x: torch.Tensor, readout: Readout, bias: torch.Tensor | None) -> torch.Tensor:
    """o of (1) and (2), [B, heads, L, d]."""
    normed = block.norm_1(x)
    named = dict(zip("qkv", block.project(normed), strict=True))
    v = named["v"]
    if not readout.terms:
        return v
    attend = partial(attention, mask=bias, backend=block.attention_backend)
    if readout.iterations is None:
        outputs = [attend(named[term[0]], named[term[1]], v) for term in readout.terms]
    else:  # GEM's inverse temperature: the mean norm of the block's normed input over sqrt(d), for each image
        heat = normed.norm(dim=-1).mean(-1)[:, None, None, None] * v.shape[-1] ** -0.5
        outputs = []
        for term in readout.terms:
            a = F.normalize(named[term[0]], dim=-1)
            for _ in range(readout.iterations):
                a = F.normalize(attend(a * heat, a, a, scale=1.0), dim=-1)
            outputs.append(attend(a * heat, a, v, scale=1.0))
    total = torch.stack(outputs).sum(0)
    return total / len(outputs) if readout.mean else total
