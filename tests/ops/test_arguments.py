"""Arguments at the edge of what an operator takes: sizes, integers of any dtype, views, meta
tensors, ids without a partner.
"""

import pytest
import torch
from backends import COMPILED, device_of, operators_on, parameters, running_on
from samples import MAKERS, all_samples

import ovseg_kernels as ok
from ovseg_kernels import philox

SAMPLES = all_samples(torch.float32)


def everywhere(op):
    return pytest.mark.parametrize("backend", parameters(of=op))


HUGE = (2**31, 2**62, 2**63 - 1)


def held(what):
    return pytest.mark.bad_input("operators", what)


@held("k_pos, k_neg and skip beyond all memory")
@pytest.mark.parametrize("name", ["skip", "k_pos", "k_neg"])
@everywhere("dense_contrastive_loss")
def test_no_integer_sizes_memory(backend, name):
    """More than there are pixels is as many as there are."""
    if backend in COMPILED:
        pytest.skip("the launcher is the interpreter's")
    torch.manual_seed(0)
    pixels, texts = (
        torch.randn(3, 4, 5, device=device_of(backend)),
        torch.randn(3, 5, device=device_of(backend)),
    )
    small = {"k_pos": 2, "k_neg": 3, "skip": 1}
    with running_on(backend):
        expected = ok.select_pixels(pixels, texts, **{**small, name: 12})
        loss = ok.dense_contrastive_loss(pixels, texts, **{**small, name: 12})
        for huge in HUGE:
            found = ok.select_pixels(pixels, texts, **{**small, name: huge})
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
            assert torch.equal(
                ok.dense_contrastive_loss(pixels, texts, **{**small, name: huge}), loss
            )
    assert name != "skip" or bool((expected.negative == -1).all())


@held("skip beyond all memory, below the public function")
@everywhere("dense_contrastive_loss")
def test_the_dispatcher_clamps_skip(backend):
    if backend in COMPILED:
        pytest.skip("the launcher is the interpreter's")
    pixels, texts = (
        torch.randn(3, 4, 5, device=device_of(backend)),
        torch.eye(3, 5, device=device_of(backend)),
    )
    with running_on(backend):
        for skip in (12, 2**63 - 1):
            positive, negative = torch.ops.ovseg.dense_contrastive_select(
                pixels, texts, None, None, None, 2, 3, skip, 0, 1.0, 0.1
            )
            assert positive.shape == (3, 2) and negative.tolist() == [[-1] * 3] * 3


