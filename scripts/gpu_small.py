"""Calls of every operator: small ones of odd sizes with masks, and one at the paper's size.

What smoke and compute-sanitizer run.

python scripts/gpu_small.py OPERATOR BACKEND [DTYPE...]     exit status 0 if no small call raised
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

import ovseg_kernels as ok

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass
class Call:
    """``function(*tensors)`` gives floating tensors, whose gradients are checked too, and labels or
    indices.
    """

    name: str
    function: Callable
    tensors: tuple[torch.Tensor, ...]  # float32; the first ``features`` take the dtype under test
    features: int
    chooses: bool = False  # among near ties, without saying what it chose
    rounded: bool = False  # draws Philox noise, which is float32 whatever the dtype


class Draw:
    """Random tensors, the same every time: small ones drawn on the CPU, those of the paper's size
    on the device.
    """

    def __init__(self, device: str, paper: bool = False):
        self.device, self.there = device, device if paper else "cpu"
        self.generator = torch.Generator(self.there).manual_seed(3)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=self.there).to(self.device)

    def mask(self, *shape: int) -> torch.Tensor:
        return (torch.rand(shape, generator=self.generator, device=self.there) > 0.3).to(
            self.device
        )

    def labels(self, count: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, count, shape, generator=self.generator, device=self.there).to(
            self.device
        )

    def rng(self) -> torch.Tensor:
        return ok.philox.make_rng(1, device=self.device)


def patch_text_similarity(draw: Draw, paper: bool) -> Iterator[Call]:
    B, T, N, D = (256, 256, 196, 512) if paper else (2, 65, 70, 24)
    mask = None if paper else draw.mask(B, N)
    for pool in ("vector",) if paper else ("vector", "score", "max"):

        def call(patches, texts, pool=pool):
            return ok.patch_text_similarity(
                patches, texts, patch_mask=mask, temperature=0.1, pool=pool
            )

        yield Call(pool, call, (draw(B, N, D), draw(T, D)), 2, chooses=pool == "max")


def similarity_contrastive_loss(draw: Draw, paper: bool) -> Iterator[Call]:
    B = 4096 if paper else 70
    scale = torch.tensor(14.3, device=draw.device)
    yield Call(
        "diagonal",
        lambda similarity, scale: ok.similarity_contrastive_loss(similarity, scale),
        (draw(B, B).tanh(), scale),
        1,
    )
    if paper:
        return
    weights = draw(B, B + 5).relu()
    for name, positives in (("positives", weights > 0), ("weights", weights)):

        def call(similarity, scale, positives=positives):
            return ok.similarity_contrastive_loss(similarity, scale, positives=positives)

        yield Call(name, call, (draw(B, B + 5).tanh(), scale), 1)


def center_assignment(draw: Draw, paper: bool) -> Iterator[Call]:
    B, G, L, D = (32, 8, 784, 768) if paper else (2, 8, 70, 24)
    mask, rng = None if paper else draw.mask(B, L), draw.rng()
    for hard in (True,) if paper else (True, False):

        def call(queries, keys, values, hard=hard):
            return ok.center_assignment(
                queries, keys, values, scale=D**-0.5, mask=mask, rng=rng, hard=hard
            )[: 1 + hard]

        yield Call(
            "hard" if hard else "soft",
            call,
            (draw(B, G, D), draw(B, L, D), draw(B, L, D)),
            3,
            rounded=True,
        )


def folded_center_assignment(draw: Draw, paper: bool) -> Iterator[Call]:
    B, G, L, D = (32, 8, 784, 768) if paper else (2, 8, 70, 24)
    mask, rng = None if paper else draw.mask(B, L), draw.rng()

    def call(queries, tokens, *weights):
        return ok.folded_center_assignment(
            queries, tokens, *weights, scale=D**-0.5, mask=mask, rng=rng
        )[:2]

    yield Call(
        "hard",
        call,
        (draw(B, G, D), draw(B, L, D), *(draw(D, D) / D**0.5 for _ in range(2)), draw(D), draw(D)),
        2,
        rounded=True,
    )


def segclip_center_assignment(draw: Draw, paper: bool) -> Iterator[Call]:
    B, G, L, D, groups = (32, 8, 784, 768, 12) if paper else (2, 8, 70, 24, 3)
    mask, rng, width = None if paper else draw.mask(B, L), draw.rng(), D // groups

    def call(queries, tokens, *weights):
        return ok.segclip_center_assignment(
            queries, tokens, *weights, tau=0.9, normalizer="mean", mask=mask, rng=rng
        )[:2]

    norms = (1 + 0.1 * draw(D), 0.1 * draw(D), 1 + 0.1 * draw(D), 0.1 * draw(D))
    yield Call(
        "hard",
        call,
        (draw(B, G, D), draw(B, L, D), *(draw(D, width) / width**0.5 for _ in range(2)), *norms),
        2,
        rounded=True,
    )


def contrastive_loss(draw: Draw, paper: bool) -> Iterator[Call]:
    B, D = (8192, 512) if paper else (70, 24)
    for kind in ("softmax",) if paper else ("softmax", "sigmoid"):

        def call(image, text, scale, kind=kind):
            return ok.contrastive_loss(image, text, scale, kind=kind)

        scale = torch.tensor(14.3, device=draw.device)
        yield Call(kind, call, (draw(B, D), draw(B, D), scale), 2)
        pairs = torch.arange(2 * B, device=draw.device)
        pairs = torch.stack([pairs % B, pairs * 7 % B], 1)

        def listed(image, text, scale, kind=kind, pairs=pairs):
            return ok.contrastive_loss(image, text, scale, kind=kind, positives=pairs)

        yield Call(f"{kind}, a list", listed, (draw(B, D), draw(B, D), scale), 2)


def dense_contrastive_loss(draw: Draw, paper: bool) -> Iterator[Call]:
    B, N, D = (128, 784, 512) if paper else (3, 70, 24)
    counts = {"k_pos": 32, "k_neg": 64} if paper else {"k_pos": 5, "k_neg": 9}
    for sampling in ("topk",) if paper else ("topk", "gumbel"):
        rng = draw.rng() if sampling == "gumbel" else None

        def call(pixels, texts, sampling=sampling, rng=rng):
            return ok.dense_contrastive_loss(
                pixels, texts, temperature=0.1, sampling=sampling, rng=rng, **counts
            )

        yield Call(
            sampling, call, (draw(B, N, D), draw(B, D)), 2, chooses=True, rounded=rng is not None
        )


def upsample_argmax(draw: Draw, paper: bool) -> Iterator[Call]:
    C, h, size = (150, 32, (1024, 1024)) if paper else (20, 5, (33, 40))
    yield Call(
        "labels",
        lambda logits: ok.upsample_argmax(logits, size),
        (draw(1 if paper else 2, C, h, h + 2),),
        1,
    )


def upsample_mask_loss(draw: Draw, paper: bool) -> Iterator[Call]:
    B, C, h, H = (1, 156, 32, 512) if paper else (2, 20, 5, 33)
    labels = draw.labels(C + 2, B, H, H)
    yield Call(
        "focal and dice",
        lambda logits: ok.upsample_mask_loss(logits, labels, ignore_index=C + 1)[:2],
        (2.5 * draw(B, C, h, h),),
        1,
    )


def window_argmax(draw: Draw, paper: bool) -> Iterator[Call]:
    C, h, side = (171, 32, 512) if paper else (20, 5, 33)
    canvas, size = (side, side * 4 // 3), (side * 15 // 16, side * 5 // 4)
    origins = torch.tensor([[0, 0], [0, canvas[1] - side]]).to(draw.device)
    for activation in ("sigmoid",) if paper else ("sigmoid", "softmax"):

        def call(logits, activation=activation):
            return ok.window_argmax(
                logits, origins, (side, side), canvas, size, activation=activation
            )

        yield Call(activation, call, (2.5 * draw(2, C, h, h),), 1)


CALLS = {name: globals()[name] for name in ok.OPERATORS}


def cast(call: Call, dtype: torch.dtype, wide: torch.dtype) -> list[torch.Tensor]:
    """Features rounded to ``dtype`` and held in the narrower of both; what is no feature in
    ``wide``.
    """
    return [
        (x.to(dtype) if i < call.features else x.to(wide)).detach().requires_grad_()
        for i, x in enumerate(call.tensors)
    ]


def outputs(
    call: Call, tensors: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """(values and gradients, labels) of one forward and backward."""
    found = call.function(*tensors)
    found = found if isinstance(found, tuple) else (found,)
    values, labels = (
        [x for x in found if x.is_floating_point()],
        [x for x in found if not x.is_floating_point()],
    )
    if not values:
        return [], labels
    g = torch.Generator().manual_seed(5)
    upstream = [(1 + 0.5 * torch.randn(x.shape, generator=g)).to(x) for x in values]
    grads = torch.autograd.grad(values, tensors, upstream, materialize_grads=True)
    return [x.detach() for x in (*values, *grads)], labels


def main(op: str, backend: str, names: list[str], device: str = "cuda") -> None:
    with ok.backend(backend):
        for name in names or ["float32", "float16", "bfloat16"]:
            for call in CALLS[op](Draw(device), False):
                outputs(call, cast(call, DTYPES[name], torch.float32))
                print(op, backend, name, call.name, flush=True)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
