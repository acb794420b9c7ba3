"""What is special about contrastive_loss: the matrix is never there, ids, ranks, parity with
open_clip's losses, bad input.
"""

import os

import pytest
import torch
import torch.distributed as dist
from backends import COMPILED, device_of, dtypes, parameters, running_on
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import spawn
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels import nn as ok_nn
from ovseg_kernels.testing import assert_close_to_truth

on = pytest.mark.parametrize("backend", parameters(of="contrastive_loss"))


def run(image, text, scale, bias=None, **options):
    tensors = [
        x.detach().requires_grad_()
        for x in (image, text, scale) + (() if bias is None else (bias,))
    ]
    loss = ok.contrastive_loss(
        *tensors[:3],
        **options,
        **({} if bias is None else {"logit_bias": tensors[3], "kind": "sigmoid"}),
    )
    return loss, *torch.autograd.grad(loss, tensors)


@on
@pytest.mark.parametrize(
    "B,T,D", [(1, 1, 1), (7, 7, 16), (33, 65, 24), (65, 130, 72), (3, 300, 8), (260, 5, 9)]
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_sizes(B, T, D, kind, backend):
    """Tails of tiles and blocks, repeated ids, rows without a positive."""
    device = device_of(backend)
    inputs = torch.randn(B, D), torch.randn(T, D)
    scale, bias = (
        torch.tensor(8.0, device=device),
        torch.tensor(-3.0, device=device) if kind == "sigmoid" else None,
    )
    ids = {
        "image_ids": torch.randint(0, 9, (B,)).to(device),
        "text_ids": torch.randint(0, 9, (T,)).to(device),
    }
    # What is compiled for each option: the diagonal is called by the contract tests, and rows that
    # 16-byte copies do not serve are multiplied in tf32 there.
    few = backend in COMPILED
    for options in (ids, {}) if B == T and not few else (ids,):
        for dtype in dtypes(backend)[: 1 if few and D % 4 else None]:
            image, text = (x.to(device, dtype) for x in inputs)
            with running_on(backend):
                results = run(image, text, scale, bias, **options)
            with ok.backend("reference"):
                eager = run(image, text, scale, bias, **options)
                truth = run(
                    image.double(),
                    text.double(),
                    scale.double(),
                    None if bias is None else bias.double(),
                    **options,
                )
            if (
                dtype.itemsize == 2 and bias is not None
            ):  # d bias: B T roundings of tf32 whose sum cancels; no relative error
                (*results, found), (*eager, _), (*truth, d_bias) = results, eager, truth
                assert abs(float(found - d_bias)) <= 1e-3 * max(1.0, abs(float(d_bias)))
            for i, (a, b, c) in enumerate(zip(results, eager, truth, strict=True)):
                assert_close_to_truth(f"tensor {i}", a, b, c, dtype)


@on
def test_diagonal_is_symmetric_cross_entropy(backend):
    with torch.device(device_of(backend)), running_on(backend):
        a, t = F.normalize(torch.randn(20, 6), dim=-1), F.normalize(torch.randn(20, 6), dim=-1)
        z, target = 12 * a @ t.T, torch.arange(20)
        expected = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
        torch.testing.assert_close(ok.contrastive_loss(a, t, 12.0, normalize=False), expected)
        torch.testing.assert_close(ok.contrastive_loss(3 * a, 0.1 * t, 12.0), expected)


@on
def test_equals_the_loss_on_the_matrix(backend):
    with torch.device(device_of(backend)), running_on(backend):
        a, t = torch.randn(9, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
        ids = {"image_ids": torch.randint(0, 5, (9,)), "text_ids": torch.randint(0, 5, (11,))}
        similarity = F.normalize(a, dim=-1) @ F.normalize(t, dim=-1).T
        torch.testing.assert_close(
            ok.contrastive_loss(a, t, 4.0, **ids),
            ok.similarity_contrastive_loss(similarity, 4.0, **ids),
        )


@on
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_extremes(kind, backend):
    """Logits beyond the range of exp, equal features, and a NaN that must stay one."""
    with torch.device(device_of(backend)), running_on(backend):
        a = F.normalize(torch.randn(70, 4), dim=-1)
        for scale in (1e4, 0.0):
            loss, *grads = run(
                a, -a, torch.tensor(scale), torch.tensor(0.0) if kind == "sigmoid" else None
            )
            with ok.backend("reference"):
                wide = a.double(), -a.double(), torch.tensor(scale).double()
                expected = run(*wide, torch.tensor(0.0).double() if kind == "sigmoid" else None)
            torch.testing.assert_close(loss, expected[0].float(), rtol=1e-5, atol=1e-5)
            assert all(bool(g.isfinite().all()) for g in grads)
        a[3] = float("nan")
        assert bool(ok.contrastive_loss(a, a, 1.0, kind=kind).isnan())


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(1, 6),
    st.floats(0, 100),
    st.integers(0, 2**31),
)
def test_any_ids(B, T, classes, scale, seed):
    """Against soft targets written out, whatever the ids."""
    g = torch.Generator().manual_seed(seed)
    a, t = (
        F.normalize(torch.randn(n, 3, generator=g, dtype=torch.float64), dim=-1) for n in (B, T)
    )
    ids = torch.randint(0, classes, (B,), generator=g), torch.randint(0, classes, (T,), generator=g)
    found = ok.contrastive_loss(a, t, scale, image_ids=ids[0], text_ids=ids[1], normalize=False)
    z, equal = scale * a @ t.T, (ids[0][:, None] == ids[1]).double()
    expected = torch.zeros((), dtype=torch.float64)
    for logits, target in ((z, equal), (z.T, equal.T)):
        some = target.sum(1) > 0
        if bool(some.any()):
            expected += (
                F.cross_entropy(logits[some], target[some] / target[some].sum(1, keepdim=True)) / 2
            )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
@pytest.mark.parametrize("copied", [True, False])
def test_blocks_of_the_matrix_give_the_same(copied, kind, monkeypatch):
    """Three launches of statistics and nine blocks of coefficients, the last ones with a tail, by
    descriptors and by addresses; the columns of a block are those of one tile.
    """
    pytest.importorskip("triton")
    from ovseg_kernels.triton import contrastive_loss as launcher

    image, text, scale = torch.randn(150, 12), torch.randn(170, 12), torch.tensor(6.0)
    bias = torch.tensor(-2.0) if kind == "sigmoid" else None
    ids = {"image_ids": torch.arange(150) % 40, "text_ids": torch.arange(170) % 50}
    with running_on("triton-interpreted"):
        expected = run(image, text, scale, bias, **ids)
        monkeypatch.setattr(launcher, "ROWS", 64)
        monkeypatch.setattr(launcher, "BLOCK_BYTES", 64 * 64 * 4)
        monkeypatch.setattr(launcher, "capability", lambda x: 90 if copied else 80)
        found = run(image, text, scale, bias, **ids)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_16_bit_rows_stay_what_they_are(copied, normalize, monkeypatch):
    """Rows of any length that float16 has, one of zeros, and gradients far below its range."""
    pytest.importorskip("triton")
    from ovseg_kernels.triton import contrastive_loss as launcher

    monkeypatch.setattr(launcher, "capability", lambda x: 90 if copied else 80)
    image, text = torch.randn(40, 9), torch.randn(30, 9)
    if normalize:
        image *= torch.logspace(-4, 4, 40)[:, None]
        text[3] = 0
    image, text = image.half(), text.half()
    number = torch.tensor(5.0), torch.tensor(0.0)
    nothing = (None, None, None)
    options = (2, False, False, normalize)
    wide = [x.double().requires_grad_() for x in (image, text)]
    unit = [F.normalize(x, dim=1, eps=1e-12) if normalize else x for x in wide]
    z = 5.0 * unit[0] @ unit[1].T
    rows = torch.arange(40)[:28]
    weight = torch.zeros(40, dtype=torch.float64).index_fill(0, rows, 1e-9)
    loss = (weight[:28] * (z.logsumexp(1)[:28] - z[rows, rows + 2])).sum()
    expected = torch.autograd.grad(loss, wide)
    for backend in ("reference", "triton-interpreted"):
        with running_on(backend):
            inputs = (image, text, *number, *nothing)
            found = torch.ops.ovseg.contrastive_stats(*inputs, *options)
            torch.testing.assert_close(found[0][0].double(), z.logsumexp(1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[1][0].double(), z.logsumexp(0), rtol=1e-5, atol=1e-5)
            saved = *found, weight.float(), torch.zeros(30)
            # Scaled as a loss is in 16 bits, so that the gradients are numbers of float16.
            grad = torch.tensor(1e9 if normalize else 1e8)
            found = torch.ops.ovseg.contrastive_loss_backward(
                grad, *inputs, *saved, *options, True, True
            )
        for a, b in zip(found, expected, strict=False):
            assert a.dtype == torch.float16
            b = (b * float(grad)).half().double()  # where a row of zeros has infinities
            some = b.isfinite().all(1) & (b.norm(dim=1) > 1e-2)
            error = (a.double() - b).norm(dim=1) / b.norm(dim=1)
            assert float(error[some].max()) < 4e-3 and int(some.sum()) > 10


@on
@pytest.mark.parametrize("B,T", [(0, 0), (0, 3), (3, 0)])
def test_empty(B, T, backend):
    with torch.device(device_of(backend)), running_on(backend):
        ids = {
            "image_ids": torch.zeros(B, dtype=torch.int64),
            "text_ids": torch.zeros(T, dtype=torch.int64),
        }
        for bias in (None, torch.tensor(1.0)):
            loss, *grads = run(torch.randn(B, 4), torch.randn(T, 4), torch.tensor(2.0), bias, **ids)
            assert float(loss.detach()) == 0 and all(bool((g == 0).all()) for g in grads)


def test_nothing_of_size_BT_is_kept():
    image, text = torch.randn(300, 4, requires_grad=True), torch.randn(300, 4, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        ok.contrastive_loss(image, text, 3.0)
    assert max(kept) <= 300 * 4


def join(rank, ranks, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks)
    torch.set_num_threads(1)


def leave():
    """Without the end of the interpreter, in which a thread of gloo that still holds a tensor
    aborts the process now and then.
    """
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)


def problem(total):
    g = torch.Generator().manual_seed(3)
    return [
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((6, 5), (total, 6), (total, 6))
    ]


def _one_rank(rank, ranks, port, counts, kind, out):
    join(rank, ranks, port)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    weight, images, texts = problem(sum(counts))
    leaves = [weight.requires_grad_(), torch.tensor(4.0, dtype=torch.float64, requires_grad=True)]
    loss = whole_loss(leaves, images[mine], texts[mine], kind, mine, group=dist.group.WORLD)
    loss.backward()
    for leaf in leaves:  # DDP's mean
        dist.all_reduce(leaf.grad)
        leaf.grad /= ranks
    torch.save((loss.detach(), *(leaf.grad for leaf in leaves)), out / f"{rank}.pt")
    leave()


def whole_loss(leaves, images, texts, kind, mine, **options):
    weight, scale = leaves
    if kind == "ids":
        ids = torch.arange(20)[mine] // 2
        options |= {"image_ids": ids, "text_ids": ids}
    if kind.startswith("list"):  # a third of the images has no positive, and some pairs two entries
        pairs = torch.tensor([[i, j] for i in range(mine.start, mine.stop) for j in (0, i, 5 - i)])
        pairs = pairs[(pairs[:, 0] % 3 > 0) & (pairs[:, 1] >= 0)]
        options["positive_weights"] = (pairs.sum(1) % 4 / 3).double()
        options["positives"] = pairs - torch.tensor([mine.start, 0])
    if kind.endswith("sigmoid"):
        options |= {"kind": "sigmoid", "logit_bias": scale - 6}
    return ok.contrastive_loss(images @ weight, texts @ weight, scale, **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts,kind",
    [
        ([3, 3], "softmax"),
        ([2, 5], "softmax"),
        ([1, 4, 2], "ids"),
        ([1, 4, 2], "sigmoid"),
        ([1, 4, 2], "list"),
        ([2, 5], "list sigmoid"),
    ],
)
def test_ranks_equal_one_process(counts, kind, tmp_path):
    """Loss on every rank and DDP-averaged gradients against one process, in float64."""
    spawn(_one_rank, len(counts), counts, kind, tmp_path)
    weight, images, texts = problem(sum(counts))
    leaves = [weight.requires_grad_(), torch.tensor(4.0, dtype=torch.float64, requires_grad=True)]
    expected = whole_loss(leaves, images, texts, kind, slice(0, sum(counts)))
    expected.backward()
    for rank in range(len(counts)):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for a, b in zip(found, (expected.detach(), *(leaf.grad for leaf in leaves)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def _ranks_that_disagree(rank, ranks, port):
    join(rank, ranks, port)
    image, ids = torch.randn(3, 4), {"image_ids": torch.arange(3), "text_ids": torch.arange(3)}
    wide = torch.randn(3, 4 + rank)
    for mine in ({"text": image, **(ids if rank else {})}, {"image": wide, "text": wide}):
        with pytest.raises(
            ValueError, match=r"of the ranks are .* expected the last three to agree"
        ):
            ok.contrastive_loss(
                **{"image": image, "logit_scale": 1.0, **mine}, group=dist.group.WORLD
            )
    listed = {"positives": torch.tensor([[0, 1], [2, 6 * rank]])}
    with pytest.raises(
        ValueError, match="positives of rank 1 holds text 6; expected 0 or more, below the 6 rows"
    ):
        ok.contrastive_loss(image, image, 1.0, **listed, group=dist.group.WORLD)
    mixed = ids if rank else {"positives": torch.zeros(0, 2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"expected the last three to agree"):
        ok.contrastive_loss(image, image, 1.0, **mixed, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="image and text have 3 and 3, 3 and 4 rows"):
        ok.contrastive_loss(image, torch.randn(3 + rank, 4), 1.0, group=dist.group.WORLD)
    leave()


@pytest.mark.slow
def test_ranks_that_disagree_all_raise():
    """None waits for one that has raised."""
    spawn(_ranks_that_disagree, 2)


MODES = [
    {"local_loss": local, "gather_with_grad": grad}
    for local in (False, True)
    for grad in (False, True)
]


def losses(rank, ranks):
    """(ours, open_clip's) for every mode."""
    import open_clip.loss

    at = {"rank": rank, "world_size": ranks}
    found = [
        (ok_nn.ClipLoss(**mode, **at), open_clip.loss.ClipLoss(**mode, **at)) for mode in MODES
    ]
    ways = (None, "bidir", "shift", "gather")
    return found + [
        (ok_nn.SigLipLoss(**at, dist_impl=way), open_clip.loss.SigLipLoss(**at, dist_impl=way))
        for way in ways
    ]


def step(loss, image, text, sigmoid):
    leaves = [
        x.clone().requires_grad_() for x in (image, text, torch.tensor(9.0), torch.tensor(-4.0))
    ][: 4 if sigmoid else 3]
    value = loss(*leaves, output_dict=True)["contrastive_loss"]
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_parity(rank, ranks):
    images, texts = (F.normalize(x.float()[:, :5], dim=-1) for x in problem(6 * ranks)[1:])
    mine = slice(6 * rank, 6 * rank + 6)
    for ours, theirs in losses(rank, ranks):
        sigmoid = isinstance(ours, ok_nn.SigLipLoss)
        found, expected = (
            step(loss, images[mine], texts[mine], sigmoid) for loss in (ours, theirs)
        )
        for place, (a, b) in enumerate(zip(found, expected, strict=True)):
            if place > 2 and ranks > 1:  # of the scalars, DDP's mean is the same
                for x in (a, b):
                    dist.all_reduce(x)
            torch.testing.assert_close(
                a,
                b,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda m, ours=ours, place=place: f"{ours} {place}: {m}",
            )


def _parity_of_a_rank(rank, ranks, port):
    join(rank, ranks, port)
    assert_parity(rank, ranks)
    leave()


def test_parity_with_open_clip():
    assert_parity(0, 1)


@pytest.mark.slow
def test_parity_with_open_clip_on_two_ranks():
    """Every mode of ClipLoss, every way of SigLipLoss: the value and the gradients of the features
    rank by rank.
    """
    spawn(_parity_of_a_rank, 2)


def test_modules_check_their_arguments():
    with pytest.raises(ValueError, match="use_horovod is True; expected False"):
        ok_nn.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match=r"dist_impl is 'ring'; expected one of"):
        ok_nn.SigLipLoss(dist_impl="ring")
    with pytest.raises(
        RuntimeError, match=r"world_size is 2 and torch\.distributed is not initialised"
    ):
        ok_nn.ClipLoss(world_size=2)(torch.randn(2, 3), torch.randn(2, 3), 1.0)
