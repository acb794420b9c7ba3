"""Dense readouts: the last attention of a CLIP, changed so that a patch says what lies under it.

Nothing is trained.

    o = sum over the terms t of softmax(s Q_t K_t^T + b) V                                       (1)
        (Q_t, K_t) in {(q, k), (q, q), (k, k), (v, v)}
    o = V                                                  without terms                         (2)
    x' = x + out(o), then x' + mlp(norm(x'))               either branch may be left out         (3)
    o = softmax(A) V                                       the term proxy                        (4)
        A = gamma (S - beta mean(S)) where that is not negative, else -inf

q, k, v are the block's own, s = 1 / sqrt(d), b an additive bias. q and k are taken as the block's
attention takes them, normed and turned by their place where it does so; v is neither. S [N, N] are
the cosines of a second encoder's patches, its mean is over all of them, and (4) is over patches
alone. A row of (4) of which nothing is left, as in a picture of one colour, is not cut. Published
methods are settings of these lines:

=========  ==========================================  ===========================================
clip       (q, k)                                      CLIP as it is
maskclip   identity (2), out(o) alone                  Zhou et al., arXiv:2112.01071: proj(v(x))
sclip      (q, q) + (k, k), block as it is otherwise   Wang et al., arXiv:2312.01597
clearclip  (q, q), out(o) alone                        Lan et al., arXiv:2407.12442
naclip     (k, k) + Gaussian of std 5 patches, out(o)  Hajimiri et al., arXiv:2404.08181
gem        mean of (q, q), (k, k), (v, v) of unit      Bousselham et al., arXiv:2312.00878: a path
           vectors, smoothed once by themselves        beside the last 7 blocks, which sums their
                                                       out(o) and leaves their MLPs out
proxyclip  proxy (4), out(o) alone                     Lan et al., arXiv:2408.04883; needs a second
                                                       encoder
=========  ==========================================  ===========================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..bounds import bounded, check_bounds
from ..registration import Registry, table
from .blocks import AttentionBlock, attention
from .features import Grid, PatchFeatures
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
    window_std: float | None = bounded(
        None, low=0, above=True, expected="a positive number of patches, or None"
    )
    depth: int = bounded(1, low=1)
    parallel: bool = False
    iterations: int | None = bounded(None, low=0)
    beta: float = bounded(1.2, low=0)
    gamma: float = bounded(3.0, low=0, above=True)

    def __post_init__(self):
        check_bounds(self, "readout.", ValueError)
        if not self.proxy and not set(self.terms) <= set(TERMS):
            raise ValueError(
                f"readout.terms is {list(self.terms)}; expected some of {list(TERMS)}, or "
                f"{PROXY!r} alone"
            )
        if self.depth > 1 and not self.parallel:
            raise ValueError(
                f"readout.depth is {self.depth}; expected 1, or more with parallel=True"
            )
        if self.iterations is not None and "qk" in self.terms:
            raise ValueError(
                f"readout.iterations is {self.iterations} with terms {list(self.terms)}; expected "
                "None, or terms without 'qk'"
            )
        beside = (self.parallel, self.residual, self.window_std, self.iterations)
        if self.proxy and any(one not in (None, False) for one in beside):
            raise ValueError(
                f"readout is {self}; expected depth 1, and no residual, parallel, window_std or "
                "iterations beside 'proxy'"
            )

    @property
    def proxy(self) -> bool:
        """True where a second encoder says who attends to whom."""
        return self.terms == (PROXY,)


CLIP = Readout()
_PUBLISHED = {
    "clip": CLIP,
    "maskclip": Readout((), residual=False, mlp=False),
    "sclip": Readout(("qq", "kk")),
    "clearclip": Readout(("qq",), residual=False, mlp=False),
    "naclip": Readout(("kk",), residual=False, mlp=False, window_std=5.0),
    "gem": Readout(("qq", "kk", "vv"), mean=True, mlp=False, depth=7, parallel=True, iterations=1),
    "proxyclip": Readout((PROXY,), residual=False, mlp=False),
}
READOUTS: Registry[Readout] = Registry("readout", lambda: table(_PUBLISHED), ValueError)


def resolve_readout(which: str | dict[str, Any] | Readout) -> Readout:
    """Return a named readout, or one of the given settings."""
    if isinstance(which, Readout):
        return which
    if isinstance(which, str):
        return READOUTS[which]
    known = [field.name for field in fields(Readout)]
    unknown = set(which) - set(known)
    if unknown:
        raise ValueError(f"readout has unknown fields {sorted(unknown)}; expected some of {known}")
    return Readout(**{**which, "terms": tuple(which.get("terms", CLIP.terms))})


class ProxyFeatures(NamedTuple):
    """A second encoder's patches, for the term ``proxy``.

    Attributes:
        patches: [B, N, C] over ``grid``.
        grid: (h, w).
        finer: whether CLIP's values are resized to ``grid`` where that is the finer of the two, and
            the answer has this grid; else these patches are resized to CLIP's grid.
    """

    patches: Tensor
    grid: Grid
    finer: bool = False


class Pooling(NamedTuple):
    """How a tower makes one vector of a picture from all of its tokens after the last block.

    Attributes:
        pool: [B, prefix + N, D] to [B, ...].
        prefix: how many tokens stand before the patches: a class token and registers, or none.
        first: how many of the leading tokens ``pool`` looks at; None for all. The others are not
            computed in the last block where the readout does without them.
    """

    pool: Callable[[Tensor], Tensor]
    prefix: int = 1
    first: int | None = 1


CLASS_TOKEN = Pooling(lambda tokens: tokens[:, 0])


def run_blocks(
    blocks: Sequence[AttentionBlock],
    x: Tensor,
    readout: Readout,
    grid: Grid,
    *,
    pooling: Pooling = CLASS_TOKEN,
    rope: Tensor | None = None,
    proxy: ProxyFeatures | None = None,
) -> PatchFeatures:
    """Walk over the blocks; what comes out stands before the final norm.

    Args:
        blocks: of the tower.
        x: [B, prefix + N, D], the class token and registers before the patches.
        readout: what the last blocks' attention becomes for the patches.
        grid: (h, w), with h w = N.
        pooling: makes ``embedding`` of CLIP's own tokens, whatever the readout.
        rope: of rotary blocks, see ``vit_blocks.rotate``.
        proxy: for the term ``proxy``.
    """
    pool, prefix, first = pooling
    if readout == CLIP:
        x = run_plain(blocks, x, rope=rope)
        return PatchFeatures(pool(x), x[:, prefix:], grid)
    depth = min(readout.depth, len(blocks))
    x = run_plain(blocks[:-depth], x, rope=rope)
    if readout.proxy:
        dense, grid = _proxy_patches(blocks[-1], x[:, prefix:], readout, grid, proxy)
        own = run_plain(blocks[-1:], x, rope=rope, first=first)
        return PatchFeatures(pool(own), dense, grid)
    bias = None
    if readout.window_std is not None:
        bias = gaussian_window(grid, readout.window_std, x, prefix=prefix)
    dense = x
    for block in blocks[-depth:]:
        o = block.merge(_attend(block, x, readout, bias, rope))
        if readout.parallel:
            dense = dense + o
        else:
            dense = x + o if readout.residual else o
            dense = dense + block.feed(dense) if readout.mlp else dense
        x = block(x, first=first if block is blocks[-1] else None, rope=rope)
    return PatchFeatures(pool(x), dense[:, prefix:], grid)


def run_plain(
    blocks: Sequence[AttentionBlock],
    x: Tensor,
    *,
    rope: Tensor | None = None,
    first: int | None = None,
) -> Tensor:
    """Run the blocks as they are; of the last one only the ``first`` tokens."""
    for i, block in enumerate(blocks):
        x = block(x, first=first if i == len(blocks) - 1 else None, rope=rope)
    return x


def gaussian_window(grid: Grid, std: float, like: Tensor, *, prefix: int = 1) -> Tensor:
    """Return exp(-distance^2 / (2 std^2)) between patches, [prefix + N, prefix + N].

    It is 0 where the class token or a register takes part.
    """
    rows, columns = (torch.arange(side, device=like.device, dtype=like.dtype) for side in grid)
    at = torch.cartesian_prod(rows, columns)
    near = torch.exp(-(at[:, None] - at[None]).square().sum(-1) / (2 * std * std))
    return F.pad(near, (prefix, 0, prefix, 0))


def proxy_attention(patches: Tensor, beta: float, gamma: float) -> Tensor:
    """Return softmax(A) of (4), [B, N, N], from a second encoder's ``patches`` [B, N, C]."""
    unit = F.normalize(at_least_float32(patches), dim=-1)
    s = unit @ unit.transpose(1, 2)
    a = gamma * (s - beta * s.mean((1, 2), keepdim=True))
    cut = a < 0
    return a.masked_fill(cut & ~cut.all(-1, keepdim=True), float("-inf")).softmax(-1)