@held("indices of pixels that are not there, below the public function")
def test_the_cpu_reads_no_pixel_beyond_the_last():
    pixels, texts, unit = torch.randn(2, 3, 4), torch.randn(1, 4), torch.randn(1, 0, 4)
    good, bad = torch.tensor([[5, -1]]), torch.tensor([[5, 6]])
    with pytest.raises(RuntimeError, match="index holds 6; expected -1 to 5"):
        torch.ops.ovseg.dense_contrastive_gather(pixels, texts, bad, 0)
    back = torch.ops.ovseg.dense_contrastive_gather_backward
    for index, order, message in (
        (bad, [0, 1], "index holds 6"),
        (good, [0, 2], "order holds 2; expected 0 to 1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            back(torch.ones(1, 2), unit, pixels, texts, index, torch.tensor(order), 0, True, True)


NO_ROOM = (2**31 - 1, 2**26)  # 2^60 bytes: more than an address holds, whatever the system promises


@held("an output for which there is no memory")
@pytest.mark.parametrize(
    "call",
    [
        lambda x: ok.upsample_argmax(x, NO_ROOM),
        lambda x: ok.window_argmax(x, [(0, 0)], (8, 8), (8, 8), NO_ROOM),
        lambda x: torch.ops.ovseg.dense_contrastive_select(
            x[0], x[0, :, 0], None, None, None, 2**58, 1, 0, 0, 1.0, 0.1
        ),
        lambda x: torch.ops.ovseg.dense_contrastive_select(
            x[0], x[0, :, 0], None, None, None, 2**62, 1, 0, 0, 1.0, 0.1
        ),
    ],
)
def test_no_memory_is_one_line(call, capfd):
    """And no page of C++ frames, neither in the message nor on the error stream."""
    with pytest.raises(RuntimeError, match=r"out of memory: no room for a tensor \[") as caught:
        call(torch.randn(1, 3, 4, 4))
    assert "\n" not in str(caught.value) and "frame #" not in str(caught.value)
    assert capfd.readouterr().err == ""


@held("labels of a narrow dtype beside more classes than it holds")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_every_dtype(dtype):
    """torch compares modulo the dtype: 150 classes would make every int8 label a negative, and -1
    would ignore 255.
    """
    limits = torch.iinfo(dtype)
    torch.manual_seed(1)
    for classes in (3, 150, 300):
        logits = torch.randn(1, classes, 3, 4)
        labels = torch.randint(max(limits.min, -5), min(limits.max, classes + 5) + 1, (1, 9, 11))
        labels[0, 0, 0], labels[0, 0, 1] = limits.max, limits.min
        for ignored in (
            None,
            -1,
            0,
            255,
            limits.max,
            limits.min - 1,
            limits.max + 1,
            256 + 2,
            2**40,
            -(2**63),
        ):
            expected = ok.upsample_mask_loss(logits, labels, ignore_index=ignored)
            found = ok.upsample_mask_loss(logits, labels.to(dtype), ignore_index=ignored)
            assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), (
                classes,
                ignored,
            )


@held("an rng that is a strided view")
@operators_on(["center_assignment", "dense_contrastive_loss"])
def test_strided_rng(backend, op):
    if backend in COMPILED:
        pytest.skip("what a launcher is given is the same")
    device = device_of(backend)
    rng = torch.arange(5, 9, device=device)[::2]
    torch.manual_seed(2)
    x, y = torch.randn(3, 4, 5, device=device), torch.randn(3, 6, 5, device=device)

    def call(rng):
        if op == "center_assignment":
            return ok.center_assignment(x, y, y, rng=rng).pooled
        return ok.dense_contrastive_loss(y, x[:, 0], k_pos=2, k_neg=3, sampling="gumbel", rng=rng)

    with running_on(backend):
        assert not rng.is_contiguous() and torch.equal(call(rng), call(rng.clone()))


@held("a view whose sign bit is put off")
@everywhere("patch_text_similarity")
def test_tensors_with_a_negative_bit(backend):
    """The imaginary part of a conjugate is such a view: its memory holds the other sign."""
    if backend in COMPILED:
        pytest.skip("dispatch is the same for all kernels")
    torch.manual_seed(3)
    view = torch.randn(2, 5, 4, dtype=torch.complex64).conj().imag.to(device_of(backend))
    texts = torch.randn(3, 4, device=view.device)
    with running_on(backend):
        assert torch.equal(
            ok.patch_text_similarity(view, texts),
            ok.patch_text_similarity(view.resolve_neg().clone(), texts),
        )


@held("elements of philox.advance that are no number of elements")
@pytest.mark.parametrize("elements", [-1, -4, 1.0, True, "4", None, 2**63, 2**70])
def test_advance_never_goes_back(elements):
    """Noise would repeat."""
    with pytest.raises(ValueError, match=r"elements is .*; expected an integer of at least 0"):
        philox.advance(philox.make_rng(1), elements)


@held("a shape of noise that is none")
@pytest.mark.parametrize("shape", [(-1,), (2, -3), (2.0, 3), (True, 2)])
def test_noise_of_a_shape_that_is_none(shape):
    for draw in (philox.bits, philox.uniform, philox.gumbel):
        with pytest.raises(ValueError, match=r"shape is \(.*; expected integers of at least 0"):
            draw(philox.make_rng(1), shape)
    assert philox.uniform(philox.make_rng(1), (0, 3)).shape == (0, 3)


@held("a seed or an offset that is no integer of 64 bits")
@pytest.mark.parametrize("value", [1.5, True, "1", 2**63, -(2**63) - 1])
def test_seeds(value):
    for name in ("seed", "offset"):
        with pytest.raises(ValueError, match=f"{name} is .*; expected an integer of 64 bits"):
            philox.make_rng(**{"seed": 1, name: value})


@held("meta tensors, all of them")
@pytest.mark.parametrize("place", range(len(SAMPLES)), ids=[str(s) for s in SAMPLES])
def test_public_functions_take_meta_tensors(place):
    """Shapes and dtypes without memory, as one plans a model; also under autocast."""
    real, sample = SAMPLES[place], all_samples(torch.float32, "meta")[place]
    expected = real.call(*(x.detach() for x in real.tensors))
    for context in (torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False)):
        with context:
            found = sample.call(*(x.detach() for x in sample.tensors))
        assert (
            found.device.type == "meta"
            and found.shape == expected.shape
            and found.dtype == expected.dtype
        )


