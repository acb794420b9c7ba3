"""Every operator with arguments to call it by: what the contract tests run over.

A new operator adds itself here.

The numbers are drawn on the CPU, so that every device gets the same.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

import ovseg_kernels as ok
from ovseg_kernels import philox
from ovseg_kernels.ops.contrastive_loss import sorted_both_ways


@dataclass
class Sample:
    """``call(*tensors)`` is the public function; ``low`` are dispatcher calls for opcheck (name,
    arguments).
    """

    op: str
    name: str
    call: Callable
    tensors: tuple[torch.Tensor, ...]
    low: list[tuple[str, tuple]] = field(default_factory=list)
    features: int = 1  # how many leading tensors may be of 16 bits
    lowered: int | None = None  # how many autocast casts; None: all features, if there are several
    rounded: bool = False  # draws Philox noise, which is float32 whatever the dtype
    mask: torch.Tensor | None = None  # of the leading dimensions of the tensors ``masked``
    masked: tuple[int, ...] = ()
    discrete: bool = False  # labels, without a gradient
    plain: bool = False  # torch alone, with a second derivative
    # torch's norms and products take part, whose bits may depend on the number of threads
    mixed: bool = False
    smooth: bool = True  # False: straight-through, whose gradient is not that of the value

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def leaf(*shape: int, dtype=torch.float64, device="cpu") -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype).to(device).requires_grad_()


def number(value: float, dtype=torch.float64, device="cpu") -> torch.Tensor:
    return torch.tensor(value, dtype=dtype, device=device, requires_grad=True)


def mask_of(B: int, N: int, device="cpu") -> torch.Tensor:
    """One image fully masked, one whole, the rest in part."""
    mask = torch.rand(B, N) > 0.4
    mask[0] = False
    if B > 1:
        mask[1] = True
    return mask.to(device)


def patch_text(dtype=torch.float64, device="cpu", B=3, T=4, N=7, D=5) -> list[Sample]:
    torch.manual_seed(1)
    found = []
    to = {"dtype": dtype, "device": device}
    for pool in ("vector", "score", "max", "mean"):
        for weight in ("softmax", "sigmoid"):
            for mask in (None, mask_of(B, N, device)):
                params = (
                    (number(0.37, **to),)
                    if weight == "softmax"
                    else (number(3.0, **to), number(-0.5, **to))
                )

                def call(patches, texts, *params, pool=pool, weight=weight, mask=mask):
                    names = (
                        ("temperature",) if weight == "softmax" else ("weight_scale", "weight_bias")
                    )
                    return ok.patch_text_similarity(
                        patches,
                        texts,
                        patch_mask=mask,
                        pool=pool,
                        weight=weight,
                        **dict(zip(names, params, strict=True)),
                    )

                patches, texts = leaf(B, N, D, **to), leaf(T, D, **to)
                low = []
                if pool != "mean":
                    codes = (
                        {"vector": 0, "score": 1, "max": 2}[pool],
                        int(weight == "sigmoid"),
                        False,
                    )
                    scale, bias = number(2.0, **to), number(-0.5, **to)
                    low.append(
                        ("patch_text_similarity", (patches, texts, mask, scale, bias, *codes))
                    )
                    plain = [x.detach() for x in (patches, texts, scale, bias)]
                    saved = torch.ops.ovseg.patch_text_similarity(
                        *plain[:2], mask, *plain[2:], *codes
                    )
                    for needs in ((True, True), (True, False), (False, True)):
                        arguments = (
                            torch.randn_like(saved[0]),
                            *plain[:2],
                            mask,
                            *plain[2:],
                            *saved,
                            *codes,
                            *needs,
                        )
                        low.append(("patch_text_similarity_backward", arguments))
                name = f"{pool}-{weight}-{'masked' if mask is not None else 'whole'}"
                found.append(
                    Sample(
                        "patch_text_similarity",
                        name,
                        call,
                        (patches, texts, *params),
                        low,
                        features=2,
                        plain=pool == "mean",
                        mask=mask,
                        masked=(0,),
                    )
                )
    return found


def contrastive(dtype=torch.float64, device="cpu", B=5, T=5) -> list[Sample]:
    torch.manual_seed(2)
    to = {"dtype": dtype, "device": device}
    ids = (
        torch.tensor([0, 1, 1, 2, 9], device=device),
        torch.tensor([1, 0, 2, 2, 7], device=device),
    )  # repeated, and without a partner
    pairs = torch.rand(B, T) > 0.3
    pairs = pairs.fill_diagonal_(True).to(device)
    options = {
        "diagonal": {},
        "ids": {"image_ids": ids[0], "text_ids": ids[1]},
        "pairs": {"pair_mask": pairs},
        "ids-pairs": {"image_ids": ids[0], "text_ids": ids[1], "pair_mask": pairs},
        "positives": {"positives": ids[0][:, None] == ids[1]},
        "weights-pairs": {
            "positives": (torch.rand(B, T, dtype=dtype) * (torch.rand(B, T) > 0.5)).to(device),
            "pair_mask": pairs,
        },
    }
    found = []
    for name, kwargs in options.items():

        def call(similarity, scale, kwargs=kwargs):
            return ok.similarity_contrastive_loss(similarity, scale, **kwargs)

        similarity, scale = leaf(B, T, **to), number(3.0, **to)
        optional = tuple(
            kwargs.get(key) for key in ("image_ids", "text_ids", "pair_mask", "positives")
        )
        plain = (similarity.detach(), scale.detach())
        rows, columns = torch.ops.ovseg.similarity_contrastive_stats(*plain, *optional, 0)
        weights = [(part[2] > 0).to(dtype) / 8 for part in (rows, columns)]
        low = [
            ("similarity_contrastive_stats", (*plain, *optional, 0)),
            (
                "similarity_contrastive_loss",
                (similarity, scale, *optional, rows, columns, *weights, 0),
            ),
            (
                "similarity_contrastive_loss_backward",
                (torch.ones((), **to), *plain, *optional, rows, columns, *weights, 0),
            ),
        ]
        found.append(
            Sample(
                "similarity_contrastive_loss",
                name,
                call,
                (similarity, scale),
                low,
                mask=kwargs.get("pair_mask"),
                masked=(0,),
            )
        )
    return found


def assignment(dtype=torch.float64, device="cpu", B=2, G=3, L=7, D=5, E=4) -> list[Sample]:
    torch.manual_seed(3)
    to = {"dtype": dtype, "device": device}
    noise = torch.randn(B, G, L, dtype=dtype).to(device)
    rng = philox.make_rng(5, device=device)
    cases = {
        "plain": {},
        "noise": {"noise": noise, "normalizer": "mean", "scale": 0.7, "tau": 0.9},
        "rng-masked": {"rng": rng, "mask": mask_of(B, L, device), "normalizer": "mean"},
        "soft-sum": {"hard": False, "normalizer": "sum", "noise": noise},
        "soft-mean": {
            "hard": False,
            "normalizer": "mean",
            "rng": rng,
            "mask": mask_of(B, L, device),
        },
        "map": {"return_soft": True, "scale": 0.5, "noise": noise},
        "bias-scale": {"noise": noise, "scale": 0.5, "mask": mask_of(B, L, device), "extra": True},
        "shared": {"noise": noise, "scale": 0.5, "mask": mask_of(B, L, device), "shared": True},
        "shared-soft": {
            "hard": False,
            "tau": 0.7,
            "normalizer": "mean",
            "shared": True,
            "extra": True,
        },
        "soft-bias-scale": {
            "hard": False,
            "tau": 0.7,
            "rng": rng,
            "extra": True,
            "return_soft": True,
        },
    }
    found = []
    for name, kwargs in cases.items():
        extra, shared = kwargs.pop("extra", False), kwargs.pop("shared", False)

        def call(queries, keys, *others, kwargs=kwargs, shared=shared):
            # Straight through: what the finite difference of a hard assignment is not. The gradient
            # of the soft part is.
            values, *extras = (keys, *others) if shared else others
            extras = dict(zip(("center_bias", "key_scale"), extras, strict=False))
            pooled, _, soft = ok.center_assignment(queries, keys, values, **extras, **kwargs)
            return (
                pooled
                if soft is None
                else torch.cat([pooled.flatten(1), soft.square().flatten(1)], 1)
            )

        features = (leaf(B, G, D, **to), leaf(B, L, D, **to)) + (
            () if shared else (leaf(B, L, E, **to),)
        )
        extras = (leaf(B, G, **to), leaf(B, L, **to)) if extra else ()
        tensors = (*features, *extras)
        given = (*features[:2], features[-1], *(extras or (None, None)))
        plain = tuple(None if x is None else x.detach() for x in given)
        optional = tuple(kwargs.get(key) for key in ("mask", "noise", "rng"))
        options = (
            kwargs.get("scale", 1.0),
            kwargs.get("tau", 1.0),
            kwargs.get("hard", True),
            {"mean": 0, "mean_plus_one": 1, "sum": 2}[kwargs.get("normalizer", "mean_plus_one")],
        )
        pooled, index, count, soft = torch.ops.ovseg.center_assignment(
            *plain, *optional, *options, True
        )
        low = [("center_assignment", (*given, *optional, *options, "return_soft" in kwargs))]
        for needs in ((True, True, True), (True, False, False), (False, True, True)):
            upstream = (
                torch.randn_like(pooled),
                torch.randn_like(count) if extra else None,
                torch.randn_like(soft) if "return_soft" in kwargs else None,
            )
            low.append(
                (
                    "center_assignment_backward",
                    (*upstream, *plain, *optional, pooled, index, count, *options, *needs, False),
                )
            )
        if shared:
            plain = (*plain[:2], plain[1], *plain[3:])
            low.append(
                (
                    "center_assignment_backward",
                    (
                        *upstream,
                        *plain,
                        *optional,
                        pooled,
                        index,
                        count,
                        *options,
                        True,
                        True,
                        False,
                        True,
                    ),
                )
            )
        found.append(
            Sample(
                "center_assignment",
                name,
                call,
                tensors,
                low,
                features=len(features),
                mask=kwargs.get("mask"),
                masked=tuple(range(1, len(features))),
                lowered=0,
                rounded="rng" in kwargs,
                smooth=not kwargs.get("hard", True),
            )
        )
    return found


def folded_assignment(
    dtype=torch.float64, device="cpu", B=2, G=3, L=7, C=6, D=5, E=4
) -> list[Sample]:
    torch.manual_seed(4)
    to = {"dtype": dtype, "device": device}
    cases = {
        "bias": (True, {"rng": philox.make_rng(5, device=device), "scale": 0.5}),
        "masked": (
            True,
            {
                "noise": torch.randn(B, G, L, dtype=dtype).to(device),
                "mask": mask_of(B, L, device),
                "normalizer": "mean",
            },
        ),
        "no-bias": (False, {"scale": 0.5, "return_soft": True}),
        "soft": (
            True,
            {"hard": False, "tau": 0.8, "noise": torch.randn(B, G, L, dtype=dtype).to(device)},
        ),
        "soft-sum": (
            True,
            {
                "hard": False,
                "normalizer": "sum",
                "mask": mask_of(B, L, device),
                "return_soft": True,
            },
        ),
    }
    found = []
    for name, (bias, kwargs) in cases.items():

        def call(*tensors, kwargs=kwargs):
            pooled, _, soft = ok.folded_center_assignment(*tensors, **kwargs)
            return (
                pooled
                if soft is None
                else torch.cat([pooled.flatten(1), soft.square().flatten(1)], 1)
            )

        tensors = leaf(B, G, D, **to), leaf(B, L, C, **to), leaf(D, C, **to), leaf(E, C, **to)
        tensors += (leaf(D, **to), leaf(E, **to)) if bias else ()
        found.append(
            Sample(
                "folded_center_assignment",
                name,
                call,
                tensors,
                features=2,
                lowered=0,
                rounded="rng" in kwargs,
                mask=kwargs.get("mask"),
                masked=(1,),
                mixed=True,
                smooth=not kwargs.get("hard", True),
            )
        )
    return found


def segclip_assignment(dtype=torch.float64, device="cpu", B=2, G=3, L=7, D=6) -> list[Sample]:
    torch.manual_seed(5)
    to = {"dtype": dtype, "device": device}
    cases = {
        "training": {"rng": philox.make_rng(6, device=device), "tau": 0.9},
        "masked": {
            "noise": torch.randn(B, G, L, dtype=dtype).to(device),
            "mask": mask_of(B, L, device),
            "return_soft": True,
        },
        "soft": {"hard": False, "tau": 2.0, "scale": 0.3, "normalizer": "mean_plus_one"},
    }
    found = []
    for name, kwargs in cases.items():

        def call(*tensors, kwargs=kwargs):
            pooled, _, soft = ok.segclip_center_assignment(*tensors, **kwargs)
            return (
                pooled
                if soft is None
                else torch.cat([pooled.flatten(1), soft.square().flatten(1)], 1)
            )

        tensors = (
            leaf(B, G, D, **to),
            leaf(B, L, D, **to),
            leaf(D, D // 2, **to),
            leaf(D, D // 2, **to),
        )
        tensors += tuple(leaf(D, **to) for _ in range(4))
        plain = tensors[1].detach(), tensors[2].detach()
        inverse = torch.ops.ovseg.grouped_inverse_std(*plain, 1e-5)
        low = [
            ("grouped_inverse_std", (tensors[1], tensors[2], 1e-5)),
            ("grouped_inverse_std_backward", (torch.randn_like(inverse), *plain, inverse)),
        ]
        found.append(
            Sample(
                "segclip_center_assignment",
                name,
                call,
                tensors,
                low,
                features=2,
                lowered=0,
                rounded="rng" in kwargs,
                mask=kwargs.get("mask"),
                masked=(1,),
                mixed=True,
                smooth=not kwargs.get("hard", True),
            )
        )
    return found


def features_loss(dtype=torch.float64, device="cpu", B=5, D=6) -> list[Sample]:
    torch.manual_seed(6)
    to = {"dtype": dtype, "device": device}
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    ids = (
        torch.tensor([0, 1, 1, 2, 9], device=device),
        torch.tensor([1, 0, 2, 2, 7, 1, 5], device=device),
    )
    listed = {  # an image without a positive, a weight of 0, a pair listed twice
        "positives": torch.tensor([[1, 5], [0, 6], [4, 1], [1, 0], [0, 2], [1, 5], [2, 2]]),
        "positive_weights": torch.tensor([0.3, 0.5, 2.0, 1.0, 0.0, 0.4, 1.0], dtype=wide),
    }
    listed = {key: value.to(device) for key, value in listed.items()}
    cases = {
        "diagonal": {},
        "ids": {"image_ids": ids[0], "text_ids": ids[1]},
        "unit": {"normalize": False},
        "sigmoid": {"kind": "sigmoid"},
        "sigmoid-ids": {"kind": "sigmoid", "image_ids": ids[0], "text_ids": ids[1]},
        "list": listed,
        "sigmoid-list": {"kind": "sigmoid", **listed},
    }
    found = []
    for name, kwargs in cases.items():
        T, sigmoid = 7 if {"image_ids", "positives"} & set(kwargs) else B, "kind" in kwargs

        def call(image, text, scale, *bias, kwargs=kwargs):
            return ok.contrastive_loss(
                image, text, scale, **({"logit_bias": bias[0]} if bias else {}), **kwargs
            )

        tensors = (
            leaf(B, D, **to),
            leaf(T, D, **to),
            number(3.0, **to),
            *((number(-1.5, **to),) if sigmoid else ()),
        )
        bias = number(-1.5 if sigmoid else 0.0, wide, device).detach()
        plain = tuple(x.detach().to(wide) for x in tensors[:3])
        positives = kwargs.get("image_ids"), kwargs.get("text_ids"), None
        if "positives" in kwargs:
            positives = sorted_both_ways(*listed.values(), *plain[:2])
        plain = (*plain, bias, *positives)
        options = (0, sigmoid, False, False)
        rows, columns = torch.ops.ovseg.contrastive_stats(*plain, *options)
        saved = (
            rows,
            columns,
            torch.full_like(rows[0], 0.1),
            torch.full_like(columns[0], 0.0 if sigmoid else 0.2),
        )
        leaves = tuple(x.clone().requires_grad_() for x in plain[:4]) + plain[4:]
        low = [
            ("contrastive_stats", (*plain, *options)),
            ("contrastive_loss", (*leaves, *saved, *options)),
        ]
        for needs in ((True, True), (True, False), (False, True)):
            low.append(
                (
                    "contrastive_loss_backward",
                    (torch.ones((), dtype=wide, device=device), *plain, *saved, *options, *needs),
                )
            )
        found.append(Sample("contrastive_loss", name, call, tensors, low, features=2, lowered=0))
    return found


def dense_loss(dtype=torch.float64, device="cpu", B=3, N=7, D=5) -> list[Sample]:
    torch.manual_seed(7)
    to = {"dtype": dtype, "device": device}
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    rng = philox.make_rng(8, device=device)
    ids = {
        "image_ids": torch.tensor([0, 1, 1], device=device),
        "text_ids": torch.tensor([1, 0, 5, 1], device=device),
    }
    cases = {
        "topk": {"k_pos": 2, "k_neg": 3},
        "log-of-sum-ids": {"k_pos": 3, "k_neg": 4, "reduction": "log_of_sum", **ids},
        "semi-more-than-there-are": {"k_pos": 9, "k_neg": 40, "sampling": "semi", "margin": 0.8},
        "gumbel-window-ids": {
            "k_pos": 2,
            "k_neg": 3,
            "sampling": "gumbel",
            "rng": rng,
            "skip": 1,
            "sampling_temperature": 0.3,
            **ids,
        },
        "random-text-to-pixel": {
            "k_pos": 2,
            "k_neg": 5,
            "sampling": "random",
            "rng": rng,
            "terms": "text_to_pixel",
        },
        "pixel-to-text": {"k_pos": 2, "k_neg": 1, "terms": "pixel_to_text"},
    }
    found = []
    for name, kwargs in cases.items():

        def call(pixels, texts, temperature, kwargs=kwargs):
            return ok.dense_contrastive_loss(pixels, texts, temperature=temperature, **kwargs)

        T = 4 if "image_ids" in kwargs else B
        tensors = leaf(B, N, D, **to), leaf(T, D, **to), number(0.4, wide, device)
        pixels, unit = (
            tensors[0].detach(),
            torch.nn.functional.normalize(tensors[1].detach().to(wide), dim=-1),
        )
        optional = tuple(kwargs.get(key) for key in ("image_ids", "text_ids", "rng"))
        code = ("topk", "semi", "gumbel", "random").index(kwargs.get("sampling", "topk"))
        options = (kwargs["k_pos"], kwargs["k_neg"], kwargs.get("skip", 0), code, 0.3, 0.8)
        index = torch.cat(
            torch.ops.ovseg.dense_contrastive_select(pixels, unit, *optional, *options), 1
        )
        rows = 0 if kwargs.get("terms") == "text_to_pixel" else kwargs["k_pos"]
        order = index.flatten().argsort(stable=True)
        grads = torch.randn(index.shape).to(unit), torch.randn(T, rows, D).to(unit)
        low = [
            ("dense_contrastive_select", (pixels, unit, *optional, *options)),
            ("dense_contrastive_gather", (tensors[0], unit.clone().requires_grad_(), index, rows)),
            (
                "dense_contrastive_gather_backward",
                (*grads, pixels, unit, index, order, rows, True, True),
            ),
            (
                "dense_contrastive_gather_backward",
                (None, grads[1], pixels, unit, index, order, rows, True, False),
            ),
            (
                "dense_contrastive_gather_backward",
                (grads[0], None, pixels, unit, index, order, rows, False, True),
            ),
        ]
        found.append(
            Sample("dense_contrastive_loss", name, call, tensors, low, features=2, lowered=0)
        )
    return found


def flagging(op: str, arguments: tuple) -> list[tuple[str, tuple]]:
    flags = torch.zeros(4, dtype=torch.int32, device=arguments[0].device)
    return [(op, arguments), (f"{op}_flagging", (*arguments, flags, 1))]


def upsampling(dtype=torch.float64, device="cpu", B=2, C=4, h=3, w=5) -> list[Sample]:
    torch.manual_seed(9)
    logits, bias = (
        torch.randn(B, C, h, w, dtype=dtype).to(device),
        torch.randn(C, dtype=dtype).to(device),
    )
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    table = torch.tensor([3, 0, 3, 1], device=device)
    cases = {
        "up": ((13, 12), {}),
        "down-value": ((2, 3), {"bias": bias, "return_value": True}),
        "threshold-labels": (
            (9, 9),
            {"threshold": 0.4, "background": 7, "class_labels": table, "label_type": torch.uint8},
        ),
    }
    found = []
    for name, (size, kwargs) in cases.items():

        def call(logits, size=size, kwargs=kwargs):
            found = ok.upsample_argmax(logits, size, **kwargs)
            return found[0] if isinstance(found, tuple) else found

        given = (
            logits.to(wide),
            None if "bias" not in kwargs else bias.to(wide),
            kwargs.get("class_labels"),
        )
        options = (
            *size,
            kwargs.get("threshold"),
            7,
            2 if "label_type" in kwargs else 0,
            "return_value" in kwargs,
        )
        low = flagging("upsample_argmax", (*given, *options))
        found.append(Sample("upsample_argmax", name, call, (logits,), low, discrete=True))
    return found


def windows(dtype=torch.float64, device="cpu", C=4, G=3, h=3, w=4) -> list[Sample]:
    torch.manual_seed(10)
    origins = torch.tensor([[0, 0], [0, 5], [2, 0], [2, 5]])
    logits, tables = (
        torch.randn(4, C, h, w, dtype=dtype).to(device),
        torch.randn(4, G, C, dtype=dtype).to(device),
    )
    origins, bias, table = (
        origins.to(device),
        torch.randn(C, dtype=dtype).to(device),
        torch.tensor([3, 0, 3, 1], device=device),
    )
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    crop, canvas = (6, 7), (8, 12)
    labels = {"threshold": 0.4, "background": 7, "class_labels": table, "label_type": torch.uint8}
    cases = {
        "plain": ((8, 12), {}),
        "sigmoid-value": ((11, 9), {"activation": "sigmoid", "bias": bias, "return_value": True}),
        "softmax-labels": ((5, 13), {"activation": "softmax", "stage": "output", **labels}),
        "softmax-merged": ((9, 9), {"activation": "softmax", "stage": "merged"}),
        "tables": ((9, 10), {"tables": tables}),
    }
    found = []
    for name, (size, kwargs) in cases.items():
        grouped = "tables" in kwargs
        maps = logits[:, :G] if grouped else logits

        def call(logits, size=size, kwargs=kwargs):
            found = ok.window_argmax(logits, origins, crop, canvas, size, **kwargs)
            return found[0] if isinstance(found, tuple) else found

        index = ok.upsample_argmax(maps, crop, label_type=torch.int16) if grouped else None
        given = (
            (tables if grouped else logits).to(wide),
            index,
            origins,
            bias.to(wide) if "bias" in kwargs else None,
        )
        activation = (None, "sigmoid", "softmax").index(kwargs.get("activation"))
        stage = ("window", "merged", "output").index(kwargs.get("stage", "window"))
        options = (
            *crop,
            *canvas,
            *size,
            activation,
            stage,
            kwargs.get("threshold"),
            7,
            2 if "label_type" in kwargs else 0,
            "return_value" in kwargs,
        )
        low = flagging("window_argmax", (*given, kwargs.get("class_labels"), *options))
        found.append(Sample("window_argmax", name, call, (maps,), low, discrete=True))
    return found


def mask_loss(dtype=torch.float64, device="cpu", B=2, C=3, h=2, w=3) -> list[Sample]:
    torch.manual_seed(11)
    logits = leaf(B, C, h, w, dtype=dtype, device=device)
    labels = torch.randint(0, C + 2, (B, 5, 7))
    labels = torch.where(labels < C, labels, torch.where(labels == C, 255, -1)).to(device)
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    codes = torch.where((labels >= 0) & (labels < C), labels, -1).to(torch.int32)
    found = []
    for name, kwargs in {
        "zegclip": {},
        "ignored": {"alpha": 0.6, "gamma": 1.5, "ignore_index": 255},
    }.items():

        def call(logits, kwargs=kwargs):
            focal, dice, _ = ok.upsample_mask_loss(logits, labels, **kwargs)
            return torch.stack([focal, dice])

        coded = (
            codes.masked_fill(labels == kwargs["ignore_index"], -2)
            if "ignore_index" in kwargs
            else codes
        )
        options = kwargs.get("alpha", 0.25), kwargs.get("gamma", 2.0)
        plain = logits.detach().to(wide)
        sums = torch.ops.ovseg.upsample_mask_loss(plain, coded, *options)[3]
        grads = torch.randn(2, B, C, dtype=wide).to(device)
        low = [
            ("upsample_mask_loss", (plain.clone().requires_grad_(), coded, *options)),
            ("upsample_mask_loss_backward", (*grads, plain, coded, sums, *options)),
        ]
        found.append(Sample("upsample_mask_loss", name, call, (logits,), low))
    return found


MAKERS = {
    "upsample_mask_loss": mask_loss,
    "window_argmax": windows,
    "upsample_argmax": upsampling,
    "contrastive_loss": features_loss,
    "dense_contrastive_loss": dense_loss,
    "patch_text_similarity": patch_text,
    "similarity_contrastive_loss": contrastive,
    "center_assignment": assignment,
    "folded_center_assignment": folded_assignment,
    "segclip_center_assignment": segclip_assignment,
}


# Operator -> (function, tensors) of a batch size, for what must not compile again when it changes.
# The first size used shares no number with the other dimensions, which would be taken for one
# symbol. Whatever may change from step to step is a tensor.
RESIZED = {
    "upsample_mask_loss": lambda size: (
        lambda logits, labels: torch.stack(ok.upsample_mask_loss(logits, labels)[:2]),
        (torch.randn(size, 2, 1, 4), torch.randint(-1, 3, (size, 5, 8))),
    ),
    "window_argmax": lambda size: (
        lambda logits, origins: ok.window_argmax(
            logits, origins, (11, 8), (11, 13), (7, 10), activation="sigmoid"
        ),
        (
            torch.randn(size, 2, 4, 5),
            (5 * torch.arange(size)).clamp(max=5)[:, None] * torch.tensor([0, 1]),
        ),
    ),
    "upsample_argmax": lambda size: (
        lambda logits: ok.upsample_argmax(logits, (11, 13)),
        (torch.randn(size, 5, 4, 7),),
    ),
    "dense_contrastive_loss": lambda size: (
        lambda pixels, texts, t, rng: ok.dense_contrastive_loss(
            pixels, texts, temperature=t, k_pos=2, k_neg=4, sampling="gumbel", rng=rng
        ),
        (
            torch.randn(size, 7, 5),
            torch.randn(size, 5),
            torch.tensor(0.2 * size),
            philox.make_rng(size),
        ),
    ),
    "contrastive_loss": lambda size: (
        ok.contrastive_loss,
        (torch.randn(size, 7), torch.randn(size, 7), torch.tensor(0.2 * size)),
    ),
    "patch_text_similarity": lambda size: (
        lambda patches, texts, t: ok.patch_text_similarity(patches, texts, temperature=t),
        (torch.randn(size, 7, 5), torch.randn(size + 1, 5), torch.tensor(0.2 * size)),
    ),
    "similarity_contrastive_loss": lambda size: (
        ok.similarity_contrastive_loss,
        (torch.randn(size, size), torch.tensor(0.2 * size)),
    ),
    "center_assignment": lambda size: (
        lambda queries, keys, values, rng: ok.center_assignment(queries, keys, values, rng=rng)[0],
        (
            torch.randn(size, 4, 5),
            torch.randn(size, 7, 5),
            torch.randn(size, 7, 8),
            philox.make_rng(size),
        ),
    ),
    "folded_center_assignment": lambda size: (
        lambda queries, tokens, *weights: ok.folded_center_assignment(
            queries, tokens, *weights[:-1], rng=weights[-1]
        )[0],
        (
            torch.randn(size, 4, 5),
            torch.randn(size, 7, 8),
            torch.randn(5, 8),
            torch.randn(10, 8),
            torch.randn(5),
            torch.randn(10),
            philox.make_rng(size),
        ),
    ),
    "segclip_center_assignment": lambda size: (
        lambda queries, tokens, *weights: ok.segclip_center_assignment(
            queries, tokens, *weights[:-1], rng=weights[-1]
        )[0],
        (
            torch.randn(size, 4, 8),
            torch.randn(size, 7, 8),
            torch.randn(8, 2),
            torch.randn(8, 2),
            *torch.randn(4, 8).unbind(),
            philox.make_rng(size),
        ),
    ),
}


def all_samples(dtype=torch.float64, device="cpu") -> list[Sample]:
    return [sample for make in MAKERS.values() for sample in make(dtype, device)]
