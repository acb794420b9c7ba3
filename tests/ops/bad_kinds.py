"""Kinds of arguments that all operators refuse in the same words, made for each argument that they
fit.

tests/ops/test_contract.py runs them.
"""

import numpy as np
import torch
from bad_input import BAD_INPUT

from ovseg_kernels import philox

# What an operator takes beside the tensors of its row in BAD_INPUT. Numbers may divide something,
# or be given as tensors.
TENSORS = {
    "patch_text_similarity": {"patch_mask": torch.ones(2, 5, dtype=torch.bool)},
    "similarity_contrastive_loss": {
        "pair_mask": torch.ones(2, 2, dtype=torch.bool),
        "positives": torch.ones(2, 2),
    },
    "contrastive_loss": {"positives": torch.tensor([[0, 2], [1, 2]])},
    "center_assignment": {
        "mask": torch.ones(2, 5, dtype=torch.bool),
        "noise": torch.randn(2, 3, 5),
        "center_bias": torch.randn(2, 3),
        "key_scale": torch.randn(2, 5),
    },
    "folded_center_assignment": {
        "mask": torch.ones(2, 5, dtype=torch.bool),
        "key_bias": torch.randn(4),
        "value_bias": torch.randn(7),
    },
    "segclip_center_assignment": {"noise": torch.randn(2, 3, 5)},
    "upsample_argmax": {"bias": torch.randn(3), "class_labels": torch.arange(3)},
    "window_argmax": {
        "bias": torch.randn(3),
        "class_labels": torch.arange(3),
        "tables": torch.randn(2, 3, 5),
    },
}
RANDOM = ("center_assignment", "folded_center_assignment", "segclip_center_assignment")
DIVIDES = {
    "patch_text_similarity": ("temperature",),
    "dense_contrastive_loss": ("temperature", "sampling_temperature"),
    "center_assignment": ("tau",),
    "folded_center_assignment": ("tau",),
    "segclip_center_assignment": ("tau",),
}
NUMBERS = {
    **{op: (*DIVIDES[op], "scale") for op in RANDOM},
    "patch_text_similarity": ("temperature",),
    "similarity_contrastive_loss": ("logit_scale",),
    "contrastive_loss": ("logit_scale",),
    "dense_contrastive_loss": ("temperature", "sampling_temperature", "margin"),
    "upsample_argmax": ("threshold",),
    "window_argmax": ("threshold",),
    "upsample_mask_loss": ("alpha", "gamma"),
}
NUMBERS["segclip_center_assignment"] += ("eps",)
OR_TENSORS = {
    ("patch_text_similarity", "temperature"),
    ("dense_contrastive_loss", "temperature"),
    ("similarity_contrastive_loss", "logit_scale"),
    ("contrastive_loss", "logit_scale"),
}
INTEGERS = {
    "dense_contrastive_loss": ("k_pos", "k_neg", "skip"),
    "upsample_argmax": ("background",),
    "window_argmax": ("background",),
}
FLAGS = {
    **dict.fromkeys(RANDOM, ("hard", "return_soft")),
    "contrastive_loss": ("normalize",),
    "upsample_argmax": ("return_value",),
    "window_argmax": ("return_value",),
}
CHOICES = {
    **dict.fromkeys(RANDOM, ("normalizer",)),
    "patch_text_similarity": ("pool", "weight"),
    "contrastive_loss": ("kind",),
    "dense_contrastive_loss": ("sampling", "reduction", "terms"),
    "window_argmax": ("stage",),
}
PAIRS = {"upsample_argmax": ("size",), "window_argmax": ("size", "crop", "canvas")}
GROUPS = ("contrastive_loss", "similarity_contrastive_loss")


def _tensor(name, x):
    """(kind, value, error, message) for a tensor argument."""
    yield (
        "a list in place of a tensor",
        x.tolist(),
        TypeError,
        f"{name} is a list; expected a tensor",
    )
    yield (
        "a numpy array in place of a tensor",
        x.numpy(),
        TypeError,
        f"{name} is a ndarray; expected a tensor",
    )
    yield (
        "a sparse tensor",
        x.to_sparse(),
        TypeError,
        f"{name} has layout sparse_coo; expected a dense tensor",
    )
    yield (
        "a tensor in mkldnn's layout",
        x.float().to_mkldnn(),
        TypeError,
        f"{name} has layout _mkldnn; expected a dense tensor",
    )
    yield (
        "a nested tensor",
        torch.nested.nested_tensor([x, x]),
        TypeError,
        f"{name} is a nested tensor; expected a dense tensor",
    )
    yield (
        "a complex tensor",
        x.to(torch.complex64),
        TypeError,
        f"{name} has dtype complex64; expected",
    )
    yield (
        "a tensor of eight-bit floats",
        x.float().to(torch.float8_e4m3fn),
        TypeError,
        f"{name} has dtype float8_e4m3fn; expected",
    )
    yield (
        "a meta tensor beside tensors of the CPU",
        x.to("meta"),
        ValueError,
        r"is on (meta .*cpu|cpu .*meta)",
    )
    yield (
        "a dimension too many",
        x[None],
        ValueError,
        rf"{name} has shape \[1, .*; expected {x.dim()} dimensions",
    )


