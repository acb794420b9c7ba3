"""Every operator with calls it must refuse: what, with which error, in which words.
tests/ops/test_contract.py runs them.
"""

import torch

from ovseg_kernels import philox

PATCH_TEXT_SIMILARITY = {"patches": torch.randn(2, 5, 4), "texts": torch.randn(3, 4)}
PATCH_TEXT_SIMILARITY_REFUSED = [
    (
        {"patches": torch.randn(5, 4)},
        ValueError,
        r"patches has shape \[5, 4\]; expected 3 dimensions, \[B, N, D\]",
    ),
    (
        {"texts": torch.randn(1, 3, 4)},
        ValueError,
        r"texts has shape \[1, 3, 4\]; expected 2 dimensions",
    ),
    ({"texts": torch.randn(3, 7)}, ValueError, "texts has last dimension 7 and patches has 4"),
    (
        {"texts": torch.randn(3, 4).double()},
        TypeError,
        "texts has dtype float64 and patches has float32",
    ),
    (
        {"patches": torch.ones(2, 5, 4, dtype=torch.int64)},
        TypeError,
        "patches has dtype int64; expected float32",
    ),
    ({"patches": [[1.0]]}, TypeError, "patches is a list; expected a tensor"),
    (
        {"texts": torch.randn(3, 4, device="meta")},
        ValueError,
        "texts is on meta and patches is on cpu",
    ),
    (
        {"patches": torch.randn(2, 0, 4)},
        ValueError,
        r"patches has shape \[2, 0, 4\]; expected at least one patch",
    ),
    (
        {"patches": torch.randn(2, 5, 0), "texts": torch.randn(3, 0)},
        ValueError,
        "at least one patch and one channel",
    ),
    (
        {"temperature": float("nan")},
        ValueError,
        "temperature is nan; expected a positive finite number",
    ),
    (
        {"temperature": torch.tensor(float("nan"))},
        ValueError,
        "temperature is nan; expected a positive finite number",
    ),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive finite number"),
    (
        {"temperature": torch.ones(2)},
        ValueError,
        r"temperature has shape \[2\]; expected one element",
    ),
    ({"temperature": "warm"}, TypeError, "temperature is a str; expected a positive finite number"),
    ({"weight": "sigmoid", "temperature": 0.1}, ValueError, "use weight_scale instead"),
    (
        {"weight": "sigmoid", "weight_scale": float("inf")},
        ValueError,
        "weight_scale is inf; expected a finite number",
    ),
    (
        {"pool": "median"},
        ValueError,
        r"pool is 'median'; expected one of \['vector', 'score', 'max', 'mean'\]",
    ),
    ({"weight": "relu"}, ValueError, "weight is 'relu'; expected one of"),
    (
        {"patch_mask": torch.ones(2, 6, dtype=torch.bool)},
        ValueError,
        r"patch_mask has shape \[2, 6\]; expected \[2, 5\]",
    ),
    ({"patch_mask": torch.ones(2, 5)}, TypeError, "patch_mask has dtype float32; expected bool"),
]

