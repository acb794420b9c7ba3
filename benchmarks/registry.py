"""What is measured: for every operator its shapes, its inputs and the implementations to compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from .baselines import BASELINES, FUSED


@dataclass(frozen=True)
class Case:
    """One operator at one shape."""

    op: str
    name: str
    shape: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()  # implementations to run; all if empty


_SHORT = (FUSED, "eager", "torch.compile")
_PACL = {"B": 256, "T": 256, "N": 196, "D": 512}
_ZEGCLIP = {"C": 171, "h": 32, "side": 512}  # COCO-Stuff, a 4:3 picture in two windows
CASES = (
    Case("patch_text_similarity", "pacl", _PACL, {"pool": "vector", "temperature": 0.1}),
    Case("patch_text_similarity", "score", _PACL, {"pool": "score", "temperature": 0.1}, only=_SHORT),
    Case("patch_text_similarity", "max", _PACL, {"pool": "max"}, only=_SHORT),
    Case("patch_text_similarity", "mean", _PACL, {"pool": "mean"}, only=_SHORT),
    Case("patch_text_similarity", "sigmoid", _PACL, {"pool": "vector", "weight": "sigmoid"}, only=_SHORT),
    Case("patch_text_similarity", "tiny", {"B": 64, "T": 64, "N": 144, "D": 64}, {"pool": "vector", "temperature": 0.1}),
    Case("patch_text_similarity", "classes", {"B": 8, "T": 20, "N": 196, "D": 512}, {"pool": "vector", "temperature": 0.1}),
    Case("patch_text_similarity", "large", {"B": 1024, "T": 1024, "N": 196, "D": 512}, {"pool": "vector", "temperature": 0.1},
         only=(FUSED,)),  # eager would need tens of GiB
    Case("center_assignment", "groupvit", {"B": 32, "L": 784, "G": 8, "D": 768}, {"scale": 768**-0.5}),
    Case("center_assignment", "segclip", {"B": 32, "L": 196, "G": 8, "D": 768}, {"tau": 0.9, "normalizer": "mean"}),
    Case("center_assignment", "many", {"B": 8, "L": 1024, "G": 64, "D": 384}, {"scale": 384**-0.5}),
    Case("folded_center_assignment", "ovsegmentor", {"B": 32, "L": 784, "G": 8, "D": 768}, {"scale": 768**-0.5}),
    Case("folded_center_assignment", "groupvit", {"B": 32, "L": 196, "G": 64, "D": 384}, {"scale": 384**-0.5}),
    Case("segclip_center_assignment", "window", {"B": 32, "L": 784, "G": 8, "D": 768, "groups": 12}, {"tau": 0.9, "normalizer": "mean"}),
    Case("segclip_center_assignment", "training", {"B": 96, "L": 196, "G": 8, "D": 768, "groups": 12}, {"tau": 0.9, "normalizer": "mean"}),
    Case("contrastive_loss", "clip", {"B": 8192, "D": 512}),
    Case("contrastive_loss", "small", {"B": 1024, "D": 512}),
    Case("dense_contrastive_loss", "mgca", {"B": 128, "N": 784, "D": 512}, {"temperature": 0.07, "k_pos": 32, "k_neg": 64}),
    Case("dense_contrastive_loss", "small", {"B": 32, "N": 196, "D": 512}, {"temperature": 0.07, "k_pos": 8, "k_neg": 32}),
    Case("upsample_argmax", "structured", {"C": 150, "h": 32, "H": 1024}),
    Case("upsample_argmax", "noise", {"C": 150, "h": 32, "H": 1024}),
    Case("upsample_argmax", "uint8", {"C": 150, "h": 32, "H": 1024}, {"label_type": "uint8"}, only=(FUSED, "eager")),
    Case("window_argmax", "zegclip", _ZEGCLIP, {"activation": "sigmoid"}),
    Case("window_argmax", "noise", _ZEGCLIP, {"activation": "sigmoid"}),
    Case("window_argmax", "sclip", {"C": 171, "h": 14, "side": 224}, {"activation": "softmax", "stage": "output", "threshold": 0.1}),
    Case("window_argmax", "groupvit", {"C": 81, "h": 28, "side": 448, "G": 8}),
    Case("upsample_mask_loss", "zegclip", {"B": 2, "C": 156, "h": 32, "H": 512}),
    Case("upsample_mask_loss", "voc", {"B": 4, "C": 15, "h": 32, "H": 512}),
    Case("similarity_contrastive_loss", "batch", {"B": 1024, "T": 1024}),
    Case("similarity_contrastive_loss", "large", {"B": 4096, "T": 4096}),
)


_PACL_GPU = {"pool": "vector", "temperature": 0.1}
GPU_CASES = (
    Case("patch_text_similarity", "pacl", _PACL, _PACL_GPU),
    Case("patch_text_similarity", "score", _PACL, {"pool": "score", "temperature": 0.1}),
    Case("patch_text_similarity", "pacl-576", {"B": 256, "T": 256, "N": 576, "D": 512}, _PACL_GPU),
    Case("patch_text_similarity", "pacl-1024", {"B": 1024, "T": 1024, "N": 196, "D": 512}, _PACL_GPU),
    Case("patch_text_similarity", "pacl-4096", {"B": 4096, "T": 4096, "N": 196, "D": 512}, _PACL_GPU, only=(FUSED,)),
    Case("center_assignment", "segclip", {"B": 768, "L": 196, "G": 8, "D": 768}, {"tau": 0.9, "normalizer": "mean"}),
    Case("folded_center_assignment", "ovsegmentor", {"B": 128, "L": 784, "G": 8, "D": 768}, {"scale": 768**-0.5}),
    Case("segclip_center_assignment", "training", {"B": 768, "L": 196, "G": 8, "D": 768, "groups": 12}, {"tau": 0.9, "normalizer": "mean"}),
    Case("contrastive_loss", "clip", {"B": 32768, "D": 512}),
    Case("dense_contrastive_loss", "mgca", {"B": 128, "N": 784, "D": 512}, {"temperature": 0.07, "k_pos": 32, "k_neg": 64}),
    Case("upsample_argmax", "structured", {"C": 150, "h": 32, "H": 1024}),
    Case("window_argmax", "zegclip", _ZEGCLIP, {"activation": "sigmoid"}),
    Case("upsample_mask_loss", "zegclip", {"B": 4, "C": 156, "h": 32, "H": 512}),
    Case("similarity_contrastive_loss", "large", {"B": 4096, "T": 4096}),
)


def useful_flops(case: Case) -> int:
    """Of the products of one forward + backward in the cheaper form (docs/ops): what a rate in TFLOP/s is counted by."""
    if case.op == "contrastive_loss":
        return 8 * case.shape["B"] ** 2 * case.shape["D"]
    if case.op != "patch_text_similarity":
        return 0
    B, T, N, D = (case.shape[key] for key in "BTND")
    if case.options.get("pool", "vector") != "vector":
        return 8 * B * T * N * D
    gram, pooled = 2 * N * (D + N) + 6 * N * D + 4 * N * N, 16 * N * D
    return B * T * min(gram, pooled)


def inputs(case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Random tensors of a case, with gradients; never zeros, which run faster on some hardware."""
    if device != "cpu":
        with torch.no_grad():
            drawn = inputs(case, dtype, seed)
        return {name: x.detach().to(device).requires_grad_(x.is_floating_point()) for name, x in drawn.items()}
    g = torch.Generator().manual_seed(seed)
    s = case.shape
    if case.op == "patch_text_similarity":
        tensors = {"patches": (s["B"], s["N"], s["D"]), "texts": (s["T"], s["D"])}
        return {name: torch.randn(shape, generator=g).to(dtype).requires_grad_() for name, shape in tensors.items()}
    if case.op == "center_assignment":
        tensors = {"queries": (s["B"], s["G"], s["D"]), "keys": (s["B"], s["L"], s["D"]), "values": (s["B"], s["L"], s["D"])}
        return {name: torch.randn(shape, generator=g).to(dtype).requires_grad_() for name, shape in tensors.items()}
    if case.op in ("folded_center_assignment", "segclip_center_assignment"):
        D, rows = s["D"], s["D"] if case.op.startswith("folded") else s["D"] // s["groups"]
        tensors = {"queries": (s["B"], s["G"], D), "tokens": (s["B"], s["L"], D), "key_weight": (D, rows), "value_weight": (D, rows)}
        names = ("key_bias", "value_bias") if rows == D else ("norm_weight", "norm_bias", "key_norm_weight", "key_norm_bias")
        found = {name: torch.randn(shape, generator=g) / (rows**0.5 if "weight" in name else 1) for name, shape in tensors.items()}
        found |= {name: ("norm_weight" in name) + 0.1 * torch.randn(D, generator=g) for name in names}
        return {name: x.to(dtype).requires_grad_() for name, x in found.items()}
    if case.op == "upsample_argmax":
        return {"logits": maps(1, s["C"], s["h"], 6, case.name == "noise", g).to(dtype)}
    if case.op == "upsample_mask_loss":
        labels = torch.randint(0, s["C"] + 4, (s["B"], 1, 16, 16), generator=g).float()
        labels = F.interpolate(labels, (s["H"], s["H"]), mode="nearest")[:, 0].to(torch.int64)
        logits = 2.5 * torch.randn(s["B"], s["C"], s["h"], s["h"], generator=g)
        return {"logits": logits.to(dtype).requires_grad_(), "labels": labels.where(labels < s["C"], 255)}
    if case.op == "window_argmax":
        found = {"logits": maps(2, s.get("G", s["C"]), s["h"], 2.5, case.name == "noise", g).to(dtype)}
        found["origins"] = torch.tensor([[0, 0], [0, round(s["side"] * 4 / 3) - s["side"]]])
        if "G" in s:
            found["tables"] = (5 * torch.randn(2, s["G"], s["C"], generator=g)).softmax(-1).to(dtype)
        return found
    if case.op == "dense_contrastive_loss":
        shapes = {"pixels": (s["B"], s["N"], s["D"]), "texts": (s["B"], s["D"])}
        return {name: torch.randn(shape, generator=g).to(dtype).requires_grad_() for name, shape in shapes.items()}
    if case.op == "contrastive_loss":
        found = {name: F.normalize(torch.randn(s["B"], s["D"], generator=g), dim=-1) for name in ("image", "text")}
        return {name: x.to(dtype).requires_grad_() for name, x in {**found, "logit_scale": torch.tensor(14.3)}.items()}
    similarity = torch.rand(s["B"], s["T"], generator=g).mul(2).sub(1).to(dtype).requires_grad_()
    return {"similarity": similarity, "logit_scale": torch.tensor(14.3).to(dtype).requires_grad_()}


def maps(images: int, classes: int, side: int, scale: float, noise: bool, g: torch.Generator) -> torch.Tensor:
    """Logits: noise alone, or smooth as a network's with a little noise."""
    fine = torch.randn(images, classes, side, side, generator=g)
    if noise:
        return fine
    return F.interpolate(scale * torch.randn(images, classes, 5, 5, generator=g), (side, side), mode="bicubic") + scale / 20 * fine


def implementations(case: Case) -> dict[str, Callable[..., torch.Tensor]]:
    """Name to function of the inputs; the first is ours. All give the same values, which the runner checks."""
    found = BASELINES[case.op](case)
    return {name: f for name, f in found.items() if not case.only or name in case.only}
