"""What every operator must do, run from the samples: gradients, opcheck, compile, export, autocast,
determinism.
"""

import copy
import re
import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
from backends import (
    BACKENDS,
    COMPILED,
    GPU,
    SLOW,
    device_of,
    dtypes,
    exact,
    has,
    operators_on,
    running_on,
)
from bad_input import BAD_INPUT
from bad_kinds import rows
from samples import MAKERS, RESIZED, all_samples
from torch import library as torch_library
from torch._subclasses.schema_check_mode import SchemaCheckMode

import ovseg_kernels as ok
from ovseg_kernels import _backends, _library, _selection
from ovseg_kernels.testing import assert_close_to_truth

SAMPLES = all_samples()
each = pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.discrete], ids=str)
# What the wrapper, autograd and the dispatcher do is the same whichever kernel of a device answers.
WRAPPED = ("cpu", "cuda")


def samples(wanted=lambda sample: True, names=BACKENDS, few=()):
    """Every sample on every implementation, on those of ``few`` one of an operator.

    Those on a GPU are made there when the test runs.
    """
    places = [place for place, sample in enumerate(SAMPLES) if wanted(sample)]
    first = {
        SAMPLES[place].op: place
        for place in sorted(places, key=lambda i: (not SAMPLES[i].smooth, i), reverse=True)
    }

    def needed(place, name):
        op = SAMPLES[place].op
        if not has(op, name):
            return False
        if name in COMPILED and op in _library.BUILT_ON:  # whose kernels have samples of their own
            return place == first[op] and not few
        return name not in few or place == first[op]

    pairs = [
        pytest.param(
            place,
            name,
            id=f"{SAMPLES[place]}-{name}",
            marks=[pytest.mark.gpu] if name in GPU else [],
        )
        for place in places
        for name in names
        if needed(place, name)
    ]
    return pytest.mark.parametrize("place,backend", pairs)


def with_gradient(sample):
    return not sample.discrete


def sample_at(place, backend, dtype=None):
    """The sample of that place, in a dtype and where the backend computes; those of other operators
    are not made for it.
    """
    op = SAMPLES[place].op
    before = sum(sample.op != op for sample in SAMPLES[:place])
    return MAKERS[op](dtype or exact(backend)[-1], device_of(backend))[place - before]


def test_every_operator_has_samples():
    assert set(MAKERS) == set(RESIZED) == set(BAD_INPUT) == set(ok.OPERATORS)
    checked = {name for sample in SAMPLES for name, _ in sample.low}
    assert checked == set(_library.SCHEMAS), "a schema that opcheck never sees"


def test_native_library_is_loaded():
    """The suite is about the compiled kernels; without them it would test the reference against
    itself.
    """
    assert _library.CPU.loaded, _library.CPU.reason


@samples(with_gradient, [name for name in BACKENDS if name not in SLOW], few=COMPILED)
def test_gradcheck(place, backend):
    """float64, through the operator. Emulated along random directions: an element takes a second.

    Interpreted kernels, slower still, are held to the definition in float64 by ``test_error_rule``,
    and the definition to finite differences below.
    """
    sample = sample_at(place, backend, torch.float64)
    with running_on(backend):
        if not sample.smooth:
            return assert_gradient_of_the_definition(sample)
        assert torch.autograd.gradcheck(
            sample.call,
            sample.tensors,
            eps=1e-6,
            atol=1e-7,
            rtol=1e-5,
            fast_mode=backend == "cuda-emulated",
        )


def assert_gradient_of_the_definition(sample):
    """Straight-through gradients are not those of the value: they are what autograd makes of the
    definition.
    """
    out = sample.call(*sample.tensors)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, sample.tensors, upstream)
    with ok.backend("reference"):
        out = sample.call(*sample.tensors)
        expected = torch.autograd.grad(out, sample.tensors, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-6, atol=1e-6
        )  # Philox noise is float32, and its logarithms a library's


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.smooth and not s.discrete], ids=str)
def test_gradcheck_of_the_definition(sample):
    with ok.backend("reference"):
        assert torch.autograd.gradcheck(sample.call, sample.tensors, eps=1e-6, atol=1e-7, rtol=1e-5)


