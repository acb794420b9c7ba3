"""Dense readouts: what the last attention of a CLIP becomes so that a patch says what lies under
it. Nothing is trained.

    o = sum over the terms t of softmax(s Q_t K_t^T + b) V,    (Q_t, K_t) in {(q, k), (q, q), (k, k), (v, v)}      (1)
    o = V                                                                                     without terms     (2)
    x' = x + out(o), then x' + mlp(norm(x')); either residual branch may be left out             (3)
    o = softmax(A) V,  A = gamma (S - beta mean(S)) where that is not negative, else -inf       the term proxy  (4)

q, k, v are the block's own, s = 1 / sqrt(d), b an additive bias. q and k are taken as the block's
attention takes them, normed and turned by their place where it does so; v is neither. S [N, N] are
the cosines of a second encoder's patches, its mean is over all of them, and (4) is over patches
alone. A row of (4) of which nothing is left, as in a picture of one colour, is not cut. Published
methods are settings of these lines:

=========  ============================================  ==============================================================
clip       (q, k)                                        CLIP as it is
maskclip   identity (2), out(o) alone                    Zhou et al., arXiv:2112.01071: proj(v(x))
sclip      (q, q) + (k, k), block otherwise as it is     Wang et al., arXiv:2312.01597
clearclip  (q, q), out(o) alone                          Lan et al., arXiv:2407.12442
naclip     (k, k) + Gaussian of std 5 patches, out(o)    Hajimiri et al., arXiv:2404.08181
gem        mean of (q, q), (k, k), (v, v) of unit        Bousselham et al., arXiv:2312.00878: a path beside the last 7
           vectors, smoothed once by themselves          blocks, which sums their out(o) and leaves their MLPs out
proxyclip  proxy (4), out(o) alone                       Lan et al., arXiv:2408.04883; needs a second encoder
=========  ============================================  =============================================================="""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from ..registration import Registry, table
from .blocks import AttentionBlock, attention
from .tensors import at_least_float32

TERMS = ("qk", "qq", "kk", "vv")
PROXY = "proxy"


@dataclass(frozen=True)
class Readout:
    """Settings of equations (1) to (4).

    Attributes:
        terms: of (1); empty is (2); ``proxy`` alone is (4).
        mean: over the terms, in place of their sum.
        residual, mlp: whether the branches of (3) are kept.
        window_std: of a Gaussian over the distance of two patches, in patches, added to the scores;
            None without.
        depth: how many of the last blocks are changed.
        parallel: the changed attention runs beside unchanged blocks, on their input, and its
            outputs are summed (GEM).
        iterations: how often each of Q_t = K_t, made of unit vectors, is replaced by its own
            attention of itself (GEM).
        beta, gamma: of (4).
    """

    terms: tuple[str, ...] = ("qk",)
    mean: bool = False
    residual: bool = True
    mlp: bool = True
    window_std: float | None = None
    depth: int = 1
    parallel: bool = False
    iterations: int | None = None
    beta: float = 1.2
    gamma: float = 3.0

    def __post_init__(self):
        if self.proxy:
            self._check_proxy()
        elif not set(self.terms) <= set(TERMS):
            raise ValueError(
                f"readout.terms is {list(self.terms)}; expected some of {list(TERMS)}, or "
                f"{PROXY!r} alone"
            )
        if self.depth < 1 or (self.depth > 1 and not self.parallel):
            raise ValueError(
                f"readout.depth is {self.depth}; expected 1, or more with parallel=True"
            )
        if self.window_std is not None and not self.window_std > 0:
            raise ValueError(
                f"readout.window_std is {self.window_std}; expected a positive number of patches, "
                "or None"
            )
        if self.iterations is not None and (self.iterations < 0 or "qk" in self.terms):
            raise ValueError(
                f"readout.iterations is {self.iterations} with terms {list(self.terms)}; expected "
                "0 or more, without 'qk'"
            )

    @property
    def proxy(self) -> bool:
        """Whether a second encoder says who attends to whom."""
        return self.terms == (PROXY,)

    def _check_proxy(self) -> None:
        if (
            self.depth != 1
            or self.parallel
            or self.window_std is not None
            or self.iterations is not None
            or self.residual
        ):
            raise ValueError(
                f"readout is {self}; expected depth 1, and no residual, parallel, window_std or "
                "iterations beside 'proxy'"
            )
        if not (self.beta >= 0 and self.gamma > 0):
            raise ValueError(
                f"readout has beta {self.beta} and gamma {self.gamma}; expected 0 or more, and "
                "more than 0"
            )


