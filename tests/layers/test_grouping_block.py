"""The grouping block against the tensors of the published one, and texts that are packed."""

from pathlib import Path

import numpy as np
import pytest
import torch

import ovseg_kernels as ok
from ovseg.nn.grouping import CrossBlock, GroupingBlock
from ovseg.nn.vit_blocks import Packing

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN / "groupvit_assign.npz") as file:
        return {
            name: torch.from_numpy(file[name])
            for name in file.files
            if file[name].dtype.kind != "U"
        }


def close(found, expected, tolerance):
    """Largest difference over the largest value."""
    error = float((found.detach() - expected).abs().max() / expected.abs().max().detach())
    assert error <= tolerance, f"{error:.2e}"


def build(golden, case, groups):
    block = GroupingBlock(48, 4, 64, groups, 24, 192)
    weights = f"{case}/weights/"
    block.load_state_dict(
        {name.removeprefix(weights): x for name, x in golden.items() if name.startswith(weights)}
    )
    return block


OPTIONS = {
    "eval": {},
    "eval_soft": {"hard": False},
    "train": {},
    "train_tau05": {"tau": 0.5},
    "train_sum": {"normalizer": "sum"},
    "train_soft": {"hard": False},
}
CASES = [("g8", 8, kind) for kind in OPTIONS] + [
    ("g64", 64, kind) for kind in ("eval", "train", "train_tau05")
]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("case,groups,kind", CASES)
def test_outputs_and_gradients(golden, case, groups, kind, backend):
    block = build(golden, case, groups)
    x, t = (golden[f"{case}/in/{name}"].clone().requires_grad_() for name in "xt")
    noise = golden[f"{case}/in/noise"][:, 0] if kind.startswith("train") else None
    with ok.backend(backend):
        found = block(x, t, noise, **OPTIONS[kind])
        found.tokens.backward(golden[f"{case}/in/dout"])
    expected = {
        name: golden.get(f"{case}/out/{kind}/{name}")
        for name in ("out", "dx", "dt", "hard_idx", "soft", "q", "counts")
    }
    for name, tensor in (("out", found.tokens), ("dx", x.grad), ("dt", t.grad)):
        close(tensor, expected[name], 5e-6)
    if expected["hard_idx"] is not None:
        assert torch.equal(found.index, expected["hard_idx"].long())
        counts = torch.zeros(2, groups).scatter_add(1, found.index, torch.ones(found.index.shape))
        assert torch.equal(counts, expected["counts"].float())
    if kind == "eval":
        close(found.soft, expected["soft"][:, 0], 5e-6)
        close(found.queries, expected["q"][:, 0], 5e-6)
        centers, normed = block.centers(x, t)
        close(centers, golden[f"{case}/out/eval/assign_query"], 5e-6)
        close(normed, golden[f"{case}/out/eval/assign_key"], 5e-6)
        keys = golden[f"{case}/out/eval/k"][:, 0]
        close(
            block.scores(found.queries, normed),
            found.queries @ keys.transpose(1, 2) * 48**-0.5,
            5e-6,
        )
    if kind == "train":
        own, seen = dict(block.named_parameters()), 0
        for name, gradient in golden.items():
            if name.startswith(f"{case}/out/train/grad/"):
                close(own[name.rpartition("/")[2]].grad, gradient, 5e-6)
                seen += 1
        assert seen > 10


def test_noise_drawn_by_the_operator_is_another_each_time(golden):
    block, x, t = build(golden, "g8", 8), golden["g8/in/x"], golden["g8/in/t"]
    first, again, other = (block(x, t, torch.tensor([seed, 0])).index for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("queries,keys", [(3, 40), (40, 3)])
def test_the_projections_fold_exactly(queries, keys):
    """Few queries: folded; many: not. Both are the same attention."""
    torch.manual_seed(0)
    block = CrossBlock(32, 4, 64).double()
    x, y = (
        torch.randn(2, queries, 32, dtype=torch.float64),
        torch.randn(2, keys, 32, dtype=torch.float64),
    )
    q, k, v = (
        layer(z).unflatten(2, (4, 8)).transpose(1, 2)
        for layer, z in ((block.attn.q_proj, x), (block.attn.k_proj, y), (block.attn.v_proj, y))
    )
    o = ((q @ k.transpose(2, 3) * 8**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    mid = x + block.attn.proj(o)
    expected, called = block.norm_post(mid + block.mlp(block.norm2(mid))), []
    block.attn.k_proj.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(block(x, y), expected)
    assert bool(called) == (queries > keys)


@pytest.mark.parametrize("pads", [False, True])
def test_packing_and_its_parts(pads):
    keep = torch.arange(6) < torch.tensor([3, 1, 5, 0, 2])[:, None]
    x = torch.arange(5 * 6).view(5, 6, 1).float()
    packing = Packing(keep, pads)
    L = 6 if pads else 5
    assert packing.shape == (5, L) and packing.seen.shape == (5, L)
    tokens = packing.take(x[:, :L])
    assert len(tokens) == (
        30 if pads else 3 + 1 + 5 + 1 + 2
    )  # a text without tokens is its first place
    back = packing.pad(tokens)
    assert torch.equal(back[packing.seen], x[:, :L][packing.seen]) and (
        pads or not back[~packing.seen].any()
    )
    assert torch.equal(tokens[packing.starts][:, 0], x[:, 0, 0])
    assert torch.equal(packing.positions, (tokens[:, 0] % 6).long())
    for part, rows, texts in zip(
        packing.split([2, 0, 3]),
        tokens.split([12, 0, 18] if pads else [4, 0, 8]),
        (x[:2], x[:0], x[2:]),
        strict=True,
    ):
        assert torch.equal(part.pad(rows)[part.seen], texts[:, :L][part.seen])
        assert torch.equal(rows[part.starts], texts[:, 0])
