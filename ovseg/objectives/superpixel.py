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
    images = torch.arange(B, device=segments.device)[:, None].expand(B, L)
    pairs = torch.stack([images, segments.to(images)], -1).flatten(0, 1)
    found, inverse, count = pairs.unique(dim=0, return_inverse=True, return_counts=True)
    sums = p.new_zeros(len(found), G).index_add(0, inverse, p)
    q = (sums / count[:, None])[inverse]
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return 0.5 * ((log_p.exp() - log_q.exp()) * (log_p - log_q)).view(B, L * G).mean(1)