_CLIP_ALONE = {
    "clip": Readout(),
    "maskclip": Readout((), residual=False, mlp=False),
    "sclip": Readout(("qq", "kk")),
    "clearclip": Readout(("qq",), residual=False, mlp=False),
    "naclip": Readout(("kk",), residual=False, mlp=False, window_std=5.0),
    "gem": Readout(("qq", "kk", "vv"), mean=True, mlp=False, depth=7, parallel=True, iterations=1),
}
READOUTS: Registry[Readout] = Registry(
    "readout",
    lambda: table({**_CLIP_ALONE, "proxyclip": Readout((PROXY,), residual=False, mlp=False)}),
    ValueError,
)


class ProxyFeatures(NamedTuple):
    """A second encoder's patches [B, N, C] over its ``grid``.

    ``finer``: where the grid is finer than CLIP's, CLIP's values are resized to it, and the answer
    has this grid; else these patches are resized to CLIP's grid.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    finer: bool = False


def resolve_readout(which: str | dict[str, Any] | Readout) -> Readout:
    """A named readout, or one of the given settings."""
    if isinstance(which, Readout):
        return which
    if isinstance(which, str):
        return READOUTS[which]
    unknown = set(which) - {field.name for field in fields(Readout)}
    if unknown:
        raise ValueError(
            f"readout has unknown fields {sorted(unknown)}; expected some of "
            f"{[field.name for field in fields(Readout)]}"
        )
    return Readout(**{**which, "terms": tuple(which.get("terms", ("qk",)))})


class Read(NamedTuple):
    """``patches`` [B, N, D] over ``grid``; ``own`` [B, >= first, D], CLIP's own tokens whatever the
    readout; before the final norm.
    """

    patches: torch.Tensor
    own: torch.Tensor
    grid: tuple[int, int]


def run_blocks(
    blocks: Sequence[AttentionBlock],
    x: torch.Tensor,
    readout: Readout,
    grid: tuple[int, int],
    *,
    prefix: int = 1,
    first: int | None = 1,
    rope: torch.Tensor | None = None,
    proxy: ProxyFeatures | None = None,
) -> Read:
    """Walk over the blocks.

    Args:
        x: [B, prefix + N, D], the class token and registers before the patches.
        first: how many of the leading tokens of ``own`` are needed; None for all.
        rope: of rotary blocks, see ``layers.positions.rotate``.
        proxy: for the term ``proxy``.
    """
    if readout == READOUTS["clip"]:
        x = run_plain(blocks, x, rope=rope)
        return Read(x[:, prefix:], x, grid)
    depth = min(readout.depth, len(blocks))
    x = run_plain(blocks[:-depth], x, rope=rope)
    if readout.proxy:
        patches, grid = _proxy_patches(blocks[-1], x[:, prefix:], readout, grid, proxy)
        return Read(patches, run_plain(blocks[-1:], x, rope=rope, first=first), grid)
    bias = (
        None
        if readout.window_std is None
        else gaussian_window(grid, readout.window_std, x, prefix=prefix)
    )
    dense = x
    for block in blocks[-depth:]:
        o = block.merge(_attend(block, x, readout, bias, rope))
        if readout.parallel:
            dense = dense + o
        else:
            dense = x + o if readout.residual else o
            dense = dense + block.feed(dense) if readout.mlp else dense
        x = block(x, first=first if block is blocks[-1] else None, rope=rope)
    return Read(dense[:, prefix:], x, grid)


def run_plain(
    blocks: Sequence[AttentionBlock],
    x: torch.Tensor,
    *,
    rope: torch.Tensor | None = None,
    first: int | None = None,
) -> torch.Tensor:
    """The blocks as they are; of the last one only the ``first`` tokens."""
    for i, block in enumerate(blocks):
        x = block(x, first=first if i == len(blocks) - 1 else None, rope=rope)
    return x


def gaussian_window(
    grid: tuple[int, int], std: float, like: torch.Tensor, *, prefix: int = 1
) -> torch.Tensor:
    """[prefix + N, prefix + N]: exp(-distance^2 / (2 std^2)) between patches, 0 where the class
    token or a register takes part.
    """
    rows, columns = (torch.arange(side, device=like.device, dtype=like.dtype) for side in grid)
    at = torch.cartesian_prod(rows, columns)
    near = torch.exp(-(at[:, None] - at[None]).square().sum(-1) / (2 * std * std))
    return F.pad(near, (prefix, 0, prefix, 0))


def proxy_attention(patches: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """softmax(A) of (4) [B, N, N] from a second encoder's ``patches`` [B, N, C]."""
    unit = F.normalize(at_least_float32(patches), dim=-1)
    s = unit @ unit.transpose(1, 2)
    a = gamma * (s - beta * s.mean((1, 2), keepdim=True))
    cut = a < 0
    return a.masked_fill(cut & ~cut.all(-1, keepdim=True), float("-inf")).softmax(-1)