@samples()
def test_opcheck(place, backend):
    """On every backend what depends on the kernel: mutation, aliases and metadata, of one call.

    Autograd and tracing are one for all.
    """
    sample = sample_at(place, backend)
    for name, arguments in sample.low:
        operator = getattr(torch.ops.ovseg, name).default
        with running_on(backend):
            if backend in WRAPPED:
                torch_library.opcheck(operator, arguments)
                continue
            plain = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            with SchemaCheckMode():
                real = operator(*plain)
        assert_same_metadata(real, operator(*to_meta(arguments)))


def to_meta(arguments):
    return [x.detach().to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]


def assert_same_metadata(real, fake):
    for a, b in zip(*(x if isinstance(x, tuple) else (x,) for x in (real, fake)), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


@samples(with_gradient)
def test_error_rule(place, backend):
    """Values and gradients against the definition in float64."""
    assert_error_rule(place, backend, exact(backend))


@samples(with_gradient, few=COMPILED)
def test_error_rule_in_16_bits(place, backend):
    """The same for inputs rounded to 16 bits."""
    assert_error_rule(place, backend, dtypes(backend)[1:])


def assert_error_rule(place, backend, dtypes):
    for dtype in dtypes:
        sample = sample_at(place, backend, torch.float64)
        scalar = torch.float64 if dtype == torch.float64 else torch.float32

        def run(feature_dtype, scalar_dtype, sample=sample, dtype=dtype, scalar=scalar):
            tensors = [
                x.detach().to(dtype).to(feature_dtype)
                if i < sample.features
                else x.detach().to(scalar).to(scalar_dtype)
                for i, x in enumerate(sample.tensors)
            ]
            tensors = [x.requires_grad_() for x in tensors]
            out = sample.call(*tensors)
            upstream = (
                1 + 0.5 * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            ).to(out)
            grads = torch.autograd.grad(out, tensors, upstream, allow_unused=True)
            return [out, *(g for g in grads if g is not None)]

        with running_on(backend):
            results = run(dtype, scalar)
        with ok.backend("reference"):
            eager, truth = run(dtype, scalar), run(torch.float64, torch.float64)
        # A parameter that the pool does not use has no gradient in the definition and may have a
        # zero one in the kernel.
        floor = torch.float32 if sample.rounded and dtype == torch.float64 else dtype
        for i, (a, b, c) in enumerate(
            zip(results, eager, truth, strict=len(results) == len(truth))
        ):
            assert_close_to_truth(f"{sample} {'gradient' if i else 'output'} {i}", a, b, c, floor)


@each
def test_two_runs_and_two_threads_give_the_same_bits(sample):
    def run():
        out = sample.call(*sample.tensors)
        return [
            out,
            *(
                g
                for g in torch.autograd.grad(out.sum(), sample.tensors, allow_unused=True)
                if g is not None
            ),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, again = run(), run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    for a, b, c in zip(one, again, two, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c) or (sample.mixed and torch.allclose(a, c, rtol=1e-12, atol=1e-12))


@samples(with_gradient, names=("cuda-emulated", "cuda", "triton"))
def test_gpu_kernels_give_the_same_bits_twice(place, backend):
    """Emulated: whatever the order of the threads, which also shows a missing barrier."""
    sample = sample_at(place, backend, torch.float32)

    def run(seed):
        with running_on(backend, seed):
            out = sample.call(*sample.tensors)
            return [
                out,
                *(
                    g
                    for g in torch.autograd.grad(out.sum(), sample.tensors, allow_unused=True)
                    if g is not None
                ),
            ]

    one, two = run(1), run(2)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@samples(with_gradient, WRAPPED)
def test_second_derivative_raises(place, backend):
    sample = sample_at(place, backend)
    with running_on(backend):
        out = sample.call(*sample.tensors).square().sum()
        (first,) = torch.autograd.grad(out, sample.tensors[:1], create_graph=True)
        if sample.plain:  # which has one
            assert bool(torch.autograd.grad(first.sum(), sample.tensors[:1])[0].any())
            return
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(first.sum(), sample.tensors[:1])


# Their first compilation starts over once, when torch makes a tensor of a Python number in it.
# Later sizes add none.
BEGINS_ANEW = (
    "center_assignment",
    "folded_center_assignment",
    "segclip_center_assignment",
    "contrastive_loss",
    "dense_contrastive_loss",
    "upsample_mask_loss",
)


@operators_on(ok.OPERATORS, WRAPPED)
def test_compile_without_recompiling(op, backend):
    """Neither a new batch size nor a new scale or seed compiles again; with other kernels of the
    device it is traced no differently.
    """
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    call, device = RESIZED[op](3)[0], device_of(backend)
    with running_on(backend):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
        first = None
        for size in (3, 6, 9):
            tensors = [x.to(device) for x in RESIZED[op](size)[1]]
            leaves = [x.requires_grad_() for x in tensors if x.is_floating_point()]
            out, eager = compiled(*tensors), call(*tensors)
            assert torch.equal(out, eager)
            if out.requires_grad:
                grads, expected = (torch.autograd.grad(x.sum(), leaves) for x in (out, eager))
                assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
            first = first or counter.frame_count
    assert first <= 1 + (op in BEGINS_ANEW), f"{first} compilations for the first batch size"
    assert counter.frame_count == first, (
        f"{counter.frame_count - first} more compilations for other batch sizes"
    )


@samples(lambda sample: not sample.plain, WRAPPED)
def test_export(place, backend):
    sample = sample_at(place, backend, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *tensors):
            return sample.call(*tensors)

    tensors = tuple(x.detach() for x in sample.tensors)
    with running_on(backend):
        program = torch.export.export(Module(), tensors)
        assert torch.equal(program.module()(*tensors), sample.call(*tensors))
    graphs = [
        module.graph
        for module in program.graph_module.modules()
        if isinstance(module, torch.fx.GraphModule)
    ]
    assert any(
        "ovseg" in str(node.target) for graph in graphs for node in graph.nodes
    )  # some lie in a block without autocast


def assert_refused(op, calls):
    """Of (name, arguments, error, message) all raise, on both backends that this machine has; those
    that do not are named.
    """
    wrong = []
    for name, arguments, error, message in calls:
        for backend in ("cpu", "reference"):
            found = "nothing was raised"
            try:
                with ok.backend(backend):
                    getattr(ok, op)(**{**BAD_INPUT[op][0], **arguments})
            except Exception as raised:
                if isinstance(raised, error) and re.search(message, str(raised)):
                    continue
                found = f"{type(raised).__name__}: {raised}"
            wrong.append(f"{name}, on {backend}: {found}; expected {error.__name__}: {message}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.bad_input("operators", "what is special to the operator")
@pytest.mark.parametrize("op", BAD_INPUT)
def test_bad_input(op):
    own = BAD_INPUT[op][1]
    assert_refused(
        op, [(" and ".join(change), change, error, message) for change, error, message in own]
    )


@pytest.mark.bad_input("operators", "every kind of bad_kinds.py")
@pytest.mark.parametrize("op", BAD_INPUT)
def test_bad_kinds(op):
    """The same kinds for every argument that they fit."""
    kinds = list(rows(op))
    assert len(kinds) >= 8  # of a tensor alone
    assert_refused(
        op,
        [
            (f"{name}: {kind}", {name: value}, error, message)
            for kind, name, value, error, message in kinds
        ],
    )


@samples(lambda sample: sample.mask is not None)
def test_masked_elements_reach_nothing(place, backend):
    """NaN in what a mask leaves out changes no bit of the result, and its gradient is exactly zero."""
    sample = sample_at(place, backend)
    with running_on(backend):
        out = sample.call(*sample.tensors)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        grads = torch.autograd.grad(out, sample.tensors, upstream, materialize_grads=True)
        poisoned = [x.detach().clone() for x in sample.tensors]
        for i in sample.masked:
            poisoned[i][~sample.mask] = float("nan")
        poisoned = [x.requires_grad_() for x in poisoned]
        again = sample.call(*poisoned)
        assert torch.equal(out, again)
        for i, (a, b) in enumerate(
            zip(
                grads,
                torch.autograd.grad(again, poisoned, upstream, materialize_grads=True),
                strict=True,
            )
        ):
            assert torch.equal(a, b)
            if i in sample.masked:
                assert bool((b[~sample.mask] == 0).all())


@samples(with_gradient, WRAPPED)
def test_autocast_table(place, backend):
    """Features may be lowered; the scale stays float32, and so does the result."""
    sample, low = sample_at(place, backend, torch.float32), torch.bfloat16
    with running_on(backend):
        with torch.autocast(device_of(backend), low):
            out = sample.call(*sample.tensors)
        assert out.dtype == torch.float32
        grads = torch.autograd.grad(out.sum(), sample.tensors, allow_unused=True)
        assert all(
            g is None or g.dtype == x.dtype for g, x in zip(grads, sample.tensors, strict=True)
        )
        cast = (
            sample.lowered
            if sample.lowered is not None
            else sample.features
            if sample.features > 1
            else 0
        )
        lowered = [
            x.detach().to(low) if i < cast else x.detach() for i, x in enumerate(sample.tensors)
        ]
        if sample.plain:
            lowered = [x.detach() for x in sample.tensors]  # in float32
        assert torch.equal(out, sample.call(*lowered))


@samples(names=("cpu",))
def test_meta_tensors(place, backend):
    """Shapes, dtypes and strides are those of real tensors; that every kernel keeps to them opcheck
    looks at.
    """
    sample = sample_at(place, backend)
    for name, arguments in sample.low:
        with running_on(backend):
            real = getattr(torch.ops.ovseg, name)(
                *[x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
            )
        assert_same_metadata(real, getattr(torch.ops.ovseg, name)(*to_meta(arguments)))


def test_explain_and_forced_backends():
    patches, texts = torch.randn(1, 2, 3), torch.randn(1, 3)
    choice = ok.explain("patch_text_similarity", patches, texts)
    assert choice.backend == "cpu" and "tensors are on cpu" in choice.refused["cuda"]
    with pytest.raises(ValueError, match="op is 'nothing'"):
        ok.explain("nothing")
    with pytest.raises(ValueError, match="backend is 'tpu'"), ok.backend("tpu"):
        pass
    with (
        ok.backend("cuda"),
        pytest.raises(ok.BackendError, match="'cuda' was asked for and cannot run"),
    ):
        ok.patch_text_similarity(patches, texts)
    with ok.backend("cpu"):
        assert ok.explain("patch_text_similarity").backend == "cpu"
        ok.patch_text_similarity(patches, texts)


def test_a_backend_that_an_operator_lacks(monkeypatch):
    """Forced, it is an error that names the operator, what was asked and what there is."""
    cuda, triton = (_selection.Rule((name,), "for a test") for name in ("cuda", "triton"))
    monkeypatch.setitem(_selection.TABLE, "upsample_argmax", (cuda,))
    monkeypatch.setitem(_selection.TABLE, "contrastive_stats", (triton,))
    monkeypatch.setitem(_selection.TABLE, "contrastive_loss_backward", (triton, cuda))
    assert not _backends.lacks("contrastive_loss", "cuda"), "it has that of the backward"
    monkeypatch.setitem(_selection.TABLE, "contrastive_loss_backward", (triton,))
    logits, image = torch.randn(1, 2, 3, 3), torch.randn(2, 3)
    for name, call in (
        ("triton", lambda: ok.upsample_argmax(logits, (4, 4))),
        ("cuda", lambda: ok.contrastive_loss(image, image, 10.0)),
    ):
        with ok.backend(name), pytest.raises(ok.BackendError) as caught:
            call()
        op = "contrastive_loss" if name == "cuda" else "upsample_argmax"
        others = [x for x in ("cuda", "triton", "cpu", "reference") if x != name]
        assert str(caught.value) == (
            f"{op}: backend {name!r} was asked for and cannot run: "
            f"{op} has no kernel there, only on {', '.join(others)}"
        )
    assert ok.upsample_argmax(logits, (4, 4)).shape == (1, 4, 4)


ASKED = """
import os, sys, torch

for line in sys.argv[1:]:  # torch is imported once; the package, which reads them, in a fork for each pair of variables
    if (child := os.fork()) == 0:
        os.environ["OVSEG_BACKEND"], os.environ["TRITON_INTERPRET"] = line.split()
        try:
            import ovseg_kernels as ok
            ok.patch_text_similarity(torch.randn(1, 2, 3), torch.randn(1, 3))
            found = ok.explain("patch_text_similarity").backend
            found += " by Triton" * ("ovseg_kernels.triton.patch_text_similarity" in sys.modules)
        except Exception as error:
            found = str(error)
        print(f"{line}: {found}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_backend_from_the_environment():
    """With Triton's interpreter a kernel of Triton answers for CPU tensors; without it, and without
    a GPU, an error says why.
    """
    asked = ["reference 0", "cpu 0", "auto 0", "fast 0", "triton 1", "triton 0"]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ASKED, *asked], capture_output=True, text=True
    )
    found = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert [found[line] for line in ("reference 0", "cpu 0", "auto 0", "triton 1")] == [
        "reference",
        "cpu",
        "cpu",
        "triton by Triton",
    ], done
    assert "OVSEG_BACKEND is 'fast'" in found["fast 0"]
    if not torch.cuda.is_available():
        assert "backend 'triton' was asked for and cannot run" in found["triton 0"]


@pytest.mark.parametrize(
    "archs,capability,runs",
    [
        (["80", "90a"], (8, 0), True),
        (["80", "90a"], (8, 6), True),
        (["86"], (8, 0), False),
        (["80", "90a"], (9, 0), True),
        (["90a"], (10, 0), False),
        (["90"], (10, 0), False),
        (["90+PTX"], (10, 0), True),
        (["120"], (12, 1), True),
        ([], (9, 0), True),
    ],
)
def test_which_gpu_a_library_runs_on(archs, capability, runs):
    assert (_backends.unsupported(archs, capability) == "") == runs
    if not runs:
        assert f"sm_{capability[0]}{capability[1]}" in _backends.unsupported(archs, capability)


def test_samples_survive_deepcopy():
    tensors = copy.deepcopy(SAMPLES[0].tensors)
    assert torch.equal(SAMPLES[0].call(*tensors), SAMPLES[0].call(*SAMPLES[0].tensors))


def test_backends_nest(monkeypatch):
    """The innermost one answers, and the outer one does again afterwards."""
    device, other = ("cpu", "cpu") if _backends.interpreted() else ("cuda", "cuda")
    patches, texts = torch.randn(1, 2, 3, device=device), torch.randn(1, 3, device=device)
    calls = []

    def spy(*args):
        calls.append("triton")
        return _library.FALLBACKS["patch_text_similarity"](*args)

    monkeypatch.setitem(_backends.IMPLEMENTATIONS, "patch_text_similarity", spy)
    with ok.backend("triton"):
        ok.patch_text_similarity(patches, texts)
        with ok.backend(other):
            ok.patch_text_similarity(patches, texts)
        assert calls == ["triton"]
        ok.patch_text_similarity(patches, texts)
    ok.patch_text_similarity(patches, texts)
    assert calls == ["triton", "triton"]