@held("ids that match nowhere")
@operators_on(["contrastive_loss", "similarity_contrastive_loss", "dense_contrastive_loss"])
def test_ids_that_match_nowhere_leave_nothing_to_learn(backend, op):
    """Documented: 0 with a gradient of 0, and of 0 exactly."""
    device = device_of(backend)
    ids = {
        "image_ids": torch.tensor([1, 2, 3], device=device),
        "text_ids": torch.tensor([4, 5], device=device),
    }
    shapes = {
        "contrastive_loss": ((3, 4), (2, 4)),
        "similarity_contrastive_loss": ((3, 2),),
        "dense_contrastive_loss": ((3, 6, 4), (2, 4)),
    }
    leaves = [torch.randn(*shape, device=device).requires_grad_() for shape in shapes[op]]
    scale = torch.tensor(5.0, device=device, requires_grad=True)
    with running_on(backend):
        loss = (
            ok.dense_contrastive_loss(*leaves, temperature=scale, k_pos=2, k_neg=2, **ids)
            if op.startswith("dense")
            else getattr(ok, op)(*leaves, scale, **ids)
        )
        assert float(loss.detach()) == 0
        for grad in torch.autograd.grad(loss, [*leaves, scale], materialize_grads=True):
            assert not bool(grad.any())
    assert "match" in getattr(ok, op).__doc__ and "nowhere" in getattr(ok, op).__doc__


@held("a backend that is none, or cannot run")
def test_backends_that_are_none():
    for name in ("gpu", "", None, 3):
        with pytest.raises(ValueError, match=r"backend is .*; expected one of"), ok.backend(name):
            pass
    for op in ("nothing", None, MAKERS):
        with pytest.raises(ValueError, match=r"op is .*; expected one of"):
            ok.explain(op)


@held("a process group where none is, for gathered rows")
def test_gather_rows_names_the_group():
    with pytest.raises(
        TypeError, match=r"group is a str; expected a torch\.distributed process group"
    ):
        ok.distributed.gather_rows(torch.ones(2), "world")
    with pytest.raises(
        TypeError, match=r"group is a NoneType; expected a torch\.distributed process group"
    ):
        ok.distributed.gather_rows(torch.ones(2), None)
    with pytest.raises(TypeError, match="x is a list; expected a tensor"):
        ok.distributed.gather_rows([1.0], None)


@pytest.mark.third_trial(15)
@pytest.mark.parametrize(
    "make,message",
    [
        (lambda x: x.to_sparse(), "has layout sparse_coo"),
        (lambda x: x[None].to_sparse_csr(), "has layout sparse_csr"),
        (lambda x: torch.nested.nested_tensor([x]), "is a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse|.*nested")
def test_numbers_given_as_tensors_are_dense(make, message):
    given, patches, texts = make(torch.ones(1)), torch.randn(2, 3, 4), torch.randn(3, 4)
    for name, call in {
        "temperature": lambda x: ok.patch_text_similarity(patches, texts, temperature=x),
        "weight_scale": lambda x: ok.patch_text_similarity(
            patches, texts, weight="sigmoid", weight_scale=x
        ),
        "logit_scale": lambda x: ok.contrastive_loss(texts, texts, logit_scale=x),
    }.items():
        with pytest.raises(
            TypeError, match=f"{name} {message}; expected a dense tensor of one element"
        ):
            call(given)