def resize_patches(
    patches: torch.Tensor, grid: tuple[int, int], size: tuple[int, int]
) -> torch.Tensor:
    """[B, N, D] over ``grid`` to [B, M, D] over ``size``, bilinear."""
    if grid == size:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)
    return (
        F.interpolate(maps, size, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    )


def _proxy_patches(
    block: AttentionBlock,
    x: torch.Tensor,
    readout: Readout,
    grid: tuple[int, int],
    proxy: ProxyFeatures | None,
) -> tuple[torch.Tensor, tuple[int, int]]:
    """(patches [B, N, D] of (3) and (4), their grid) from the patches ``x`` that go into the block."""
    if proxy is None:
        raise ValueError(
            "the readout has the term 'proxy' and proxy is None; expected a second encoder's "
            "patches"
        )
    v = block.project(block.norm_1(x))[2]
    patches, size = proxy.patches, grid
    if proxy.finer and proxy.grid[0] * proxy.grid[1] > grid[0] * grid[1]:
        size = proxy.grid
        v = (
            resize_patches(v.transpose(1, 2).flatten(2), grid, size)
            .unflatten(2, (v.shape[1], -1))
            .transpose(1, 2)
        )
    weights = proxy_attention(
        resize_patches(patches, proxy.grid, size), readout.beta, readout.gamma
    )
    dense = block.merge(weights[:, None].to(v.dtype) @ v)
    return dense + block.feed(dense) if readout.mlp else dense, size


def _attend(
    block: AttentionBlock,
    x: torch.Tensor,
    readout: Readout,
    bias: torch.Tensor | None,
    rope: torch.Tensor | None,
) -> torch.Tensor:
    """o of (1) and (2), [B, heads, L, d]."""
    normed = block.norm_1(x)
    named = dict(zip("qkv", block.project(normed, rope), strict=True))
    v = named["v"]
    if not readout.terms:
        return v
    attend = partial(attention, mask=bias, backend=block.attention_backend)
    if readout.iterations is None:
        outputs = [attend(named[term[0]], named[term[1]], v) for term in readout.terms]
    # GEM's inverse temperature: the mean norm of the block's normed input over sqrt(d), for each
    # image
    else:
        heat = normed.norm(dim=-1).mean(-1)[:, None, None, None] * v.shape[-1] ** -0.5
        outputs = []
        for term in readout.terms:
            a = F.normalize(named[term[0]], dim=-1)
            for _ in range(readout.iterations):
                a = F.normalize(attend(a * heat, a, a, scale=1.0), dim=-1)
            outputs.append(attend(a * heat, a, v, scale=1.0))
    total = torch.stack(outputs).sum(0)
    return total / len(outputs) if readout.mean else total