def _number(op, name):
    divides, tensor_too = name in DIVIDES.get(op, ()), (op, name) in OR_TENSORS
    for kind, value in (
        ("a string", "0.5"),
        ("a boolean", True),
        ("a list", [0.5]),
        ("a complex number", 1j),
    ):
        yield (
            f"{kind} in place of a number",
            value,
            TypeError,
            f"{name} is a {type(value).__name__}; expected",
        )
    if not tensor_too:
        yield (
            "a tensor in place of a number of the host",
            torch.tensor(0.5),
            TypeError,
            f"{name} is a Tensor; expected a number",
        )
    for kind, value in (
        ("NaN", float("nan")),
        ("infinity", float("inf")),
        ("minus infinity", -float("inf")),
    ):
        yield f"{kind} as a number", value, ValueError, f"{name} is {value}; expected"
    if name != "alpha" and (op, name) not in {
        ("dense_contrastive_loss", "sampling_temperature"),
        ("dense_contrastive_loss", "margin"),
    }:
        yield (
            "a number that float32 cannot hold",
            1e308,
            ValueError,
            rf"{name} is 1e\+308; float32 holds 3\.4\d+e\+38 at most",
        )
        yield (
            "an integer that no float holds",
            10**400,
            ValueError,
            f"{name} is 10{{399}}|{name} is 1",
        )
    if divides:
        yield (
            "a divisor too small to divide by",
            1e-40,
            ValueError,
            f"{name} is 1e-40; expected at least 1e-",
        )
        yield (
            "zero to divide by",
            0.0,
            ValueError,
            f"{name} is 0.0; expected a positive finite number",
        )
        yield (
            "a negative number to divide by",
            -1.0,
            ValueError,
            f"{name} is -1.0; expected a positive finite number",
        )
    if tensor_too:
        yield (
            "NaN in a tensor of one number",
            torch.tensor(float("nan")),
            ValueError,
            f"{name} is nan; expected",
        )
        yield (
            "a tensor of integers as a number",
            torch.tensor(1),
            TypeError,
            f"{name} has dtype torch.int64; expected a floating dtype",
        )
        yield (
            "several numbers where one is wanted",
            torch.ones(3),
            ValueError,
            rf"{name} has shape \[3\]; expected one element",
        )
        yield (
            "a number on another device",
            torch.ones((), device="meta"),
            ValueError,
            f"{name} is on meta; expected cpu",
        )
        if divides:
            yield (
                "a tensor of a divisor too small",
                torch.tensor(1e-40),
                ValueError,
                rf"{name} is \S+e-41; expected at least 1e-",
            )


def _others(op):
    for name in INTEGERS.get(op, ()):
        for kind, value in (
            ("a string", "2"),
            ("a fraction", 2.5),
            ("a boolean", True),
            ("a tensor", torch.tensor(2)),
        ):
            yield (
                name,
                f"{kind} in place of an integer",
                value,
                ValueError,
                f"{name} is .*; expected an integer",
            )
        yield (
            name,
            "an integer of more than 64 bits",
            2**70,
            ValueError,
            f"{name} is {2**70}; expected an integer of at most {2**63 - 1}",
        )
    for name in FLAGS.get(op, ()):
        for kind, value in (("a string", "no"), ("a number", 1), ("a tensor", torch.tensor(True))):
            yield (
                name,
                f"{kind} in place of True or False",
                value,
                TypeError,
                f"{name} is a {type(value).__name__}; expected True or False",
            )
    for name in CHOICES.get(op, ()):
        for kind, value in (
            ("a word that is none of them", "other"),
            ("None", None),
            ("a list", ["mean"]),
            ("an array", np.ones(2)),
        ):
            yield (
                name,
                f"{kind} in place of a choice",
                value,
                ValueError,
                rf"{name} is .*; expected one of \[",
            )
    for name in PAIRS.get(op, ()):
        for kind, value in (
            ("text", ("8", "8")),
            ("fractions", (8.0, 8)),
            ("booleans", (True, 8)),
            ("negative numbers", (-8, 8)),
            ("one number", 8),
            ("three numbers", (8, 8, 8)),
            ("a tensor", torch.tensor([8, 8])),
        ):
            yield (
                name,
                f"{kind} as height and width",
                value,
                ValueError,
                rf"{name} is .*; expected two positive integers",
            )
        yield (
            name,
            "a height that no kernel counts",
            (2**31, 8),
            ValueError,
            rf"{name} is \(2147483648, 8\); expected at most 2147483647",
        )
    if op in GROUPS:
        for kind, value in (("a name", "world"), ("a rank", 0)):
            yield (
                "group",
                f"{kind} in place of a process group",
                value,
                TypeError,
                f"group is a {type(value).__name__}; expected a torch",
            )
    if op in RANDOM:
        good = philox.make_rng(0)
        yield "rng", "a seed in place of rng", 7, TypeError, "rng is int; expected an int64 tensor"
        yield (
            "rng",
            "an rng of floats",
            good.float(),
            TypeError,
            "rng is float32; expected an int64 tensor",
        )
        yield (
            "rng",
            "an rng of three numbers",
            torch.arange(3),
            ValueError,
            r"rng has shape \[3\]; expected \[2\]",
        )
        yield (
            "rng",
            "a sparse rng",
            good.to_sparse(),
            TypeError,
            "rng is sparse_coo; expected an int64 tensor",
        )
        yield (
            "rng",
            "an rng on another device",
            good.to("meta"),
            ValueError,
            "rng is on meta and .* is on cpu",
        )


def rows(op):
    """(kind, argument, value, error, message) of an operator."""
    arguments = {**BAD_INPUT[op][0], **TENSORS.get(op, {})}
    tensors = [name for name, x in arguments.items() if isinstance(x, torch.Tensor)]
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor) and not (op == "window_argmax" and name == "origins"):
            for kind, value, error, message in _tensor(name, x):
                if "meta" in kind and (name in ("logits", "similarity") or tensors == [name]):
                    continue  # the only tensor of the call: its shapes are the result
                yield kind, name, value, error, message
    for name in NUMBERS.get(op, ()):
        for kind, value, error, message in _number(op, name):
            yield kind, name, value, error, message
    for name, kind, value, error, message in _others(op):
        yield kind, name, value, error, message
