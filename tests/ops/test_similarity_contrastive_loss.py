"""What is special about similarity_contrastive_loss: plain InfoNCE, multi-positives, masks, ranks,
bad input.
"""

import math
import os

import pytest
import torch
import torch.distributed as dist
from backends import device_of, parameters, running_on
from ranks import spawn
from torch.nn import functional as F

import ovseg_kernels as ok
from ovseg_kernels.testing import assert_close_to_truth


def test_diagonal_is_symmetric_cross_entropy():
    similarity, target = torch.randn(6, 6), torch.arange(6)
    expected = (
        F.cross_entropy(5 * similarity, target) + F.cross_entropy(5 * similarity.T, target)
    ) / 2
    torch.testing.assert_close(ok.similarity_contrastive_loss(similarity, 5.0), expected)


@pytest.mark.parametrize("backend", parameters(of="similarity_contrastive_loss"))
@pytest.mark.parametrize("B,T", [(1, 1), (7, 7), (33, 65), (196, 257), (3, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sizes(B, T, dtype, backend):
    """Tails of tiles, repeated ids, left-out pairs, rows without a positive, a transposed matrix."""
    device = device_of(backend)
    similarity, scale = torch.randn(T, B).to(device, dtype).T, torch.tensor(3.0, device=device)
    options = {
        "image_ids": torch.randint(0, 9, (B,)).to(device),
        "text_ids": torch.randint(0, 9, (T,)).to(device),
    }
    options["pair_mask"] = (torch.rand(B, T) > 0.2).to(device)
    for kwargs in (options, {}) if B == T else (options,):

        def run(similarity, scale, kwargs=kwargs):
            tensors = similarity.detach().requires_grad_(), scale.detach().requires_grad_()
            loss = ok.similarity_contrastive_loss(*tensors, **kwargs)
            return loss, *torch.autograd.grad(loss, tensors)

        with running_on(backend):
            results = run(similarity, scale)
        with ok.backend("reference"):
            eager, truth = run(similarity, scale), run(similarity.double(), scale.double())
        for name, a, b, c in zip(
            ("loss", "d similarity", "d logit_scale"), results, eager, truth, strict=True
        ):
            assert_close_to_truth(name, a, b, c, dtype)


@pytest.mark.parametrize("backend", parameters(of="similarity_contrastive_loss"))
def test_extremes(backend):
    """Infinite and huge similarities, and a NaN that must stay one."""
    with torch.device(device_of(backend)), running_on(backend):
        similarity = torch.tensor([[5.0, float("-inf")], [1e4, 2.0]])
        expected = (
            F.cross_entropy(similarity, torch.arange(2))
            + F.cross_entropy(similarity.T, torch.arange(2))
        ) / 2
        torch.testing.assert_close(ok.similarity_contrastive_loss(similarity, 1.0), expected)
        similarity[0, 1] = float("nan")
        assert bool(ok.similarity_contrastive_loss(similarity, 1.0).isnan())


def test_equal_ids_are_positives():
    """Two images of one text: the definition by soft targets."""
    similarity = torch.randn(3, 2)
    loss = ok.similarity_contrastive_loss(
        similarity, 2.0, image_ids=torch.tensor([4, 4, 8]), text_ids=torch.tensor([4, 8])
    )
    rows = F.cross_entropy(2 * similarity, torch.tensor([0, 0, 1]))
    columns = F.cross_entropy(2 * similarity.T, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(loss, (rows + columns) / 2)


def test_left_out_pairs_equal_minus_infinity():
    similarity, keep = torch.randn(4, 4), torch.rand(4, 4) > 0.4
    keep.fill_diagonal_(True)
    z, target = (3 * similarity).masked_fill(~keep, float("-inf")), torch.arange(4)
    expected = (F.cross_entropy(z, target) + F.cross_entropy(z.T, target)) / 2
    torch.testing.assert_close(
        ok.similarity_contrastive_loss(similarity, 3.0, pair_mask=keep), expected
    )


def test_no_positive_is_zero_loss_and_zero_gradient():
    similarity = torch.randn(2, 3, requires_grad=True)
    loss = ok.similarity_contrastive_loss(
        similarity, 1.0, image_ids=torch.tensor([0, 1]), text_ids=torch.tensor([5, 6, 7])
    )
    loss.backward()
    assert loss.item() == 0 and torch.equal(similarity.grad, torch.zeros(2, 3))


def test_row_without_any_pair():
    """An image whose every pair is left out takes part in nothing."""
    keep = torch.eye(3, dtype=torch.bool) | (torch.rand(3, 3) > 0.2)
    keep[1], keep[:, 1] = False, False
    similarity = torch.randn(3, 3, requires_grad=True)
    loss = ok.similarity_contrastive_loss(similarity, 2.0, pair_mask=keep)
    loss.backward()
    rest = ok.similarity_contrastive_loss(
        similarity.detach()[[0, 2]][:, [0, 2]], 2.0, pair_mask=keep[[0, 2]][:, [0, 2]]
    )
    torch.testing.assert_close(loss.detach(), rest)
    assert bool(similarity.grad.isfinite().all()) and not bool(similarity.grad[1].any())


def test_doubling_the_batch_adds_log_two():
    similarity = torch.randn(4, 4, dtype=torch.float64)
    once = ok.similarity_contrastive_loss(similarity, 3.0)
    ids = torch.arange(4).repeat(2)
    twice = ok.similarity_contrastive_loss(
        similarity.repeat(2, 2), 3.0, image_ids=ids, text_ids=ids
    )
    torch.testing.assert_close(twice, once + math.log(2))


def test_extreme_logits_stay_finite():
    similarity = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = ok.similarity_contrastive_loss(similarity, 100.0)
    loss.backward()
    assert loss.item() == 0 and bool(similarity.grad.isfinite().all())


def test_nan_gives_nan():
    similarity = torch.randn(3, 3)
    similarity[0, 1] = float("nan")
    assert ok.similarity_contrastive_loss(similarity, 1.0).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_computed_in_float32(dtype):
    similarity = torch.randn(5, 5).to(dtype)
    loss = ok.similarity_contrastive_loss(similarity, 10.0)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, ok.similarity_contrastive_loss(similarity.float(), 10.0))


def test_strides():
    base = torch.randn(6, 5)
    a = ok.similarity_contrastive_loss(base.T[:, :5], 2.0)
    assert torch.equal(a, ok.similarity_contrastive_loss(base.T[:, :5].contiguous(), 2.0))


def test_empty():
    similarity = torch.randn(0, 0, requires_grad=True)
    loss = ok.similarity_contrastive_loss(similarity, 2.0)
    loss.backward()
    assert loss.item() == 0


class _Gather(torch.autograd.Function):
    """All-gather of rows of unequal counts; backward sums what every rank has for this rank's rows."""

    @staticmethod
    def forward(ctx, x, counts):
        ctx.counts = counts
        parts = [x.new_zeros(count, *x.shape[1:]) for count in counts]
        for rank, part in enumerate(parts):
            if rank == dist.get_rank():
                part.copy_(x)
            dist.broadcast(part, rank)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.split(ctx.counts)[dist.get_rank()], None


def _one_rank(rank, ranks, port, counts, ids, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=len(counts))
    torch.set_num_threads(1)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    weight, images, texts = _problem(sum(counts))
    weight, scale = (
        weight.requires_grad_(),
        torch.tensor(4.0, dtype=torch.float64, requires_grad=True),
    )
    gathered = _Gather.apply(texts[mine] @ weight, counts)
    similarity = ok.patch_text_similarity(images[mine] @ weight, gathered)
    options = {}
    if ids:
        labels = torch.arange(sum(counts)) // 2
        options = {"image_ids": labels[mine], "text_ids": labels}
    loss = ok.similarity_contrastive_loss(similarity, scale, group=dist.group.WORLD, **options)
    loss.backward()
    for grad in (weight.grad, scale.grad):  # DDP's mean
        dist.all_reduce(grad)
        grad /= len(counts)
    if rank == 0:
        torch.save((loss.detach(), weight.grad, scale.grad), out)
    dist.barrier()
    dist.destroy_process_group()


def _problem(total):
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(6, 5, generator=g, dtype=torch.float64),
        torch.randn(total, 4, 6, generator=g, dtype=torch.float64),
        torch.randn(total, 6, generator=g, dtype=torch.float64),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "counts,ids",
    [([3, 3], False), ([2, 5], False), ([1, 4, 2], True)],
    ids=["2", "2-uneven", "3-uneven-ids"],
)
def test_ranks_equal_one_process(counts, ids, tmp_path):
    """Whole step, patch similarity included: loss and DDP-averaged gradients against one process,
    in float64.
    """
    spawn(_one_rank, len(counts), counts, ids, tmp_path / "out.pt")
    loss, d_weight, d_scale = torch.load(tmp_path / "out.pt", weights_only=True)
    weight, images, texts = _problem(sum(counts))
    weight, scale = (
        weight.requires_grad_(),
        torch.tensor(4.0, dtype=torch.float64, requires_grad=True),
    )
    labels = torch.arange(sum(counts)) // 2
    expected = ok.similarity_contrastive_loss(
        ok.patch_text_similarity(images @ weight, texts @ weight),
        scale,
        **({"image_ids": labels, "text_ids": labels} if ids else {}),
    )
    expected.backward()
    for a, b in ((loss, expected.detach()), (d_weight, weight.grad), (d_scale, scale.grad)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
