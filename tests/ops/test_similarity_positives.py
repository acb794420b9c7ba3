"""Positives of similarity_contrastive_loss given as a matrix: booleans and weights, on one rank and
on several.
"""

import math
import os

import pytest
import torch
import torch.distributed as dist
from backends import COMPILED, device_of, exact, parameters, running_on
from ranks import spawn

import ovseg_kernels as ok
from ovseg_kernels import _checking
from ovseg_kernels.testing import assert_close_to_truth

everywhere = pytest.mark.parametrize("backend", parameters(of="similarity_contrastive_loss"))


def matrix(B, T, dtype=torch.float32, seed=0):
    """Similarities, and weights with a row and a column of zeros where there are several."""
    g = torch.Generator().manual_seed(seed)
    similarity = torch.randn(B, T, generator=g, dtype=torch.float64)
    weights = torch.rand(B, T, generator=g, dtype=torch.float64)
    weights *= torch.rand(B, T, generator=g) > 0.4
    if B > 1:
        weights[B // 2] = 0
    if T > 1:
        weights[:, T // 3] = 0
    return similarity.to(dtype), weights.to(dtype)


def run(similarity, scale, **options):
    """(loss, d similarity, d logit_scale)."""
    tensors = similarity.detach().requires_grad_(), scale.detach().requires_grad_()
    loss = ok.similarity_contrastive_loss(*tensors, **options)
    return loss.detach(), *torch.autograd.grad(loss, tensors)


def same_bits(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def by_hand(similarity, scale, weights, keep):
    """Equations (1)-(3), one pair after the other."""
    B, T = similarity.shape

    def mean_of(lines):
        losses = []
        for line in lines:
            pairs = [(scale * float(similarity[i, j]), float(weights[i, j])) for i, j in line]
            total = sum(p for _, p in pairs)
            if total > 0:
                lse = math.log(sum(math.exp(z) for z, _ in pairs))
                losses.append(lse - sum(p * z for z, p in pairs) / total)
        return sum(losses) / len(losses) if losses else 0.0

    rows = [[(i, j) for j in range(T) if keep[i, j]] for i in range(B)]
    columns = [[(i, j) for i in range(B) if keep[i, j]] for j in range(T)]
    return (mean_of(rows) + mean_of(columns)) / 2


@pytest.mark.parametrize("B,T", [(1, 1), (1, 6), (6, 1), (5, 9)])
def test_the_definition_is_what_it_says(B, T):
    similarity, weights = matrix(B, T, torch.float64)
    keep = torch.rand(B, T, generator=torch.Generator().manual_seed(1)) > 0.3
    whole = torch.ones(B, T, dtype=torch.bool)
    for given in (weights, weights > 0):
        for mask, options in ((whole, {}), (keep, {"pair_mask": keep})):
            expected = by_hand(similarity, 3.0, given.double(), mask)
            for backend in ("reference", "cpu"):
                with ok.backend(backend):
                    loss = ok.similarity_contrastive_loss(
                        similarity, 3.0, positives=given, **options
                    )
                assert float(loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@everywhere
@pytest.mark.parametrize("B,T", [(1, 1), (1, 40), (40, 1), (3, 157), (33, 70)])
def test_sizes(B, T, backend):
    """Tails of tiles, rows and columns without a positive, and every way that weights may lie."""
    device = device_of(backend)
    similarity, weights = (x.to(device) for x in matrix(B, T))
    scale = torch.tensor(3.0, device=device)
    twice = torch.stack([weights, weights], -1)
    ways = (weights, weights.T.contiguous().T, twice[..., 0], weights > 0)
    for place, given in enumerate(ways[:1] if backend in COMPILED else ways):
        with running_on(backend):
            results = run(similarity, scale, positives=given)
        with ok.backend("reference"):
            eager = run(similarity, scale, positives=given)
            truth = run(similarity.double(), scale.double(), positives=given)
        names = ("loss", "d similarity", "d logit_scale")
        for name, a, b, c in zip(names, results, eager, truth, strict=True):
            assert_close_to_truth(f"{name}, way {place}", a, b, c, torch.float32)


@everywhere
def test_equal_ids_and_their_matrix_give_the_same_bits(backend):
    device, g = device_of(backend), torch.Generator().manual_seed(4)
    image_ids = torch.randint(0, 9, (19,), generator=g).to(device)
    text_ids = torch.randint(0, 12, (157,), generator=g).to(device)
    keep = (torch.rand(19, 157, generator=g) > 0.2).to(device)
    equal = image_ids[:, None] == text_ids
    for dtype in exact(backend):
        similarity = torch.randn(19, 157, generator=g).to(device, dtype)
        scale = torch.tensor(7.0, dtype=dtype, device=device)
        for mask in (None, keep):
            with running_on(backend):
                expected = run(
                    similarity, scale, image_ids=image_ids, text_ids=text_ids, pair_mask=mask
                )
                found = run(similarity, scale, positives=equal, pair_mask=mask)
            assert same_bits(found, expected)


@everywhere
def test_left_out_pairs_are_no_positives(backend):
    """And a row whose only positive is left out takes part in nothing; left-out numbers are not
    read.
    """
    device = device_of(backend)
    similarity, weights = (x.to(device) for x in matrix(6, 8))
    keep = torch.ones(6, 8, dtype=torch.bool, device=device)
    keep[0], keep[2, 3:6], keep[:, 7] = False, False, False
    scale = torch.tensor(2.0, device=device)
    with running_on(backend):
        loss, grad, _ = run(similarity, scale, positives=weights, pair_mask=keep)
        poisoned = similarity.masked_fill(~keep, float("nan"))
        again = run(poisoned, scale, positives=weights.masked_fill(~keep, 1e30), pair_mask=keep)
    truth = by_hand(similarity, 2.0, weights, keep)
    assert float(loss) == pytest.approx(truth, rel=1e-5)
    assert not bool(grad[~keep].any())
    assert same_bits(again[:2], (loss, grad))


@everywhere
def test_a_weight_of_zero_hides_an_infinite_logit(backend):
    """Zero times infinity is NaN."""
    with torch.device(device_of(backend)), running_on(backend):
        similarity = torch.tensor([[2.0, float("-inf"), 1.0], [0.0, 1.0, 3.0]])
        weights = torch.tensor([[0.5, 0.0, 0.25], [0.0, 1.0, 1.0]])
        loss, grad, _ = run(similarity, torch.tensor(1.0), positives=weights)
        assert bool(loss.isfinite()) and bool(grad.isfinite().all())


@everywhere
def test_weights_know_no_unit(backend):
    """What counts is their share: all of them times a power of two change no bit."""
    device = device_of(backend)
    similarity, weights = (x.to(device) for x in matrix(9, 21))
    scale = torch.tensor(4.0, device=device)
    with running_on(backend):
        expected = run(similarity, scale, positives=weights)
        for factor in (2.0**-40, 2.0**20):
            assert same_bits(run(similarity, scale, positives=factor * weights), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_every_dtype(dtype):
    """They become the dtype of the sums, whatever that of the similarities."""
    similarity, weights = matrix(7, 9)
    weights = (4 * weights).round()  # exact in 16 bits
    for of in (torch.float32, torch.float16, torch.float64):
        scale = torch.tensor(3.0, dtype=of)
        found = run(similarity.to(of), scale, positives=weights.to(dtype))
        assert same_bits(found, run(similarity.to(of), scale, positives=weights))


def test_weights_get_no_gradient():
    similarity, weights = matrix(4, 5)
    weights.requires_grad_()
    for backend in ("cpu", "reference"):
        with ok.backend(backend):
            loss = ok.similarity_contrastive_loss(
                similarity.requires_grad_(), 2.0, positives=weights
            )
        (found,) = torch.autograd.grad(loss, weights, allow_unused=True)
        assert found is None


@everywhere
def test_nothing_positive_is_a_loss_of_zero(backend):
    device = device_of(backend)
    scale = torch.tensor(2.0, device=device)
    with running_on(backend):
        for B, T in ((3, 5), (0, 4), (4, 0)):
            for dtype in (torch.bool, torch.float32):
                positives = torch.zeros(B, T, dtype=dtype, device=device)
                loss, *grads = run(torch.randn(B, T, device=device), scale, positives=positives)
                assert loss.item() == 0 and not any(bool(grad.any()) for grad in grads)


@everywhere
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_arrive_where_they_are_not_looked_at(backend, value, monkeypatch):
    """As on a GPU, and while a call is compiled: never a loss that looks right."""
    device = device_of(backend)
    similarity, weights = (x.to(device) for x in matrix(4, 5))
    weights[2, 1] = value
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    with running_on(backend):
        loss, grad, _ = run(similarity, torch.tensor(1.0, device=device), positives=weights)
    assert bool(loss.isnan()) and bool(grad.isnan().any())


def test_no_matrix_is_made_of_booleans():
    """Forward and backward of a bool, however it lies, allocate the gradient and nothing else of
    its size.
    """
    B, T = 300, 500
    similarity, scale = torch.randn(B, T).requires_grad_(), torch.tensor(2.0, requires_grad=True)
    positives = torch.rand(B, T) > 0.9
    for given in (positives, positives.T.contiguous().T):
        with torch.profiler.profile(profile_memory=True) as profile:
            loss = ok.similarity_contrastive_loss(similarity, scale, positives=given)
            torch.autograd.grad(loss, (similarity, scale))
        events = profile.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == "[memory]"]
        assert [size for size in sizes if size >= B * T] == [B * T * 4]


def test_direct_calls_are_checked():
    """The schemas are public too: no size leads out of a tensor."""
    similarity, scale, ids = torch.randn(3, 4), torch.tensor(1.0), torch.arange(4)
    call = torch.ops.ovseg.similarity_contrastive_stats
    for arguments, message in (
        ((None, None, None, torch.ones(3, 3)), "positives has size 3 in dimension 1; expected 4"),
        ((None, None, None, torch.ones(3, 4).double()), "positives has another dtype"),
        ((ids[:3], ids, None, torch.ones(3, 4)), "positives take the place of image_ids"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(similarity, scale, *arguments, 0)


# Ranks: a linear image tower and a linear text tower with one weight, in float64.


def problem(total, words):
    g = torch.Generator().manual_seed(3)
    towers = torch.randn(6, 5, generator=g, dtype=torch.float64)
    images = torch.randn(total, 6, generator=g, dtype=torch.float64)
    texts = torch.randn(words, 6, generator=g, dtype=torch.float64)
    weights = torch.rand(total, words, generator=g, dtype=torch.float64)
    weights *= torch.rand(total, words, generator=g) > 0.5
    weights[0] = 0
    weights[:, 1] = 0
    keep = torch.rand(total, words, generator=g) > 0.2
    return towers, images, texts, weights, keep


CASES = {
    "bool": lambda weights, keep: {"positives": weights > 0},
    "weights": lambda weights, keep: {"positives": weights},
    "weights, left-out pairs": lambda weights, keep: {"positives": weights, "pair_mask": keep},
}


def step(mine, problem, options, counts=None, gathered=False):
    """(loss, gradients) of the images ``mine``, averaged over the ranks where there are several."""
    towers, images, texts, weights, keep = problem
    leaves = towers.clone().requires_grad_(), torch.tensor(2.0).double().requires_grad_()
    texts = texts[mine] if gathered else texts  # of this rank, or a vocabulary that all have
    features = texts @ leaves[0]
    if gathered:
        features = ok.distributed.gather_rows(features, dist.group.WORLD)
    group = None if counts is None else dist.group.WORLD
    given = {name: x[mine] for name, x in options(weights, keep).items()}
    loss = ok.similarity_contrastive_loss(
        (images[mine] @ leaves[0]).tanh() @ features.tanh().T, leaves[1], group=group, **given
    )
    grads = torch.autograd.grad(loss, leaves)
    if counts is not None:
        for grad in grads:  # DDP's mean
            dist.all_reduce(grad)
            grad /= len(counts)
    return loss.detach(), *grads


def _one_rank(rank, ranks, port, counts, out):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=len(counts))
    torch.set_num_threads(1)
    total = sum(counts)
    mine = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    found = {}
    for name, options in CASES.items():
        found[name, "gathered"] = step(mine, problem(total, total), options, counts, True)
        found[name, "vocabulary"] = step(mine, problem(total, 11), options, counts)
    torch.save(found, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("counts", [(2, 5), (4, 0, 3)], ids=["2-uneven", "3-uneven-one-empty"])
def test_ranks_equal_one_process(counts, tmp_path):
    """Texts gathered from all ranks, and a vocabulary that every rank has: the loss on every rank
    and the parameters' gradients are those of one process.
    """
    spawn(_one_rank, len(counts), counts, tmp_path)
    total = sum(counts)
    for rank in range(len(counts)):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, options in CASES.items():
            for texts, words in (("gathered", total), ("vocabulary", 11)):
                expected = step(slice(None), problem(total, words), options)
                assert float(expected[0]) > 0.1
                for a, b in zip(found[name, texts], expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
