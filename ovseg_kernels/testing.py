"""The error rule by which backends are judged.

It is shipped so that users can hold their own builds to it. A result passes if its largest error
against a float64 truth is at most twice that of the eager formula in the same dtype, plus a floor
that stands for the rounding of inputs of order one.
"""

from __future__ import annotations

import torch

FLOORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}


def assert_close_to_truth(
    name: str, result: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype
) -> None:
    """Assert the error rule for the largest error and the Frobenius norm.

    The largest error is relative to the truth's largest value, if that is above 1.

    Args:
        name: of the tensor, for the message.
        result: of the backend under test.
        eager: of the plain formula in the same dtype.
        truth: of the plain formula in float64.
        dtype: of the inputs; chooses the floor.

    Raises:
        AssertionError: with both errors, if the rule is broken; so do NaN in ``result`` that
            ``truth`` does not have.
    """
    result, eager, truth = (x.detach().double().cpu() for x in (result, eager, truth))
    if result.shape != truth.shape:
        raise AssertionError(
            f"{name} has shape {list(result.shape)}; the truth has {list(truth.shape)}"
        )
    if not torch.equal(result.isnan(), truth.isnan()):
        raise AssertionError(
            f"{name} holds {int(result.isnan().sum())} NaN; the truth {int(truth.isnan().sum())}"
        )
    if truth.numel() == 0:
        return
    scale = max(1.0, float(truth.nan_to_num().abs().max()))
    measures = {"max error": lambda x: float((x - truth).nan_to_num().abs().max()) / scale}
    norm = float(truth.nan_to_num().norm())
    if norm > 1e-6:
        measures["relative Frobenius error"] = lambda x: (
            float((x - truth).nan_to_num().norm()) / norm
        )
    for kind, measure in measures.items():
        found, allowed = measure(result), 2 * measure(eager) + FLOORS[dtype]
        if not found <= allowed:
            raise AssertionError(
                f"{name}: {kind} {found:.3g} exceeds {allowed:.3g} = 2 x {measure(eager):.3g} of "
                "eager + floor"
            )
