"""SegCLIP's superpixel loss: patches of one superpixel should go to the same center. Luo et al., arXiv:2211.14813.

    q_l = mean of P over the patches of l's superpixel (l included)                                             (1)
    loss_b = 1 / (2 L G) sum_lg (softmax(P)_blg - softmax(q)_blg) (log softmax(P)_blg - log softmax(q)_blg)      (2)

P is the straight-through assignment, so softmax(P) takes two values and the loss lies below 0.0221: a weak regulariser. As published, (1)
is a product of an [L, L] matrix of equal labels with P; here it is a sum over superpixels, O(L G), without that matrix. Gradients go to P
directly and through q.
"""

from __future__ import annotations

import torch

from ..errors import InputError


def superpixel_loss(assignment: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Equation (2), one number a picture [B].

    Args:
        assignment: [B, G, L], P with its gradient.
        segments: [B, L] integers; equal numbers in one image are one superpixel.
    """
    B, G, L = assignment.shape
    if segments.shape != (B, L) or segments.is_floating_point():
        raise InputError(f"segments is {segments.dtype} of shape {list(segments.shape)}; expected integers of [{B}, {L}]")
    p = assignment.transpose(1, 2).reshape(B * L, G)
    rows = _numbered(segments).flatten()
    sums, count = p.new_zeros(B * L, G).index_add(0, rows, p), p.new_zeros(B * L).index_add(0, rows, p.new_ones(B * L))
    q = sums[rows] / count[rows, None]
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).view(B, L * G).mean(1)


def _numbered(segments: torch.Tensor) -> torch.Tensor:
    """[B, L] int64: the superpixels numbered without gaps, those of image b from b L on. ``unique`` would make a GPU wait for its count."""
    (B, L), (found, order) = segments.shape, segments.sort(1)
    first = torch.arange(B, device=segments.device)[:, None] * L
    numbers = torch.cat([first, first + (found[:, 1:] != found[:, :-1]).cumsum(1)], 1)
    return torch.empty_like(numbers).scatter_(1, order, numbers)
