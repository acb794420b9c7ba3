"""No call waits for a GPU: nothing is read from it, and nothing copied to it from memory that is
not pinned.

Held on a device that cannot be read (unreadable.py), and on the CPU with reads refused. What is
left to the GPU itself is raised later.
"""

import contextlib
import importlib.util
import itertools
import pkgutil
import sys

import pytest
import torch
from backends import GPU, device_of, operators_on, parameters, running_on
from samples import MAKERS, all_samples
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from unreadable import Refused, backward, unreadable_device

import ovseg_kernels as ok
import ovseg_kernels.triton
from ovseg_kernels import _checking, _distributed, _library, nn, philox
from ovseg_kernels.triton import KERNELS

SAMPLES = all_samples()
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*runs on the reference for cuda"
)  # as it does where no GPU is


@pytest.fixture
def unreadable(monkeypatch):
    with unreadable_device(monkeypatch) as refusing:
        yield refusing


@pytest.mark.parametrize("op", MAKERS)
def test_no_operator_reads_the_device(op, unreadable):
    """Forward and backward, every option."""
    for sample in MAKERS[op](torch.float32, "cuda"):
        with unreadable:
            out = sample.call(*sample.tensors)
            assert out.device.type == "cuda"
            if not sample.discrete:
                wanted = sum(x.requires_grad for x in sample.tensors[: 2 if sample.plain else None])
                assert backward(out) == wanted, f"{sample}: the backward was not run to its end"


@pytest.mark.parametrize(
    "op", [op for op in MAKERS if op != "dense_contrastive_loss"]
)  # a loop over texts, only for tests
def test_no_definition_reads_the_device(op, unreadable):
    for sample in MAKERS[op](torch.float32, "cuda"):
        with unreadable, ok.backend("reference"):
            sample.call(*sample.tensors)