SIMILARITY_CONTRASTIVE_LOSS = {"similarity": torch.randn(2, 2), "logit_scale": 1.0}
SIMILARITY_CONTRASTIVE_LOSS_REFUSED = [
    (
        {"similarity": torch.randn(2, 3)},
        ValueError,
        r"similarity has shape \[2, 3\] and the batch has 2 images",
    ),
    (
        {"similarity": torch.randn(4)},
        ValueError,
        r"similarity has shape \[4\]; expected 2 dimensions",
    ),
    ({"similarity": torch.ones(2, 2, dtype=torch.int32)}, TypeError, "similarity has dtype int32"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; expected a finite number"),
    (
        {"logit_scale": torch.ones(3)},
        ValueError,
        r"logit_scale has shape \[3\]; expected one element",
    ),
    ({"logit_scale": torch.tensor(2)}, TypeError, "logit_scale has dtype torch.int64"),
    ({"image_ids": torch.arange(2)}, ValueError, "image_ids and text_ids go together"),
    (
        {"image_ids": torch.arange(2), "text_ids": torch.arange(3)},
        ValueError,
        r"text_ids has shape \[3\]; expected \[2\]",
    ),
    (
        {"image_ids": torch.rand(2), "text_ids": torch.rand(2)},
        TypeError,
        "image_ids has dtype float32; expected int64",
    ),
    (
        {"pair_mask": torch.ones(2, 3, dtype=torch.bool)},
        ValueError,
        r"pair_mask has shape \[2, 3\]; expected \[2, 2\]",
    ),
    ({"pair_mask": torch.ones(2, 2)}, TypeError, "pair_mask has dtype float32; expected bool"),
    (
        {"pair_mask": torch.ones(2, 2, dtype=torch.bool, device="meta")},
        ValueError,
        "pair_mask is on meta",
    ),
    (
        {"positives": torch.ones(2, 2), "image_ids": torch.arange(2), "text_ids": torch.arange(2)},
        ValueError,
        "positives and ids were both given",
    ),
    (
        {"positives": torch.ones(2, 3)},
        ValueError,
        r"positives has shape \[2, 3\]; expected \[2, 2\]",
    ),
    (
        {"positives": torch.ones(2, 2, dtype=torch.int64)},
        TypeError,
        "positives has dtype int64; expected bool, float32",
    ),
    (
        {"positives": torch.tensor([[1.0, 0.0], [-0.5, 1.0]])},
        ValueError,
        "positives holds -0.5; expected finite weights of at least 0",
    ),
    ({"positives": torch.tensor([[1.0, 0.0], [float("nan"), 1.0]])}, ValueError, "holds nan"),
    ({"positives": torch.tensor([[1.0, 0.0], [float("inf"), 1.0]])}, ValueError, "holds inf"),
    (
        {"positives": torch.full((2, 2), 1e300, dtype=torch.float64)},  # float32 is computed in
        ValueError,
        "positives holds inf; expected finite weights",
    ),
]

CENTER_ASSIGNMENT = {
    "queries": torch.randn(2, 3, 4),
    "keys": torch.randn(2, 5, 4),
    "values": torch.randn(2, 5, 6),
}
CENTER_ASSIGNMENT_REFUSED = [
    (
        {"queries": torch.randn(3, 4)},
        ValueError,
        r"queries has shape \[3, 4\]; expected 3 dimensions, \[B, G, D\]",
    ),
    ({"queries": torch.randn(2, 0, 4)}, ValueError, "expected at least one center and one channel"),
    (
        {"keys": torch.randn(2, 5, 7)},
        ValueError,
        r"keys has shape \[2, 5, 7\]; expected \[2, 5, 4\]",
    ),
    (
        {"values": torch.randn(2, 6, 6)},
        ValueError,
        r"values has shape \[2, 6, 6\]; expected \[2, 5, 6\]",
    ),
    (
        {"values": torch.randn(2, 5, 6, device="meta")},
        ValueError,
        "values is on meta and queries is on cpu",
    ),
    (
        {"keys": torch.ones(2, 5, 4, dtype=torch.int32)},
        TypeError,
        "keys has dtype int32; expected float32",
    ),
    (
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        ValueError,
        r"mask has shape \[2, 4\]; expected \[2, 5\]",
    ),
    ({"mask": torch.ones(2, 5)}, TypeError, "mask has dtype float32; expected bool"),
    (
        {"noise": torch.randn(2, 5, 3)},
        ValueError,
        r"noise has shape \[2, 5, 3\]; expected \[2, 3, 5\]",
    ),
    (
        {"noise": torch.randn(2, 3, 5), "rng": philox.make_rng(0)},
        ValueError,
        "noise and rng were both given",
    ),
    ({"rng": 3}, TypeError, "rng is int; expected an int64 tensor"),
    (
        {"center_bias": torch.randn(2, 5)},
        ValueError,
        r"center_bias has shape \[2, 5\]; expected \[2, 3\], one number for each center",
    ),
    (
        {"key_scale": torch.randn(2, 5, 1)},
        ValueError,
        r"key_scale has shape \[2, 5, 1\]; expected 2 dimensions, \[B, L\]",
    ),
    ({"tau": 0.0}, ValueError, "tau is 0.0; expected a positive finite number"),
    ({"tau": float("nan")}, ValueError, "tau is nan; expected a positive finite number"),
    ({"scale": float("inf")}, ValueError, "scale is inf; expected a finite number"),
    ({"scale": "big"}, TypeError, "scale is a str; expected a number"),
    (
        {"normalizer": "median"},
        ValueError,
        r"normalizer is 'median'; expected one of \['mean', 'mean_plus_one', 'sum'\]",
    ),
]

FOLDED_CENTER_ASSIGNMENT = {
    "queries": torch.randn(2, 3, 4),
    "tokens": torch.randn(2, 5, 6),
    "key_weight": torch.randn(4, 6),
    "value_weight": torch.randn(7, 6),
}
FOLDED_CENTER_ASSIGNMENT_REFUSED = [
    (
        {"tokens": torch.randn(5, 6)},
        ValueError,
        r"tokens has shape \[5, 6\]; expected 3 dimensions, \[B, L, C\]",
    ),
    (
        {"tokens": torch.randn(3, 5, 6)},
        ValueError,
        r"queries has shape \[2, 3, 4\]; expected \[3, 3, 4\], the B of tokens",
    ),
    (
        {"key_weight": torch.randn(6, 4)},
        ValueError,
        r"key_weight has shape \[6, 4\]; expected \[4, 6\], out and in features",
    ),
    (
        {"value_weight": torch.randn(7, 5)},
        ValueError,
        r"value_weight has shape \[7, 5\]; expected \[7, 6\]",
    ),
    (
        {"key_bias": torch.randn(6)},
        ValueError,
        r"key_bias has shape \[6\]; expected \[4\], one number for each row of key_weight",
    ),
    (
        {"value_bias": torch.ones(7, dtype=torch.int64)},
        TypeError,
        "value_bias has dtype int64; expected float32",
    ),
    (
        {"value_weight": torch.randn(7, 6, device="meta")},
        ValueError,
        "value_weight is on meta and tokens is on cpu",
    ),
    ({"tau": -1.0}, ValueError, "tau is -1.0; expected a positive finite number"),
]

_VECTORS = ("norm_weight", "norm_bias", "key_norm_weight", "key_norm_bias")
SEGCLIP_CENTER_ASSIGNMENT = {
    "queries": torch.randn(2, 3, 8),
    "tokens": torch.randn(2, 5, 8),
    "key_weight": torch.randn(8, 4),
    "value_weight": torch.randn(8, 4),
    **{name: torch.randn(8) for name in _VECTORS},
}
SEGCLIP_CENTER_ASSIGNMENT_REFUSED = [
    (
        {"queries": torch.randn(2, 3, 4)},
        ValueError,
        r"queries has shape \[2, 3, 4\]; expected \[2, 3, 8\], the B and D of tokens",
    ),
    (
        {"key_weight": torch.randn(8, 3)},
        ValueError,
        r"key_weight has shape \[8, 3\]; expected \[8, 8 / groups\]",
    ),
    (
        {"value_weight": torch.randn(8, 4, 1)},
        ValueError,
        r"value_weight has shape \[8, 4, 1\]; expected 2 dimensions",
    ),
    (
        {"norm_bias": torch.randn(4)},
        ValueError,
        r"norm_bias has shape \[4\]; expected \[8\], one number for each channel",
    ),
    (
        {"key_norm_weight": torch.ones(8, dtype=torch.int64)},
        TypeError,
        "key_norm_weight has dtype int64; expected float32",
    ),
    ({"eps": 0.0}, ValueError, "eps is 0.0; expected a positive number"),
    ({"eps": torch.tensor(1e-5)}, TypeError, "eps is a Tensor; expected a number"),
    (
        {"mask": torch.ones(2, 4, dtype=torch.bool)},
        ValueError,
        r"mask has shape \[2, 4\]; expected \[2, 5\]",
    ),
]

PAIRS = torch.tensor([[0, 2], [1, 2]])
CONTRASTIVE_LOSS = {"image": torch.randn(3, 4), "text": torch.randn(3, 4), "logit_scale": 1.0}
CONTRASTIVE_LOSS_REFUSED = [
    (
        {"image": torch.randn(3)},
        ValueError,
        r"image has shape \[3\]; expected 2 dimensions, \[B, D\]",
    ),
    (
        {"text": torch.randn(3, 5)},
        ValueError,
        r"text has shape \[3, 5\]; expected \[3, 4\], the D of image",
    ),
    (
        {"text": torch.randn(4, 4)},
        ValueError,
        "image and text have 3 and 4 rows; without ids expected as many texts as images",
    ),
    (
        {"text": torch.ones(3, 4, dtype=torch.int64)},
        TypeError,
        "text has dtype int64; expected float32",
    ),
    ({"text": torch.randn(3, 4, device="meta")}, ValueError, "text is on meta and image is on cpu"),
    ({"logit_scale": float("nan")}, ValueError, "logit_scale is nan; expected a finite number"),
    ({"logit_bias": 1.0}, ValueError, "logit_bias was given with kind='softmax'"),
    ({"kind": "hinge"}, ValueError, r"kind is 'hinge'; expected one of \['softmax', 'sigmoid'\]"),
    ({"image_ids": torch.arange(3)}, ValueError, "image_ids and text_ids go together"),
    (
        {"image_ids": torch.arange(2), "text_ids": torch.arange(3)},
        ValueError,
        r"image_ids has shape \[2\]; expected \[3\]",
    ),
    (
        {"image_ids": torch.ones(3), "text_ids": torch.ones(3)},
        TypeError,
        "image_ids has dtype float32; expected int64",
    ),
    (
        {"positives": PAIRS, "image_ids": torch.arange(3), "text_ids": torch.arange(3)},
        ValueError,
        "positives was given with image_ids and text_ids; expected one of the two",
    ),
    (
        {"positive_weights": torch.ones(2)},
        ValueError,
        "positive_weights was given without positives; expected both",
    ),
    (
        {"positives": PAIRS.T.contiguous()[:, [0, 1, 0]]},
        ValueError,
        r"positives has shape \[2, 3\]; expected \[2, 2\], \(image, text\) of each pair",
    ),
    ({"positives": PAIRS.int()}, TypeError, "positives has dtype int32; expected int64"),
    (
        {"positives": PAIRS + torch.tensor([2, 0])},
        ValueError,
        "positives holds image 3; expected 0 or more, below the 3 rows of image",
    ),
    ({"positives": PAIRS - torch.tensor([2, 0])}, ValueError, "positives holds image -2"),
    (
        {"positives": PAIRS + torch.tensor([0, 9])},
        ValueError,
        "positives holds text 11; expected 0 or more, below the 3 rows of text",
    ),
    ({"positives": PAIRS - torch.tensor([0, 3])}, ValueError, "positives holds text -1"),
    (
        {"positives": PAIRS, "positive_weights": torch.ones(3)},
        ValueError,
        r"positive_weights has shape \[3\]; expected \[2\], one weight for each pair",
    ),
    *(
        (
            {"positives": PAIRS, "positive_weights": torch.tensor([1.0, weight])},
            ValueError,
            f"positive_weights holds {name}; expected 0, or 1e-15 to 1e15",
        )
        for weight, name in (
            (-1.0, "-1.0"),
            (float("nan"), "nan"),
            (float("inf"), "inf"),
            (1e-30, r"1\.0\d*e-30"),
            (1e30, r"1\.0\d*e\+30"),
        )
    ),
]

DENSE_CONTRASTIVE_LOSS = {"pixels": torch.randn(3, 5, 4), "texts": torch.randn(3, 4)}
DENSE_CONTRASTIVE_LOSS_REFUSED = [
    (
        {"pixels": torch.randn(3, 4)},
        ValueError,
        r"pixels has shape \[3, 4\]; expected 3 dimensions, \[B, N, D\]",
    ),
    (
        {"texts": torch.randn(3, 5)},
        ValueError,
        r"texts has shape \[3, 5\]; expected \[3, 4\], the D of pixels",
    ),
    (
        {"texts": torch.randn(2, 4)},
        ValueError,
        "pixels has 3 images and texts 2 rows; without ids expected as many texts as images",
    ),
    (
        {"texts": torch.randn(3, 4, device="meta")},
        ValueError,
        "texts is on meta and pixels is on cpu",
    ),
    (
        {"pixels": torch.ones(3, 5, 4, dtype=torch.int32)},
        TypeError,
        "pixels has dtype int32; expected float32",
    ),
    ({"temperature": 0.0}, ValueError, "temperature is 0.0; expected a positive finite number"),
    ({"k_pos": 0}, ValueError, "k_pos is 0; expected an integer of at least 1"),
    ({"k_neg": 2.5}, ValueError, "k_neg is 2.5; expected an integer of at least 1"),
    ({"skip": -1}, ValueError, "skip is -1; expected an integer of at least 0"),
    ({"margin": float("nan")}, ValueError, "margin is nan; expected a positive finite number"),
    ({"margin": torch.tensor(0.1)}, TypeError, "margin is a Tensor; expected a number"),
    (
        {"sampling": "hardest"},
        ValueError,
        r"sampling is 'hardest'; expected one of \['topk', 'semi', 'gumbel', 'random'\]",
    ),
    ({"sampling": "gumbel"}, ValueError, "sampling is 'gumbel' and rng is missing"),
    ({"rng": philox.make_rng(0)}, ValueError, "sampling is 'topk' and rng is given"),
    (
        {"reduction": "sum"},
        ValueError,
        r"reduction is 'sum'; expected one of \['mean_of_log', 'log_of_sum'\]",
    ),
    ({"terms": "all"}, ValueError, "terms is 'all'; expected one of"),
    ({"text_ids": torch.arange(3)}, ValueError, "image_ids and text_ids go together"),
    (
        {"image_ids": torch.arange(2), "text_ids": torch.arange(3)},
        ValueError,
        r"image_ids has shape \[2\]; expected \[3\]",
    ),
]

OFF, BOTH = (
    torch.randn(1, 3, 4, 4),
    torch.randn(1, 3, 4, 4),
)  # a class at -infinity; one that holds infinities of both signs
OFF[:, 1] = -torch.inf
BOTH[0, 2, 0, :2] = torch.tensor([torch.inf, -torch.inf])
UPSAMPLE_ARGMAX = {"logits": torch.randn(1, 3, 4, 4), "size": (8, 8)}
UPSAMPLE_ARGMAX_REFUSED = [
    (
        {"logits": torch.randn(3, 4, 4)},
        ValueError,
        r"logits has shape \[3, 4, 4\]; expected 4 dimensions, \[B, C, h, w\]",
    ),
    (
        {"logits": torch.randn(1, 0, 4, 4)},
        ValueError,
        r"logits has shape \[1, 0, 4, 4\]; expected at least one class and one sample",
    ),
    (
        {"logits": torch.ones(1, 3, 4, 4, dtype=torch.int32)},
        TypeError,
        "logits has dtype int32; expected float32",
    ),
    (
        {"logits": torch.full((1, 3, 4, 4), float("nan"))},
        ValueError,
        "logits or bias holds NaN; expected numbers",
    ),
    (
        {"logits": OFF, "bias": torch.tensor([0, torch.inf, 0])},
        ValueError,
        "logits and bias hold infinities of both signs in one class",
    ),
    (
        {"logits": -OFF, "bias": torch.tensor([0, -torch.inf, 0])},
        ValueError,
        "logits and bias hold infinities of both signs in one class",
    ),
    (
        {"logits": BOTH},
        ValueError,
        "logits and bias hold infinities of both signs in one class; expected one sign in a class "
        "of an image",
    ),
    (
        {"bias": torch.full((3,), float("nan"))},
        ValueError,
        "logits or bias holds NaN; expected numbers",
    ),
    ({"size": (0, 8)}, ValueError, r"size is \(0, 8\); expected two positive integers"),
    ({"size": (8.0, 8)}, ValueError, r"size is \(8.0, 8\); expected two positive integers"),
    ({"size": (8,)}, ValueError, r"size is \(8,\); expected two positive integers"),
    (
        {"bias": torch.randn(4)},
        ValueError,
        r"bias has shape \[4\]; expected \[3\], one number for each class",
    ),
    (
        {"class_labels": torch.arange(4)},
        ValueError,
        r"class_labels has shape \[4\]; expected \[3\], one label for each class",
    ),
    ({"class_labels": torch.ones(3)}, TypeError, "class_labels has dtype float32; expected int64"),
    (
        {"class_labels": torch.tensor([0, 1, 300]), "label_type": torch.uint8},
        ValueError,
        "the largest label is 300; torch.uint8 holds 255",
    ),
    (
        {"class_labels": torch.tensor([0, -1, 3]), "label_type": torch.uint8},
        ValueError,
        "class_labels holds -1; expected 0 to 255",
    ),
    (
        {"logits": torch.randn(1, 257, 2, 2), "label_type": torch.uint8},
        ValueError,
        "the largest label is 256; torch.uint8 holds 255",
    ),
    (
        {"threshold": 0.5, "label_type": torch.uint8},
        ValueError,
        "background is -1; expected 0 to 255, what torch.uint8 holds",
    ),
    ({"threshold": float("nan")}, ValueError, "threshold is nan; expected a finite number"),
    ({"threshold": torch.tensor(0.5)}, TypeError, "threshold is a Tensor; expected a number"),
    ({"label_type": torch.int32}, TypeError, "label_type is torch.int32; expected one of"),
]

ORIGINS = torch.tensor([[0, 0], [0, 4]])
NAN, INFINITE = torch.full((2, 3, 4, 4), float("nan")), torch.full((2, 3, 4, 4), float("inf"))
WINDOW_ARGMAX = {
    "logits": torch.randn(2, 3, 4, 4),
    "origins": ORIGINS,
    "crop": (8, 8),
    "canvas": (8, 12),
    "size": (8, 8),
}
WINDOW_ARGMAX_REFUSED = [
    (
        {"logits": torch.randn(3, 4, 4)},
        ValueError,
        r"logits has shape \[3, 4, 4\]; expected 4 dimensions, \[n, C, h, w\]",
    ),
    (
        {"logits": torch.randn(0, 3, 4, 4)},
        ValueError,
        r"logits has shape \[0, 3, 4, 4\]; expected at least one window",
    ),
    ({"logits": NAN}, ValueError, r"logits holds NaN or \+infinity; expected numbers"),
    ({"logits": INFINITE}, ValueError, r"logits holds NaN or \+infinity; expected numbers"),
    (
        {"logits": -INFINITE, "activation": "softmax"},
        ValueError,
        "logits holds NaN or an infinity; expected finite numbers for softmax",
    ),
    (
        {"bias": torch.full((3,), float("nan"))},
        ValueError,
        r"bias holds NaN or \+infinity; expected numbers",
    ),
    ({"origins": ORIGINS.float()}, TypeError, "origins has dtype float32; expected int64"),
    (
        {"origins": ORIGINS[:1]},
        ValueError,
        r"origins has shape \[1, 2\]; expected \[2, 2\], row and column of each window",
    ),
    (
        {"origins": ORIGINS + 1},
        ValueError,
        r"origins holds \(1, 1\); with a crop of \(8, 8\) expected rows 0 to 0 and columns 0 to 4",
    ),
    (
        {"origins": ORIGINS.tolist()[:1]},
        ValueError,
        r"origins has shape \[1, 2\]; expected \[2, 2\]",
    ),
    (
        {"origins": [(0, 0), (0, 5)]},
        ValueError,
        r"origins holds \(0, 5\); with a crop of \(8, 8\) expected rows 0 to 0",
    ),
    (
        {"origins": [(0, 0), (0,)]},
        TypeError,
        r"origins is a list; expected a tensor \[n, 2\] or a list of pairs of integers",
    ),
    ({"origins": [(0.0, 0.0), (0.0, 4.0)]}, TypeError, "origins has dtype float32; expected int64"),
    (
        {"origins": ORIGINS.to("meta")},
        ValueError,
        "origins is on meta and logits is on cpu; expected the CPU or one device",
    ),
    (
        {"origins": ORIGINS - 1},
        ValueError,
        r"origins holds \(-1, -1\); with a crop of \(8, 8\) expected rows 0 to 0",
    ),
    (
        {"origins": ORIGINS * 0},
        ValueError,
        "origins leaves row 0, column 8 of the canvas without a window; expected every pixel "
        "covered",
    ),
    ({"crop": (8, 0)}, ValueError, r"crop is \(8, 0\); expected two positive integers, \(hc, wc\)"),
    (
        {"crop": (9, 8)},
        ValueError,
        r"crop is \(9, 8\) and canvas is \(8, 12\); expected a crop that fits into the canvas",
    ),
    ({"canvas": 12}, ValueError, r"canvas is 12; expected two positive integers, \(Hc, Wc\)"),
    ({"size": (0, 8)}, ValueError, r"size is \(0, 8\); expected two positive integers"),
    (
        {"activation": "relu"},
        ValueError,
        r"activation is 'relu'; expected one of \['sigmoid', 'softmax'\]",
    ),
    (
        {"stage": "first"},
        ValueError,
        r"stage is 'first'; expected one of \['window', 'merged', 'output'\]",
    ),
    (
        {"tables": torch.randn(2, 4, 5)},
        ValueError,
        r"tables has shape \[2, 4, 5\]; expected \[2, 3, 5\], a row of class scores",
    ),
    (
        {"tables": torch.randn(2, 3, 0)},
        ValueError,
        r"tables has shape \[2, 3, 0\]; expected at least one class",
    ),
    ({"tables": NAN[..., 0]}, ValueError, r"tables holds NaN or \+infinity; expected numbers"),
    (
        {"bias": torch.randn(4)},
        ValueError,
        r"bias has shape \[4\]; expected \[3\], one number for each class",
    ),
    (
        {"class_labels": torch.arange(4)},
        ValueError,
        r"class_labels has shape \[4\]; expected \[3\], one label for each class",
    ),
    ({"threshold": float("nan")}, ValueError, "threshold is nan; expected a finite number"),
    ({"threshold": torch.tensor(0.5)}, TypeError, "threshold is a Tensor; expected a number"),
    ({"label_type": torch.int32}, TypeError, "label_type is torch.int32; expected one of"),
]

LABELS = torch.zeros(2, 8, 8, dtype=torch.int64)
UPSAMPLE_MASK_LOSS = {"logits": torch.randn(2, 3, 4, 4), "labels": LABELS}
UPSAMPLE_MASK_LOSS_REFUSED = [
    (
        {"logits": torch.randn(3, 4, 4)},
        ValueError,
        r"logits has shape \[3, 4, 4\]; expected 4 dimensions, \[B, C, h, w\]",
    ),
    (
        {"logits": torch.randn(2, 0, 4, 4)},
        ValueError,
        r"logits has shape \[2, 0, 4, 4\]; expected at least one class and one sample",
    ),
    (
        {"logits": torch.ones(2, 3, 4, 4, dtype=torch.int32)},
        TypeError,
        "logits has dtype int32; expected float32",
    ),
    ({"labels": LABELS.float()}, TypeError, "labels has dtype float32; expected int64"),
    (
        {"labels": LABELS[0]},
        ValueError,
        r"labels has shape \[8, 8\]; expected 3 dimensions, \[B, H, W\]",
    ),
    (
        {"labels": LABELS[:1]},
        ValueError,
        r"labels has shape \[1, 8, 8\]; expected \[2, H, W\] with at least one pixel",
    ),
    (
        {"labels": LABELS[:, :0]},
        ValueError,
        r"labels has shape \[2, 0, 8\]; expected \[2, H, W\] with at least one pixel",
    ),
    (
        {"labels": LABELS.to("meta")},
        ValueError,
        "labels is on meta and logits is on cpu; expected one device",
    ),
    ({"alpha": 1.5}, ValueError, "alpha is 1.5; expected 0 to 1"),
    ({"alpha": float("nan")}, ValueError, "alpha is nan; expected 0 to 1"),
    ({"alpha": torch.tensor(0.5)}, TypeError, "alpha is a Tensor; expected a number"),
    ({"gamma": torch.tensor(2.0)}, TypeError, "gamma is a Tensor; expected a number"),
    ({"gamma": -1.0}, ValueError, "gamma is -1.0; expected a finite number of at least 0"),
    ({"gamma": float("inf")}, ValueError, "gamma is inf; expected a finite number of at least 0"),
    ({"ignore_index": 255.0}, TypeError, "ignore_index is a float; expected an integer or None"),
    ({"ignore_index": True}, TypeError, "ignore_index is a bool; expected an integer or None"),
    (
        {"ignore_index": 2**70},
        ValueError,
        "ignore_index is 1180591620717411303424; expected an integer of at most "
        "9223372036854775807",
    ),
]

BAD_INPUT = {
    "upsample_mask_loss": (UPSAMPLE_MASK_LOSS, UPSAMPLE_MASK_LOSS_REFUSED),
    "window_argmax": (WINDOW_ARGMAX, WINDOW_ARGMAX_REFUSED),
    "upsample_argmax": (UPSAMPLE_ARGMAX, UPSAMPLE_ARGMAX_REFUSED),
    "patch_text_similarity": (PATCH_TEXT_SIMILARITY, PATCH_TEXT_SIMILARITY_REFUSED),
    "similarity_contrastive_loss": (
        SIMILARITY_CONTRASTIVE_LOSS,
        SIMILARITY_CONTRASTIVE_LOSS_REFUSED,
    ),
    "center_assignment": (CENTER_ASSIGNMENT, CENTER_ASSIGNMENT_REFUSED),
    "folded_center_assignment": (FOLDED_CENTER_ASSIGNMENT, FOLDED_CENTER_ASSIGNMENT_REFUSED),
    "segclip_center_assignment": (SEGCLIP_CENTER_ASSIGNMENT, SEGCLIP_CENTER_ASSIGNMENT_REFUSED),
    "contrastive_loss": (CONTRASTIVE_LOSS, CONTRASTIVE_LOSS_REFUSED),
    "dense_contrastive_loss": (DENSE_CONTRASTIVE_LOSS, DENSE_CONTRASTIVE_LOSS_REFUSED),
}
