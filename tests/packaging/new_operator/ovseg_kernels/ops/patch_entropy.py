"""patch_entropy: how evenly the scores of an image's patches are spread.

    H_b = -sum_n p_bn log p_bn,   p_b = softmax over n of scores_b                               (1)
    d H_b / d scores_bn = -p_bn (log p_bn + H_b)                                                 (2)

Shapes   scores [B, N]; H [B].
Dtypes   float16 and bfloat16 are computed in float32, which H then is.
Cost     B N exponentials each way; nothing is kept beside the scores.
Errors   ValueError for ranks and images without a patch; TypeError for dtypes.
Source   Shannon, A Mathematical Theory of Communication, 1948.
"""

from __future__ import annotations

import torch

from .. import _backends, _check, _transforms
from .. import _library as lib
from ..reference import patch_entropy as reference
from ..reference.patch_text_similarity import accumulation_dtype

lib.define("patch_entropy", "patch_entropy(Tensor scores) -> Tensor")
lib.define("patch_entropy", "patch_entropy_backward(Tensor grad, Tensor scores) -> Tensor")
lib.fallback("patch_entropy", reference.patch_entropy)
lib.fallback("patch_entropy_backward", reference.backward)


def patch_entropy(scores: torch.Tensor) -> torch.Tensor:
    """Return the entropy of the softmax over the patches, equation (1) of this file.

    Args:
        scores: [B, N].

    Returns:
        H [B], in nats.
    """
    _check.tensor("scores", scores, 2, "[B, N]")
    if scores.shape[1] == 0:
        raise ValueError(f"scores has shape {list(scores.shape)}; expected at least one patch")
    scores = scores.to(accumulation_dtype(scores))
    with torch.autocast(lib.autocast_type(scores.device), enabled=False):
        if _backends.use_definition("patch_entropy", scores.device):
            return reference.patch_entropy(scores)
        return torch.ops.ovseg.patch_entropy(scores)


@lib.fake("patch_entropy")
def _(scores):
    return scores.new_empty(scores.shape[:1])


@lib.fake("patch_entropy_backward")
def _(grad, scores):
    return scores.new_empty(scores.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    return torch.ops.ovseg.patch_entropy_backward(grad, *ctx.saved_tensors)


_transforms.autograd("patch_entropy", _backward, _setup)
_transforms.no_second_derivative("patch_entropy_backward")
_transforms.vmap("patch_entropy")
_transforms.vmap("patch_entropy_backward")