def low_calls(op):
    for sample in MAKERS[op](torch.float32, "cuda"):
        for name, arguments in sample.low:
            yield name, [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize("op", MAKERS)
def test_no_closed_form_reads_the_device(op, unreadable):
    """What answers for CUDA tensors where no kernel is built."""
    for name, arguments in low_calls(op):
        if name in _library.FALLBACKS:
            with unreadable:
                _library.FALLBACKS[name](*arguments)


HOPPER = {  # what launchers ask of the device
    "on_device": contextlib.nullcontext(),
    "capability": 90,
    "shared_memory": 227 << 10,
    "multiprocessors": 132,
}


class _NoKernel:
    def __getitem__(self, grid):
        return lambda *arguments, **options: None


@pytest.mark.filterwarnings(
    "ignore:.*data pointer"
)  # of a tensor that has none: launchers look at its alignment
@pytest.mark.parametrize("op", dict.fromkeys(module for module, _ in KERNELS.values()))
def test_no_triton_launcher_reads_the_device(op, unreadable, monkeypatch):
    """The launchers without their kernels."""
    module = importlib.import_module(f"ovseg_kernels.triton.{op}")
    for file in pkgutil.iter_modules(ovseg_kernels.triton.__path__):
        place = importlib.import_module(f"ovseg_kernels.triton.{file.name}")
        for name in [name for name in vars(place) if name.endswith("_kernel")]:
            monkeypatch.setattr(place, name, _NoKernel())
        for name, value in HOPPER.items():
            if hasattr(place, name):
                monkeypatch.setattr(place, name, lambda _, value=value: value)
    for name, arguments in low_calls(op):
        if name in KERNELS:
            with unreadable:
                getattr(module, KERNELS[name][1])(*arguments)


def test_what_goes_with_the_operators_does_not_read_the_device(unreadable):
    image, text = torch.randn(3, 4, device="cuda"), torch.randn(3, 4, device="cuda")
    scale = torch.ones((), device="cuda")
    with unreadable:
        rng = philox.advance(philox.make_rng(3, device="cuda"), 100)
        assert philox.gumbel(rng, (2, 3)).device.type == "cuda"
        nn.ClipLoss()(image, text, scale)
        nn.SigLipLoss()(image, text, scale, scale)
        ok.contrastive_loss(image, text, 10.0, kind="sigmoid", logit_bias=-10.0)


def test_origins_of_the_host_reach_the_device_from_pinned_memory(unreadable, monkeypatch):
    monkeypatch.setattr(
        "ovseg_kernels.ops.window_argmax._covered", lambda *_: None
    )  # the fake mode's host has no numbers either
    logits = torch.randn(2, 3, 4, 4, device="cuda")
    arguments = (8, 8), (8, 12), (8, 8)
    for origins in (torch.tensor([[0, 0], [0, 4]]), [(0, 0), (0, 4)]):
        with unreadable:
            ok.window_argmax(logits, origins, *arguments)
    assert len(unreadable.pinned) == 2
    monkeypatch.setattr(_checking, "capturing", lambda: True)
    with pytest.raises(
        ValueError,
        match="origins is on the CPU while a CUDA graph is captured; expected it on cuda:0",
    ):
        ok.window_argmax(logits, torch.tensor([[0, 0], [0, 4]]), *arguments)


def test_the_unreadable_device_refuses(unreadable):
    """The tests above can fail."""
    x, host = torch.randn(3, device="cuda"), torch.randn(3)
    reads = (
        lambda: x.sum().item(),
        lambda: bool(x.isnan().any()),
        lambda: x.tolist(),
        lambda: torch.equal(x, x),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: float(x[0]),
    )
    for read in reads:
        with unreadable, pytest.raises(Exception, match="aten"):
            read()
    copies = (
        lambda: x.cpu(),
        lambda: host.to("cuda"),
        lambda: torch.tensor([1, 2], device="cuda"),
        lambda: x.new_tensor([1.0]),
        lambda: x.copy_(host),
        lambda: host.to("cuda", non_blocking=True),
        lambda: host.pin_memory().to("cuda"),
    )
    for copy in copies:
        with unreadable, pytest.raises(Refused, match="a copy of"):
            copy()
    with unreadable:
        host.pin_memory().to("cuda", non_blocking=True)


class _NoReads(TorchDispatchMode):
    READS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.READS:
            raise Refused(f"{func} reads numbers")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_plain_tensors_are_not_read_where_numbers_are_not_looked_at(sample, monkeypatch):
    """The same on real tensors of the CPU, which answer as a GPU's would: fake ones are left alone
    by some checks anyway.
    """
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    with _NoReads():
        out = sample.call(*sample.tensors)
        if not sample.discrete:
            torch.autograd.grad(out.sum(), sample.tensors, allow_unused=True)
    with _NoReads(), pytest.raises(Refused, match="reads numbers"):
        bool(sample.tensors[0].isnan().any())


def test_where_numbers_are_looked_at():
    host, meta = torch.ones(2), torch.ones(2, device="meta")
    with FakeTensorMode():
        device = torch.ones(2, device="cuda")
    assert [_checking.looks_at_values(x) for x in (host, device, meta)] == [True, False, False]
    with ok.checking():
        assert [_checking.looks_at_values(x) for x in (host, device, meta)] == [True, True, False]
        with ok.checking(False):
            assert not _checking.looks_at_values(device)
    assert not _checking.looks_at_values(device)
    assert not _checking.defers(device), "a fake tensor has no numbers to wait for"


@pytest.mark.parametrize("value,expected", [("1", True), ("0", False), ("", False), (None, False)])
def test_ovseg_check(value, expected, monkeypatch):
    """Read when the module is imported, here once more under another name."""
    monkeypatch.delenv("OVSEG_CHECK", raising=False)
    if value is not None:
        monkeypatch.setenv("OVSEG_CHECK", value)
    spec = importlib.util.spec_from_file_location(
        "ovseg_kernels._checking_again", _checking.__file__
    )
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again._on is expected


@pytest.mark.parametrize(
    "call",
    [
        lambda device: ok.upsample_argmax(torch.randn(1, 3, 4, 4, device=device), (8, 8)),
        lambda device: ok.upsample_argmax(
            torch.randn(1, 3, 4, 4, device=device),
            (8, 8),
            label_type=torch.uint8,
            class_labels=torch.arange(3, device=device),
        ),
        lambda device: ok.window_argmax(
            torch.randn(1, 3, 4, 4, device=device),
            torch.zeros(1, 2, dtype=torch.int64, device=device),
            (8, 8),
            (8, 8),
            (8, 8),
        ),
    ],
)
def test_checking_reads_the_device(call):
    """Under ``checking`` the errors come in the call, as on the CPU: it asks for the numbers."""
    with FakeTensorMode(), ok.checking(), pytest.raises(DataDependentOutputException):
        call("cuda")


def test_labels_beyond_their_type_are_refused_where_they_are_looked_at(monkeypatch):
    logits, table = torch.randn(1, 300, 2, 2), torch.arange(300) // 2
    assert (
        int(ok.upsample_argmax(logits, (2, 2), class_labels=table, label_type=torch.uint8).max())
        < 150
    )
    with pytest.raises(
        ValueError, match=r"the largest label is 449; torch\.uint8 holds 255 at most"
    ):
        ok.upsample_argmax(logits, (2, 2), class_labels=table + 300, label_type=torch.uint8)
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    wrapped = ok.upsample_argmax(logits, (2, 2), class_labels=table + 300, label_type=torch.uint8)
    assert torch.equal(
        wrapped, ok.upsample_argmax(logits, (2, 2), class_labels=table + 300).to(torch.uint8)
    )


class _Event:
    landed = False

    def query(self):
        return self.landed


@pytest.fixture
def deferring(monkeypatch):
    """The CPU answers as a GPU would; events and captures are told what to say."""
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    monkeypatch.setattr(_checking, "defers", lambda x: True)
    monkeypatch.setattr(_checking, "_flags", {})
    monkeypatch.setattr(_checking, "_event", lambda x: _Event())
    monkeypatch.setattr(_checking, "capturing", lambda: False)
    monkeypatch.setattr(_Event, "landed", False)
    return monkeypatch


GOOD, NAN, INFINITE = (
    torch.randn(1, 3, 4, 4),
    torch.full((1, 3, 4, 4), float("nan")),
    torch.full((1, 3, 4, 4), float("inf")),
)


def upsample(logits, **options):
    return ok.upsample_argmax(logits, (8, 8), **options)


def window(logits, **options):
    return ok.window_argmax(
        logits, torch.zeros(1, 2, dtype=torch.int64), (8, 8), (8, 8), (8, 8), **options
    )


def one(value):
    x = GOOD.clone()
    x[0, 1, 2, 3] = value
    return x


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: upsample(one(float("nan"))), "upsample_argmax: logits or bias holds NaN"),
        (lambda: upsample(NAN.half()), "upsample_argmax: logits or bias holds NaN"),
        (lambda: upsample(GOOD, bias=NAN[0, :, 0, 0]), "upsample_argmax: logits or bias holds NaN"),
        (
            lambda: window(one(float("nan"))),
            r"window_argmax: logits, tables or bias holds NaN or \+infinity",
        ),
        (
            lambda: window(one(float("inf"))),
            r"window_argmax: logits, tables or bias holds NaN or \+infinity",
        ),
        (
            lambda: window(GOOD, bias=INFINITE[0, :, 0, 0]),
            r"window_argmax: logits, tables or bias holds NaN or \+infinity",
        ),
        (
            lambda: window(GOOD, tables=NAN[0, :, :, 0][None]),
            r"window_argmax: logits, tables or bias holds NaN or \+infinity",
        ),
        (
            lambda: window(one(float("-inf")), activation="softmax"),
            "holds NaN or an infinity; expected finite numbers for softmax",
        ),
        (
            lambda: window(one(float("nan")), activation="softmax"),
            "holds NaN or an infinity; expected finite numbers for softmax",
        ),
    ],
)
def test_what_the_device_finds_is_raised_later(call, message, deferring):
    labels = call()  # does not raise
    assert int(labels.min()) >= 0 and int(labels.max()) < 5
    upsample(GOOD)  # nothing has arrived yet
    _Event.landed = True
    with pytest.raises(
        ValueError, match=f"an earlier call of .*{message}.*OVSEG_CHECK=1 raises in the call itself"
    ):
        upsample(GOOD)
    for _ in range(4):
        window(GOOD)  # raised once
    ok.check_errors()