def resize_patches(patches: Tensor, grid: Grid, size: Grid) -> Tensor:
    """Resize [B, N, D] over ``grid`` to [B, M, D] over ``size``, bilinear."""
    if grid == size:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)
    resized = F.interpolate(maps, size, mode="bilinear", align_corners=False)
    return resized.flatten(2).transpose(1, 2)


def _proxy_patches(
    block: AttentionBlock, x: Tensor, readout: Readout, grid: Grid, proxy: ProxyFeatures | None
) -> tuple[Tensor, Grid]:
    """Return (patches [B, N, D] of (3) and (4), their grid) of the block's input ``x``."""
    if proxy is None:
        raise ValueError(
            "the readout has the term 'proxy' and proxy is None; expected a second encoder's "
            "patches"
        )
    v = block.project(block.norm_1(x))[2]
    size = grid
    if proxy.finer and proxy.grid[0] * proxy.grid[1] > grid[0] * grid[1]:
        size = proxy.grid
        finer = resize_patches(v.transpose(1, 2).flatten(2), grid, size)
        v = finer.unflatten(2, (v.shape[1], -1)).transpose(1, 2)
    patches = resize_patches(proxy.patches, proxy.grid, size)
    weights = proxy_attention(patches, readout.beta, readout.gamma)
    dense = block.merge(weights[:, None].to(v.dtype) @ v)
    return dense + block.feed(dense) if readout.mlp else dense, size


def _attend(
    block: AttentionBlock, x: Tensor, readout: Readout, bias: Tensor | None, rope: Tensor | None
) -> Tensor:
    """Return o of (1) and (2), [B, heads, L, d]."""
    normed = block.norm_1(x)
    named = dict(zip("qkv", block.project(normed, rope), strict=True))
    v = named["v"]
    if not readout.terms:
        return v
    attend = partial(attention, mask=bias, backend=block.attention_backend)
    if readout.iterations is None:
        outputs = [attend(named[term[0]], named[term[1]], v) for term in readout.terms]
    else:
        # GEM's inverse temperature: the mean norm of the block's normed input over sqrt(d), for
        # each image.
        heat = normed.norm(dim=-1).mean(-1)[:, None, None, None] * v.shape[-1] ** -0.5
        outputs = []
        for term in readout.terms:
            a = F.normalize(named[term[0]], dim=-1)
            for _ in range(readout.iterations):
                a = F.normalize(attend(a * heat, a, a, scale=1.0), dim=-1)
            outputs.append(attend(a * heat, a, v, scale=1.0))
    total = torch.stack(outputs).sum(0)
    return total / len(outputs) if readout.mean else total
