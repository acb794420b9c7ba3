"""The emulation tested by itself: what it runs is right, and what it must catch it catches."""

import emulation
import pytest
import torch


@pytest.fixture
def machine():
    module = emulation.load()
    module.set_seed(0)
    yield module
    module.release_all()


def buffer(*shape, dtype=torch.float32):
    """Guarded memory full of NaN."""
    count = torch.Size(shape).numel()
    bytes_each = torch.empty((), dtype=dtype).element_size()
    return torch.from_numpy(emulation.load().allocate(count * bytes_each)).view(dtype).view(shape)


def test_barrier(machine):
    x = torch.randn(5, 128)
    y = buffer(5, 128)
    machine.reverse(x.data_ptr(), y.data_ptr(), 5, True)
    assert torch.equal(y, x.flip(1))


def test_a_missing_barrier_is_seen(machine):
    """Not in every order of the threads, but in every one of these twenty."""
    wrong = 0
    for seed in range(20):
        machine.set_seed(seed)
        x, y = torch.randn(1, 128), buffer(1, 128)
        machine.reverse(x.data_ptr(), y.data_ptr(), 1, False)
        wrong += not torch.equal(y, x.flip(1))
    assert wrong == 20


def test_a_race_is_seen(machine):
    x, right, found = torch.arange(128.0), [], set()
    for seed in range(10):
        machine.set_seed(seed)
        y, racy = buffer(1), buffer(1)
        machine.tree(x.data_ptr(), y.data_ptr(), False)
        machine.tree(x.data_ptr(), racy.data_ptr(), True)
        right.append(float(y))
        found.add(float(racy))
    assert right == [float(x.sum())] * 10
    assert len(found) > 5, (
        "an update in place, read by neighbours, must depend on the order of the threads"
    )


def test_shuffles_votes_and_atomics(machine):
    x, y, counts = torch.randn(128), buffer(4, 7), torch.zeros(2)
    machine.warps(x.data_ptr(), y.data_ptr(), counts.data_ptr())
    for warp, (total, low, high, fifth, after, flags, top) in zip(
        x.view(4, 32), y.tolist(), strict=True
    ):
        torch.testing.assert_close(torch.tensor(total), warp.sum())
        assert int(low) | int(high) << 16 == sum(
            1 << i for i, value in enumerate(warp) if value > 0
        )
        assert (fifth, after, top) == (float(warp[5]), float(warp[1]), float(warp.max()))
        assert int(flags) == int((warp > 2).any()) + 2
    assert counts.tolist() == [float((x <= 0).sum()), float((x > 0).sum())]


@pytest.mark.parametrize("hole", [False, True])
def test_block_reductions(machine, hole):
    """Every thread gets them, in any order of the threads; a NaN is not lost on the way to the
    largest value.
    """
    x = torch.randn(128)
    if hole:
        x[77] = torch.nan
    for seed in range(5):
        machine.set_seed(seed)
        y = buffer(128, 8)
        machine.blocks(x.data_ptr(), y.data_ptr())
        whole = torch.stack([x.sum(), x.max(), x.sum(), 2 * x.sum(), (x * x).sum()])
        torch.testing.assert_close(y[:, :5], whole.expand(128, 5), equal_nan=True)
        fours = x.view(32, 4)
        above = fours > 0
        apart = torch.stack(
            [fours.logsumexp(0), torch.where(above, fours, 0).sum(0), above.float().sum(0)], 1
        )
        torch.testing.assert_close(y[:, 5:], apart.repeat(32, 1), equal_nan=True)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize(
    "index,where",
    [(64, "byte 256 of 256"), (1_000_000, "byte 4000000 of 256"), (2000, "byte 8000 of 256")],
)
def test_out_of_bounds_names_kernel_block_and_thread(machine, shared, index, where):
    y = buffer(64)
    with pytest.raises(
        RuntimeError,
        match=r"kernel out_of_bounds_kernel, block \(1, 0, 0\), thread \(3, 0, 0\): out-of-bounds",
    ) as found:
        machine.out_of_bounds(y.data_ptr(), index, shared)
    assert where in str(found.value)
    assert ("shared memory" if shared else "global buffer") in str(found.value)


def test_a_write_before_the_start_is_found(machine):
    y = buffer(64)
    machine.out_of_bounds(y.data_ptr(), -3, False)
    with pytest.raises(RuntimeError, match="wrote outside a global buffer of 256 bytes"):
        machine.release_all()
    with pytest.raises(RuntimeError, match="wrote outside its shared memory"):
        machine.out_of_bounds(y.data_ptr(), -3, True)


def test_the_emulation_goes_on_after_an_error(machine):
    with pytest.raises(RuntimeError):
        machine.out_of_bounds(buffer(64).data_ptr(), 64, False)
    x, y = torch.randn(1, 128), buffer(1, 128)
    machine.reverse(x.data_ptr(), y.data_ptr(), 1, True)
    assert torch.equal(y, x.flip(1))