def far(value, place=-1):
    """Good numbers but one, of which no output sees much."""
    x = torch.randn(2, 3, 5, 4)
    x.view(-1)[place] = value
    return x


def both_signs(apart):
    x = far(float("inf"), 0)
    x.view(-1)[apart] = -torch.inf
    return x


INF = float("inf")
OFF = torch.tensor([-INF, 0.0, 0.0])
PLACE = torch.tensor([[0, 0], [0, 3]])


def on_windows(x, **options):
    return lambda: ok.window_argmax(x, PLACE, (5, 4), (5, 7), (1, 1), **options)


FOUND = {  # which call raises the flag
    "upsample, NaN at the end": (True, lambda: ok.upsample_argmax(far(float("nan")), (1, 1))),
    "upsample, bias": (True, lambda: ok.upsample_argmax(far(1.0), (9, 9), bias=OFF * float("nan"))),
    "upsample, both signs in a class": (True, lambda: ok.upsample_argmax(both_signs(19), (9, 9))),
    "upsample, in two classes": (False, lambda: ok.upsample_argmax(both_signs(20), (9, 9))),
    "upsample, sign of the bias": (True, lambda: ok.upsample_argmax(far(INF, 9), (1, 1), bias=OFF)),
    "upsample, one sign": (False, lambda: ok.upsample_argmax(far(-INF), (9, 9), bias=OFF)),
    "windows, NaN at the end": (True, on_windows(far(float("nan")))),
    "windows, +infinity": (True, on_windows(far(INF, 25))),
    "windows, switched off": (False, on_windows(far(-INF), bias=OFF)),
    "windows, softmax": (True, on_windows(far(-INF), activation="softmax")),
    "windows, bias": (True, on_windows(far(1.0), bias=-OFF)),
    "windows, table": (True, on_windows(far(1.0), tables=far(INF)[:, :, 4, 1:].clone())),
    "windows, softmax with a bias": (False, on_windows(far(1.0), bias=OFF, activation="softmax")),
}


