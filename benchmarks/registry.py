"""The cases that are measured: every operator's shapes, inputs and implementations to compare."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F

from .baselines import BASELINES, FUSED


@dataclass(frozen=True)
class Case:
    """An operator at one shape."""

    op: str
    name: str
    shape: dict[str, int]
    options: dict[str, Any] = field(default_factory=dict)
    only: tuple[str, ...] = ()  # implementations to run; all if empty
    dtypes: tuple[str, ...] = ("float32",)  # on a GPU; the first is the table's
    compiled: bool = False  # on a GPU: the table needs torch.compile's row


_SHORT = (FUSED, "eager", "torch.compile")
_PACL = {"B": 256, "T": 256, "N": 196, "D": 512}
_ZEGCLIP = {"C": 171, "h": 32, "side": 512}  # COCO-Stuff, a 4:3 picture in two windows
CASES = (
    Case("patch_text_similarity", "pacl", _PACL, {"pool": "vector", "temperature": 0.1}),
    Case(
        "patch_text_similarity", "score", _PACL, {"pool": "score", "temperature": 0.1}, only=_SHORT
    ),
    Case("patch_text_similarity", "max", _PACL, {"pool": "max"}, only=_SHORT),
    Case("patch_text_similarity", "mean", _PACL, {"pool": "mean"}, only=_SHORT),
    Case(
        "patch_text_similarity",
        "sigmoid",
        _PACL,
        {"pool": "vector", "weight": "sigmoid"},
        only=_SHORT,
    ),
    Case(
        "patch_text_similarity",
        "tiny",
        {"B": 64, "T": 64, "N": 144, "D": 64},
        {"pool": "vector", "temperature": 0.1},
    ),
    Case(
        "patch_text_similarity",
        "classes",
        {"B": 8, "T": 20, "N": 196, "D": 512},
        {"pool": "vector", "temperature": 0.1},
    ),
    # Eager would need tens of GiB.
    Case(
        "patch_text_similarity",
        "large",
        {"B": 1024, "T": 1024, "N": 196, "D": 512},
        {"pool": "vector", "temperature": 0.1},
        only=(FUSED,),
    ),
    Case(
        "center_assignment", "groupvit", {"B": 32, "L": 784, "G": 8, "D": 768}, {"scale": 768**-0.5}
    ),
    Case(
        "center_assignment",
        "segclip",
        {"B": 32, "L": 196, "G": 8, "D": 768},
        {"tau": 0.9, "normalizer": "mean"},
    ),
    Case("center_assignment", "many", {"B": 8, "L": 1024, "G": 64, "D": 384}, {"scale": 384**-0.5}),
    Case(
        "folded_center_assignment",
        "ovsegmentor",
        {"B": 32, "L": 784, "G": 8, "D": 768},
        {"scale": 768**-0.5},
    ),
    Case(
        "folded_center_assignment",
        "groupvit",
        {"B": 32, "L": 196, "G": 64, "D": 384},
        {"scale": 384**-0.5},
    ),
    Case(
        "segclip_center_assignment",
        "window",
        {"B": 32, "L": 784, "G": 8, "D": 768, "groups": 12},
        {"tau": 0.9, "normalizer": "mean"},
    ),
    Case(
        "segclip_center_assignment",
        "training",
        {"B": 96, "L": 196, "G": 8, "D": 768, "groups": 12},
        {"tau": 0.9, "normalizer": "mean"},
    ),
    Case("contrastive_loss", "clip", {"B": 8192, "D": 512}),
    Case("contrastive_loss", "small", {"B": 1024, "D": 512}),
    Case("contrastive_loss", "listed", {"B": 4096, "D": 512, "P": 16384}),
    Case("contrastive_loss", "siglip", {"B": 4096, "D": 512}, {"kind": "sigmoid"}),
    Case(
        "dense_contrastive_loss",
        "mgca",
        {"B": 128, "N": 784, "D": 512},
        {"temperature": 0.07, "k_pos": 32, "k_neg": 64},
    ),
    Case(
        "dense_contrastive_loss",
        "small",
        {"B": 32, "N": 196, "D": 512},
        {"temperature": 0.07, "k_pos": 8, "k_neg": 32},
    ),
    Case("upsample_argmax", "structured", {"C": 150, "h": 32, "H": 1024}),
    Case("upsample_argmax", "noise", {"C": 150, "h": 32, "H": 1024}),
    Case(
        "upsample_argmax",
        "uint8",
        {"C": 150, "h": 32, "H": 1024},
        {"label_type": "uint8"},
        only=(FUSED, "eager"),
    ),
    Case("window_argmax", "zegclip", _ZEGCLIP, {"activation": "sigmoid"}),
    Case("window_argmax", "noise", _ZEGCLIP, {"activation": "sigmoid"}),
    Case(
        "window_argmax",
        "sclip",
        {"C": 171, "h": 14, "side": 224},
        {"activation": "softmax", "stage": "output", "threshold": 0.1},
    ),
    Case("window_argmax", "groupvit", {"C": 81, "h": 28, "side": 448, "G": 8}),
    Case("upsample_mask_loss", "zegclip", {"B": 2, "C": 156, "h": 32, "H": 512}),
    Case("upsample_mask_loss", "voc", {"B": 4, "C": 15, "h": 32, "H": 512}),
    Case("similarity_contrastive_loss", "batch", {"B": 1024, "T": 1024}),
    Case("similarity_contrastive_loss", "large", {"B": 4096, "T": 4096}),
    Case("similarity_contrastive_loss", "positives", {"B": 1024, "T": 1024}),
    Case("similarity_contrastive_loss", "weights", {"B": 1024, "T": 1024}),
)


_PACL_GPU = {"pool": "vector", "temperature": 0.1}
_LOW = ("bfloat16", "float32")
_ALL = ("bfloat16", "float32", "float16")
_SEGCLIP = {"tau": 0.9, "normalizer": "mean"}
GPU_CASES = (  # the most wanted first
    Case("patch_text_similarity", "pacl", _PACL, _PACL_GPU, dtypes=_ALL, compiled=True),
    Case(
        "center_assignment",
        "segclip-448",
        {"B": 768, "L": 784, "G": 8, "D": 768},
        _SEGCLIP,
        dtypes=_ALL,
        compiled=True,
    ),
    Case("contrastive_loss", "clip", {"B": 32768, "D": 512}, dtypes=_LOW, compiled=True),
    Case(
        "dense_contrastive_loss",
        "mgca",
        {"B": 128, "N": 784, "D": 512},
        {"temperature": 0.07, "k_pos": 32, "k_neg": 64},
        dtypes=_LOW,
        compiled=True,
    ),
    Case(
        "segclip_center_assignment",
        "training",
        {"B": 768, "L": 196, "G": 8, "D": 768, "groups": 12},
        _SEGCLIP,
        dtypes=_LOW,
        compiled=True,
    ),
    Case(
        "folded_center_assignment",
        "ovsegmentor",
        {"B": 128, "L": 784, "G": 8, "D": 768},
        {"scale": 768**-0.5},
        dtypes=_LOW,
        compiled=True,
    ),
    Case("upsample_mask_loss", "zegclip", {"B": 4, "C": 156, "h": 32, "H": 512}, compiled=True),
    Case("upsample_argmax", "structured", {"C": 150, "h": 32, "H": 1024}, compiled=True),
    Case("window_argmax", "zegclip", _ZEGCLIP, {"activation": "sigmoid"}),
    Case("similarity_contrastive_loss", "large", {"B": 4096, "T": 4096}, compiled=True),
    Case(
        "center_assignment",
        "segclip",
        {"B": 768, "L": 196, "G": 8, "D": 768},
        _SEGCLIP,
        dtypes=_LOW,
    ),
    Case(
        "patch_text_similarity",
        "pacl-576",
        {"B": 256, "T": 256, "N": 576, "D": 512},
        _PACL_GPU,
        dtypes=_LOW,
    ),
    Case(
        "patch_text_similarity", "score", _PACL, {"pool": "score", "temperature": 0.1}, dtypes=_LOW
    ),
    Case(
        "patch_text_similarity",
        "pacl-1024",
        {"B": 1024, "T": 1024, "N": 196, "D": 512},
        _PACL_GPU,
        dtypes=_LOW,
    ),
    Case(
        "patch_text_similarity",
        "pacl-4096",
        {"B": 4096, "T": 4096, "N": 196, "D": 512},
        _PACL_GPU,
        only=(FUSED,),
        dtypes=("bfloat16",),
    ),
)


def _first_cases() -> Iterator[Case]:
    """Yield the cases that a GPU is asked first: what bounds the kernels, beside their peers."""
    peers = {
        "softmax": ("Inf-CLIP's form", "eager, closed form in row blocks"),
        "sigmoid": ("siglip-kernel", "eager, closed form in row blocks"),
    }
    for B in (32768, 4096):
        for kind, names in peers.items():
            yield Case(
                "contrastive_loss",
                f"{kind}-{B}",
                {"B": B, "D": 512},
                {"kind": kind},
                only=(FUSED, "eager", *names),
                dtypes=("bfloat16",),
            )
    for B in (1024, 4096):
        for pool in ("score", "vector"):
            yield Case(
                "patch_text_similarity",
                f"{pool}-{B}",
                {"B": B, "T": B, "N": 196, "D": 512},
                {"pool": pool, "temperature": 0.1},
                only=(FUSED, "eager", "eager, chunks of 32 texts"),
                dtypes=("bfloat16",),
            )
    for L in (784, 196):
        shape = {"B": 768, "L": L, "G": 8, "D": 768}
        names = (FUSED, "eager")
        yield Case(
            "center_assignment", f"tokens-{L}", shape, _SEGCLIP, only=names, dtypes=("bfloat16",)
        )
    yield Case(
        "segclip_center_assignment",
        "training",
        {"B": 768, "L": 196, "G": 8, "D": 768, "groups": 12},
        _SEGCLIP,
        only=(FUSED, "eager", "eager, Conv1d"),
        dtypes=("bfloat16",),
    )


FIRST_CASES = tuple(_first_cases())
_CALLED = (FUSED, "eager")
SMALL_CASES = (  # where the cost of the host may be more than that of the kernels
    Case("upsample_argmax", "structured", {"C": 150, "h": 32, "H": 1024}, only=_CALLED),
    Case("window_argmax", "zegclip", _ZEGCLIP, {"activation": "sigmoid"}, only=_CALLED),
    Case("upsample_mask_loss", "zegclip", {"B": 4, "C": 156, "h": 32, "H": 512}, only=_CALLED),
    Case("similarity_contrastive_loss", "batch", {"B": 1024, "T": 1024}, only=_CALLED),
    Case("contrastive_loss", "small", {"B": 1024, "D": 512}, only=_CALLED, dtypes=("bfloat16",)),
    Case(
        "contrastive_loss",
        "siglip",
        {"B": 1024, "D": 512},
        {"kind": "sigmoid"},
        only=(*_CALLED, "siglip-kernel"),
        dtypes=("bfloat16",),
    ),
    Case(
        "patch_text_similarity",
        "classes",
        {"B": 8, "T": 20, "N": 196, "D": 512},
        _PACL_GPU,
        only=_CALLED,
        dtypes=("bfloat16",),
    ),
    Case(
        "center_assignment",
        "window",
        {"B": 2, "L": 784, "G": 8, "D": 768},
        _SEGCLIP,
        only=_CALLED,
        dtypes=("bfloat16",),
    ),
    Case(
        "segclip_center_assignment",
        "window",
        {"B": 2, "L": 784, "G": 8, "D": 768, "groups": 12},
        _SEGCLIP,
        only=_CALLED,
        dtypes=("bfloat16",),
    ),
    Case(
        "folded_center_assignment",
        "window",
        {"B": 2, "L": 784, "G": 8, "D": 768},
        {"scale": 768**-0.5},
        only=_CALLED,
        dtypes=("bfloat16",),
    ),
    Case(
        "dense_contrastive_loss",
        "small",
        {"B": 32, "N": 196, "D": 512},
        {"temperature": 0.07, "k_pos": 8, "k_neg": 32},
        only=_CALLED,
        dtypes=("bfloat16",),
    ),
)


def useful_flops(case: Case) -> tuple[int, int]:
    """Return the flops of the products of a forward and a backward in the cheaper form (docs/ops).

    Zeros where memory is what bounds it. The gradient of a sigmoid is that of its own logits: it
    can be taken with the loss, and the logits need not be multiplied again.
    """
    if case.op == "contrastive_loss":
        once = 2 * case.shape["B"] ** 2 * case.shape["D"]
        if case.options.get("kind") == "sigmoid":
            return once, 2 * once
        return once, 3 * once
    if case.op == "dense_contrastive_loss":
        return 2 * case.shape["B"] ** 2 * case.shape["N"] * case.shape["D"], 0
    if case.op != "patch_text_similarity":
        return 0, 0
    B, T, N, D = (case.shape[key] for key in "BTND")
    if case.options.get("pool", "vector") != "vector":
        return 2 * B * T * N * D, 6 * B * T * N * D
    gram, pooled = (2 * N * (D + N), 6 * N * D + 4 * N * N), (4 * N * D, 12 * N * D)
    forward, backward = min(gram, pooled, key=sum)
    return B * T * forward, B * T * backward


def inputs(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Return random tensors of a case, with gradients, drawn on the device.

    Never zeros, which run faster on some hardware.
    """
    g = torch.Generator(device).manual_seed(seed)
    s = case.shape

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g, device=device)

    def leaves(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: x.to(dtype).requires_grad_() for name, x in found.items()}

    if case.op == "patch_text_similarity":
        return leaves({"patches": randn(s["B"], s["N"], s["D"]), "texts": randn(s["T"], s["D"])})
    if case.op == "center_assignment":
        return leaves(
            {
                name: randn(s["B"], s[count], s["D"])
                for name, count in (("queries", "G"), ("keys", "L"), ("values", "L"))
            }
        )
    if case.op in ("folded_center_assignment", "segclip_center_assignment"):
        D, rows = s["D"], s["D"] if case.op.startswith("folded") else s["D"] // s["groups"]
        names = (
            ("key_bias", "value_bias")
            if rows == D
            else ("norm_weight", "norm_bias", "key_norm_weight", "key_norm_bias")
        )
        found = {"queries": randn(s["B"], s["G"], D), "tokens": randn(s["B"], s["L"], D)}
        found |= {name: randn(D, rows) / rows**0.5 for name in ("key_weight", "value_weight")}
        return leaves(found | {name: ("norm_weight" in name) + 0.1 * randn(D) for name in names})
    if case.op == "upsample_argmax":
        return {"logits": maps(randn, 1, s["C"], s["h"], 6, case.name == "noise").to(dtype)}
    if case.op == "upsample_mask_loss":
        labels = torch.randint(
            0, s["C"] + 4, (s["B"], 1, 16, 16), generator=g, device=device
        ).float()
        labels = F.interpolate(labels, (s["H"], s["H"]), mode="nearest")[:, 0].to(torch.int64)
        return {
            **leaves({"logits": 2.5 * randn(s["B"], s["C"], s["h"], s["h"])}),
            "labels": labels.where(labels < s["C"], 255),
        }
    if case.op == "window_argmax":
        found = {
            "logits": maps(randn, 2, s.get("G", s["C"]), s["h"], 2.5, case.name == "noise").to(
                dtype
            )
        }
        found["origins"] = torch.tensor(
            [[0, 0], [0, round(s["side"] * 4 / 3) - s["side"]]], device=device
        )
        if "G" in s:
            found["tables"] = (5 * randn(2, s["G"], s["C"])).softmax(-1).to(dtype)
        return found
    if case.op == "dense_contrastive_loss":
        return leaves({"pixels": randn(s["B"], s["N"], s["D"]), "texts": randn(s["B"], s["D"])})
    if case.op == "contrastive_loss":
        found = {name: F.normalize(randn(s["B"], s["D"]), dim=-1) for name in ("image", "text")}
        found = leaves({**found, **_scalars(case, device)})
        if "P" in s:
            found["positives"] = torch.randint(s["B"], (s["P"], 2), generator=g, device=device)
        return found
    similarity = torch.rand(s["B"], s["T"], generator=g, device=device).mul_(2).sub_(1)
    found = leaves({"similarity": similarity, "logit_scale": torch.tensor(14.3, device=device)})
    if case.name in ("positives", "weights"):  # about four of an image, itself among them
        chance = torch.rand(s["B"], s["T"], generator=g, device=device)
        positives = (chance < 3 / s["T"]).logical_or(torch.eye(s["B"], s["T"], device=device) > 0)
        found["positives"] = positives if case.name == "positives" else positives * (1 + chance)
    return found


def _scalars(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Return what ``contrastive_loss`` learns beside its features, as CLIP and SigLIP begin."""
    if case.options.get("kind") != "sigmoid":
        return {"logit_scale": torch.tensor(14.3, device=device)}
    return {
        "logit_scale": torch.tensor(10.0, device=device),
        "logit_bias": torch.tensor(-10.0, device=device),
    }


def maps(
    randn: Callable[..., torch.Tensor],
    images: int,
    classes: int,
    side: int,
    scale: float,
    noise: bool,
) -> torch.Tensor:
    """Return logits: noise alone, or smooth as a network's with a little noise."""
    fine = randn(images, classes, side, side)
    if noise:
        return fine
    return (
        F.interpolate(scale * randn(images, classes, 5, 5), (side, side), mode="bicubic")
        + scale / 20 * fine
    )


def implementations(case: Case) -> dict[str, Callable[..., torch.Tensor]]:
    """Return name to function of the inputs; the first is ours.

    All give the same values, which the runner checks.
    """
    found = BASELINES[case.op](case)
    return {name: f for name, f in found.items() if not case.only or name in case.only}