@pytest.mark.parametrize(
    "kind,message",
    [
        (
            0,
            r"divergent __syncthreads, line \d+; not all threads arrive \(64 of 128 wait at a block barrier, 64 have ended\)",
        ),
        (
            1,
            r"waits at the __syncthreads of line \d+ while another thread of its block waits at line \d+",
        ),
        (2, "divergent warp operation"),
    ],
)
def test_divergence_is_reported(machine, kind, message):
    with pytest.raises(RuntimeError, match=f"kernel divergent_kernel.*{message}"):
        machine.divergent(kind, buffer(128).data_ptr())


def test_asynchronous_copies_arrive_only_when_waited_for(machine):
    x, y = torch.randn(32, 4), buffer(32, 4)
    machine.copies(x.data_ptr(), y.data_ptr(), 16, False)
    assert torch.equal(y, x.flip(0))
    machine.copies(x.data_ptr(), y.data_ptr(), 12, False)
    assert torch.equal(y[:, :3], x.flip(0)[:, :3]) and torch.equal(y[:, 3], torch.zeros(32))
    machine.copies(x.data_ptr(), y.data_ptr(), 16, True)
    assert bool(y.isnan().all()), "read before it arrived: the memory is still what it was"


KINDS = {
    "float": (0, torch.float32, 1e-6),
    "double": (1, torch.float64, 1e-14),
    "tf32": (2, torch.float32, 1e-3),
    "half": (3, torch.float16, 1e-6),
    "bfloat16": (4, torch.bfloat16, 1e-6),
    "half by tf32": (5, torch.float16, 1e-6),
    "tf32 twice": (6, torch.float32, 1e-6),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("depth", [1, 16, 37, 64, 130])
@pytest.mark.parametrize("layout", ["rows", "columns", "mixed", "unaligned"])
def test_tile_product(machine, name, depth, layout):
    """mma and cp.async against a matrix product: every layout of the operands, whole and broken
    steps of k.
    """
    kind, dtype, tolerance = KINDS[name]
    a, b = (torch.randn(64, depth).to(dtype) for _ in range(2))
    pitch = depth if layout == "unaligned" else -(-depth // 8) * 8
    by_k = {
        "rows": (False, False),
        "columns": (True, True),
        "mixed": (True, False),
        "unaligned": (False, False),
    }[layout]

    def place(x, transposed):
        out = buffer(depth, 64, dtype=dtype) if transposed else buffer(64, pitch, dtype=dtype)
        (out if transposed else out[:, :depth]).copy_(x.T if transposed else x)
        return out

    sums = torch.float64 if dtype == torch.float64 else torch.float32
    left, right, c = place(a, by_k[0]), place(b, by_k[1]), buffer(64, 64, dtype=sums)
    machine.product(kind, left.data_ptr(), right.data_ptr(), c.data_ptr(), depth, *by_k, pitch)
    expected = a.double() @ b.double().T
    assert float((c - expected).abs().max()) <= tolerance * depth**0.5 * 10
    if name == "tf32":

        def rounded(x):  # to nearest, ties away from zero: 13 bits fewer
            return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()

        torch.testing.assert_close(c.double(), rounded(a) @ rounded(b).T, rtol=1e-5, atol=1e-5)


RESIDENT = {
    "float": (7, torch.float32),
    "tf32 twice": (8, torch.float32),
    "half": (9, torch.float16),
    "bfloat16": (10, torch.bfloat16),
}


@pytest.mark.parametrize("name", RESIDENT)
@pytest.mark.parametrize("depth", [1, 37, 130])
@pytest.mark.parametrize("by_k", [False, True])
def test_floats_keep_their_digits_in_a_product_with_16_bits(machine, name, depth, by_k):
    """The left operand is float32 in shared memory; rounded once to the type of the product it
    would be off by 1e-3.
    """
    kind, dtype = RESIDENT[name]
    a, b = torch.rand(64, depth), torch.randn(64, depth).to(dtype)
    pitch = -(-depth // 8) * 8
    left, right, c = (
        buffer(64, depth),
        buffer(depth, 64, dtype=dtype) if by_k else buffer(64, pitch, dtype=dtype),
        buffer(64, 64),
    )
    left.copy_(a)
    (right if by_k else right[:, :depth]).copy_(b.T if by_k else b)
    machine.product(
        kind, left.data_ptr(), right.data_ptr(), c.data_ptr(), depth, False, by_k, pitch
    )
    truth = a.double() @ b.double().T
    assert (
        float((c - truth).abs().max())
        <= 2 * float((a @ b.float().T - truth).abs().max()) + 1e-6 * depth**0.5
    )


def test_the_order_of_threads_follows_the_seed(machine):
    x = torch.arange(128.0)

    def racy(seed):
        machine.set_seed(seed)
        y = buffer(1)
        machine.tree(x.data_ptr(), y.data_ptr(), True)
        return float(y)

    assert racy(3) == racy(3) and racy(3) != racy(4)