@pytest.mark.parametrize("backend", ["reference", "cuda-emulated"])
@pytest.mark.parametrize("case", FOUND)
def test_every_number_that_is_refused_raises_the_flag(case, backend, deferring):
    """By the kernel itself, wherever the number lies, and by no other."""
    raises, call = FOUND[case]
    with running_on(backend):
        call()
    with pytest.raises(ValueError) if raises else contextlib.nullcontext():
        ok.check_errors()


class _Calls(TorchDispatchMode):
    """The names of all operators but views."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is not torch.ops.aten.detach.default:
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_labels_and_their_flags_are_one_launch(deferring):
    upsample(GOOD)  # makes the flags; its copy is on the way
    bias, origins = torch.zeros(3), torch.zeros(1, 2, dtype=torch.int64)
    with _Calls() as calls:
        ok.upsample_argmax(GOOD, (8, 8), bias=bias)
        ok.window_argmax(GOOD, origins, (8, 8), (8, 8), (8, 8), bias=bias, activation="sigmoid")
    assert calls.names == ["upsample_argmax_flagging", "window_argmax_flagging"]


def test_an_error_behind_a_copy_that_has_left_comes_with_the_next(deferring):
    upsample(GOOD)  # its copy is on the way
    upsample(NAN)
    _Event.landed = True
    upsample(GOOD)
    with pytest.raises(ValueError, match="logits or bias holds NaN"):
        upsample(GOOD)


def test_what_is_no_error_is_not_raised(deferring):
    _Event.landed = True
    off = GOOD.clone()
    off[:, 0] = -torch.inf
    for _ in range(3):
        (
            upsample(INFINITE),
            upsample(-INFINITE),
            upsample(GOOD[:0]),
            window(off),
            window(GOOD, activation="softmax", bias=off[0, :, 0, 0]),
        )
    ok.check_errors()


def test_check_errors_raises_all_and_forgets_them(deferring):
    ok.check_errors()  # nothing was called
    upsample(NAN)
    window(INFINITE)
    with pytest.raises(
        ValueError, match=r"an earlier call of upsample_argmax: .*; and of window_argmax: "
    ):
        ok.check_errors()
    ok.check_errors()


def test_a_captured_graph_flags_and_asks_nothing(deferring):
    """Inside a capture an event may not be asked, nor memory made that outlives it."""

    def asked(*_):
        raise AssertionError("asked during the capture")

    deferring.setattr(_checking, "capturing", lambda: True)
    deferring.setattr(_checking, "_event", asked)
    deferring.setattr(_Event, "query", asked)
    upsample(NAN)
    assert _checking._flags == {}
    deferring.setattr(_checking, "capturing", lambda: False)
    deferring.setattr(_checking, "_event", lambda x: _Event())
    upsample(GOOD)  # the warm-up
    deferring.setattr(_checking, "capturing", lambda: True)
    deferring.setattr(_checking, "_event", asked)
    upsample(NAN)
    with pytest.raises(ValueError, match="upsample_argmax: logits or bias holds NaN"):
        ok.check_errors()


def test_flags_outlive_the_mode_of_the_first_call(deferring):
    with torch.inference_mode():
        upsample(GOOD)
    upsample(NAN)
    with torch.inference_mode(), pytest.raises(ValueError, match="logits or bias holds NaN"):
        ok.check_errors()
    upsample(GOOD)


WINDOWS = {  # what a GPU is not asked about
    "fine": [[0, 0], [2, 2]],
    "outside": [[-5, 3], [100, -7]],
    "far outside": [[-(2**63), -(2**63)], [2**63 - 1, 3 - 2**63]],
    "not covering": [[0, 0], [0, 0]],
}


@pytest.mark.parametrize("backend", parameters(of=("upsample_argmax", "window_argmax")))
@pytest.mark.parametrize(
    "origins", [pytest.param(value, id=name) for name, value in WINDOWS.items()]
)
def test_what_is_not_looked_at_gives_some_class(origins, backend, monkeypatch):
    """Whatever logits and origins hold: every label is that of a class, and no memory beyond the
    tensors is touched.
    """
    if backend == "cpu" and origins != WINDOWS["fine"]:
        pytest.skip("the CPU looks at its origins")
    monkeypatch.setattr(_checking, "looks_at_values", lambda x: False)
    device, size = device_of(backend), (20, 37)
    place = torch.tensor(origins, device=device)
    for share in (0.1, 1.0):
        logits, tables = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 6)
        for x in (logits, tables):
            x[torch.rand(x.shape) < share] = float("nan")
        logits, tables, names = (
            logits.to(device),
            tables.to(device),
            torch.arange(10, 16, device=device),
        )
        with running_on(backend):
            found = [
                ok.upsample_argmax(logits, size, class_labels=names[:5], return_value=wanted)
                for wanted in (False, True)
            ]
            found = [found[0], found[1][0]]
            for activation, stage in itertools.product(
                (None, "sigmoid", "softmax"), ("window", "output")
            ):
                options = {"activation": activation, "stage": stage, "class_labels": names[:5]}
                found.append(ok.window_argmax(logits, place, (6, 6), (8, 8), size, **options))
            found.append(
                ok.window_argmax(
                    logits, place, (6, 6), (8, 8), size, tables=tables, class_labels=names
                )
            )
        for labels in found:
            assert int(labels.min()) >= 10 and int(labels.max()) < 16


@pytest.mark.parametrize(
    "config,device",
    [("cpu:gloo,cuda:nccl", "cpu"), ("cpu:gloo,cuda:gloo", "cpu"), ("cuda:nccl", "meta")],
)
def test_sizes_of_ranks_travel_beside_the_device(config, device, monkeypatch):
    seen = []
    monkeypatch.setattr(_distributed.dist, "get_backend_config", lambda group: config)
    monkeypatch.setattr(_distributed.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(
        _distributed.dist, "all_gather", lambda found, mine, group: seen.append(mine.device.type)
    )
    with contextlib.suppress(
        RuntimeError
    ):  # a meta tensor stands for the device, and has no numbers
        _distributed.sizes_of_ranks((3, 4), None, torch.device("meta"))
    assert seen == [device]


@operators_on(MAKERS, GPU)
def test_torch_sees_no_synchronisation_on_a_gpu(op, backend):
    """torch's own debug mode, on the real device."""
    for sample in MAKERS[op](torch.float32, device_of(backend)):

        def run(sample=sample):
            out = sample.call(*sample.tensors)
            if not sample.discrete:
                torch.autograd.grad(out.sum(), sample.tensors, allow_unused=True)

        with running_on(backend):
            run()  # what is made once
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                run()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    ok.check_errors()


@pytest.mark.parametrize("backend", parameters(GPU, of="window_argmax"))
def test_a_graph_of_a_gpu_flags_at_every_replay(backend):
    device = device_of(backend)
    logits, origins = (
        torch.randn(2, 3, 4, 4, device=device),
        torch.tensor([[0, 0], [0, 4]], device=device),
    )

    def run():
        return ok.window_argmax(logits, origins, (8, 8), (8, 12), (16, 24))

    with running_on(backend):
        expected = run()
        ok.check_errors()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        graph.replay()
        assert torch.equal(found, expected)
        ok.check_errors()
        logits.fill_(float("nan"))
        graph.replay()
        with pytest.raises(ValueError, match="an earlier call of window_argmax"):
            ok.check_errors()
