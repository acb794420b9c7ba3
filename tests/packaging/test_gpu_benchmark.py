"""The GPU benchmark's own logic, with clock, allocator and device replaced: what it writes, in
which order, and what it refuses.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ovseg_benchmarks import gpu, lines, registry, show
from ovseg_benchmarks.registry import FUSED
from ovseg_benchmarks.supervise import AGAIN
from stand_in import CASES, StandIn

import ovseg_kernels as ok
from ovseg.cli.main import main as ovseg
from ovseg_kernels import _backends

ROOT = Path(__file__).parents[2]
PLAIN = (CASES[0], CASES[2])  # nothing that torch.compile would have to compile


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    """Even asking for torch.compile imports for seconds."""
    monkeypatch.setattr(torch, "compile", lambda function: function)


def rows_of(path):
    rows, cut = lines.read(path)
    assert cut == 0
    return rows


def test_ours_first_then_eager_then_compile_then_the_rest(monkeypatch):
    """What answers by itself is a row of its own where it is none of the others."""
    there = {"cuda": "cuda cuda", "triton": "triton triton", "auto": "cuda cuda"}
    forced = _backends.forced
    monkeypatch.setattr(gpu, "answers", lambda op, device: there[forced()])
    missing = set()
    monkeypatch.setattr(gpu, "lacks", lambda op, backend: (op, backend) in missing)
    planned = list(gpu.plan(CASES, ("cuda", "triton")))
    keys, labels = [p.key for p in planned], [p.label for p in planned]
    assert list(dict.fromkeys(labels)) == [
        "ovseg (cuda)",
        "ovseg (triton)",
        "eager",
        "torch.compile",
        "eager, 10 classes at a time",
    ]
    assert len(keys) == len(set(keys)) == 4 + 4 + 4 + 1 + 1
    assert labels == sorted(labels, key=list(dict.fromkeys(labels)).index)
    missing.add(("upsample_argmax", "triton"))
    assert {p.case.op for p in gpu.plan(CASES, ("triton",)) if p.backend == "triton"} == {
        "patch_text_similarity",
        "contrastive_loss",
    }
    there["auto"] = "triton cuda"
    assert labels.count("ovseg (auto)") == 0
    assert [p.label for p in gpu.plan(CASES, ("cuda", "triton"))].count("ovseg (auto)") == 4


def test_rows(tmp_path):
    """Forward and backward apart, their shares of both rates, the switch for tf32, memory."""
    out = tmp_path / "deep" / "x.jsonl"
    assert gpu.run(StandIn(), out, budget=100, cases=PLAIN) == 0
    found = lines.finished(rows_of(out))
    assert list(found) == [p.key for p in gpu.plan(PLAIN, ("cpu",))] == lines.planned(rows_of(out))
    forward, backward = registry.useful_flops(CASES[0])
    assert forward + backward == 3 * 5 * (2 * 7 * (8 + 7) + 6 * 7 * 8 + 4 * 7 * 7)
    for row in found.values():
        assert (
            row["forward_ms"] == row["backward_ms"] == 2.0
            and row["ms"] == 4.0
            and row["forward_ms_p80"] == 3.0
        )
        for part in ("forward", "backward"):
            assert f"{part}_percent_of_product" in row and f"{part}_percent_of_copy" in row
        assert show.share(row).endswith("% of product")
        assert ("allow_tf32" in row) == (row["dtype"] == "float32") and row["extra_mib"] <= 3
        assert ("passes" in row) == (row["implementation"] == "ovseg (cpu)")
        assert row["implementation"] != "eager" or row["difference"] <= gpu.TOLERANCE[row["dtype"]]
    row = found["patch_text_similarity small float32 ovseg (cpu)"]
    assert row["forward_gb_per_s"] == round(4 * (3 * 7 * 8 + 5 * 8 + 3 * 5) / 2.0 / 1e6, 1)


def test_a_file_that_the_driver_has_begun(tmp_path):
    """Its line of the run's beginning is no row of an earlier process."""
    out = tmp_path / "x"
    lines.Lines(out).write({"op": "environment", "run": "a"})
    assert gpu.run(StandIn(), out, budget=100, cases=CASES[2:], again="a") == 0
    assert all("ms" in row for row in lines.finished(rows_of(out)).values())


def test_a_rate_that_fails_ends_no_row(tmp_path):
    class NoTriton(StandIn):
        def rates(self, seconds):
            yield from list(super().rates(seconds))[:5]
            raise RuntimeError("no L2 read")

    assert gpu.run(NoTriton(), tmp_path / "x", budget=100, cases=CASES[2:], measure="rates") == 0
    assert "L2" in show.tables(tmp_path / "x")
    assert gpu.run(NoTriton(), tmp_path / "y", budget=100, cases=CASES[2:]) == 0


def test_a_step_that_no_graph_can_capture(tmp_path):
    class Waits(StandIn):
        def replay_us(self, function, seconds):
            raise RuntimeError("operation not permitted when stream is capturing")

    assert gpu.run(Waits(), tmp_path / "x", budget=100, cases=CASES[2:], measure="calls") == 1
    found = lines.finished(rows_of(tmp_path / "x")).values()
    assert all("not permitted" in row["replay_failed"] and row["wall_us"] == 50 for row in found)
    assert "not permitted" in show.tables(tmp_path / "x")


def test_the_rate_of_l2_is_that_of_bytes_which_are_read():
    from ovseg_benchmarks.l2_read import BLOCK, read

    x = torch.arange(3.0 * BLOCK)
    found = read(x, programs=2, steps=4)  # blocks 0, 2, 1, 0 and 1, 0, 2, 1
    sums = x.view(3, BLOCK).sum(1)
    torch.testing.assert_close(found, torch.stack([sums.sum() + sums[0], sums.sum() + sums[1]]))


def test_a_picture_of_a_run(tmp_path, monkeypatch):
    """Every row is in it, with its reason where it has no time."""
    plot = pytest.importorskip("ovseg_benchmarks.plot")
    figure = pytest.importorskip("matplotlib.figure")
    right = registry.implementations
    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(
        figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))
    )

    def raising(**_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(registry, "implementations", lambda case: {**right(case), "eager": raising})
    for name in ("times", "calls"):
        gpu.run(StandIn(), tmp_path / name, budget=100, cases=PLAIN, measure=name)
    files = [tmp_path / "times", tmp_path / "calls"]
    assert plot.draw(files, tmp_path / "x.png").stat().st_size > 10_000
    steps, calls = drawn[0].axes
    labels = [tick.get_text() for tick in steps.get_yticklabels()]
    assert labels.count("ovseg (cpu)") == labels.count("eager") == 3 and len(labels) == 9
    told = [[text.get_text().strip() for text in ax.texts] for ax in (steps, calls)]
    assert all(words.count("out of memory") == 3 and len(words) == 6 for words in told)
    assert "2 + 2 ms" in told[0][0] and "% of product" in told[0][0] and "50 us" in told[1][0]
    (tmp_path / "none").write_text('{"op": "environment"}\n')
    with pytest.raises(ValueError, match="no row that was timed"):
        plot.draw([tmp_path / "none"], tmp_path / "y.png")


def test_every_row_has_its_share_of_what_bounds_it():
    assert show.share({"percent_of_copy": 3.1, "percent_of_product": 41.2}) == "41.2% of product"
    assert show.share({"percent_of_copy": 71.0}) == "71.0% of copy"
    assert show.share({"failed": "out of memory"}) == ""


def test_a_compiled_row_and_labels(tmp_path):
    assert gpu.run(StandIn(), tmp_path / "x", budget=100, cases=CASES[1:2]) == 0
    found = lines.finished(rows_of(tmp_path / "x"))
    assert [row["implementation"] for row in found.values()] == [
        "ovseg (cpu)",
        "eager",
        "torch.compile",
        "eager, 10 classes at a time",
    ]
    assert all("backward_ms" not in row and row["ms"] == 2.0 for row in found.values())


def test_different_values_are_not_timed(tmp_path, monkeypatch):
    right = registry.implementations

    def wrong(case):
        found = right(case)
        return {**found, FUSED: lambda **x: 1.5 * found[FUSED](**x)}

    monkeypatch.setattr(registry, "implementations", wrong)
    assert gpu.run(StandIn(), tmp_path / "x", budget=100, cases=PLAIN) == 1
    eager = [
        row
        for row in lines.finished(rows_of(tmp_path / "x")).values()
        if row["implementation"] == "eager"
    ]
    assert eager and all(
        "values differ from ovseg (cpu)" in row["failed"] and "ms" not in row for row in eager
    )


def test_a_failing_row_stops_nothing(tmp_path, monkeypatch):
    right = registry.implementations

    def raising(**_):
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(
        registry,
        "implementations",
        lambda case: {**right(case), **({FUSED: raising} if case is CASES[0] else {})},
    )
    assert gpu.run(StandIn(), tmp_path / "x", budget=100, cases=PLAIN) == 1
    found = lines.finished(rows_of(tmp_path / "x"))
    assert found["patch_text_similarity small float32 ovseg (cpu)"]["failed"] == "out of memory"
    assert "ms" in found["contrastive_loss small float32 ovseg (cpu)"]


def test_what_time_did_not_allow_is_written_down(tmp_path):
    device = StandIn(took=10)  # a row takes twenty seconds
    gpu.run(device, tmp_path / "x", budget=50, cases=PLAIN)
    found = list(lines.finished(rows_of(tmp_path / "x")).values())
    assert [("ms" in row) for row in found] == [True, True, True] + [False] * (
        len(found) - 3
    ) and len(found) == 6
    assert all(row["failed"] == "not measured: the time was spent" for row in found[3:])
    assert device.clock() == 60


def test_a_lost_context_ends_the_process_and_the_next_goes_on(tmp_path, monkeypatch):
    right, calls = registry.implementations, []

    def lost(**_):
        calls.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(
        registry,
        "implementations",
        lambda case: {**right(case), **({FUSED: lost} if case is CASES[2] else {})},
    )
    out = tmp_path / "x"
    assert gpu.run(StandIn(), out, budget=100, cases=PLAIN, again="a") == AGAIN
    assert gpu.run(StandIn(), out, budget=100, cases=PLAIN, again="a") == 1
    found = lines.finished(rows_of(out))
    assert (
        len(found) == 6
        and "illegal memory" in found["contrastive_loss small float32 ovseg (cpu)"]["failed"]
    )
    assert len([row for row in rows_of(out) if row.get("op") == "environment"]) == 1
    assert "ms" in found["patch_text_similarity small float32 eager"] and len(calls) == 1
    # A new run measures everything anew.
    monkeypatch.setattr(registry, "implementations", right)
    assert gpu.run(StandIn(), out, budget=100, cases=PLAIN, again="b") == 0
    assert all("failed" not in row for row in lines.finished(rows_of(out)).values())
    assert "earlier runs" in show.tables(out)


def test_a_killed_bench_leaves_rows_that_show_reads(tmp_path, capsys):
    """SIGKILL in the middle of a row: all rows before it are there, the file says where it was, and
    the same run goes on.
    """
    out = tmp_path / "bench.jsonl"
    code = (
        "import sys, torch; torch.compile = lambda f: f; sys.path.insert(0, sys.argv[1]);"
        "from stand_in import CASES, StandIn; from ovseg_benchmarks import gpu;"
        f"gpu.run(StandIn(pause=0.3), {str(out)!r}, budget=100, cases=(CASES[0], CASES[2]), "
        "again='a')"
    )
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(Path(__file__).parent)],
        stdout=subprocess.DEVNULL,
    )
    deadline, rows = time.monotonic() + 60, []
    while time.monotonic() < deadline and not (
        len(lines.finished(rows)) > 1 and lines.unfinished(rows)
    ):
        time.sleep(0.02)
        rows = lines.read(out)[0] if out.exists() else []
    process.send_signal(signal.SIGKILL)
    process.wait()
    with open(out, "ab") as file:
        file.write(b'{"key": "cut in the mid')  # as a full disk or a lost machine would leave it
    done = lines.finished(lines.read(out)[0])
    assert 2 <= len(done) < 6 and all(row["ms"] == 4.0 for row in done.values())
    assert ovseg(["bench", "show", str(out)]) == 0
    text = capsys.readouterr().out
    assert text.count("2.000 (1.000-3.000)") == 2 * len(done) and "1 line cut off" in text
    assert "was running when it was killed" in text and "not reached: " in text
    assert gpu.run(StandIn(), out, budget=100, cases=PLAIN, again="a") == 0
    rows = lines.read(out)[0]
    assert len(lines.finished(rows)) == 6 and len([row for row in rows if "key" in row]) == 6


def test_show_refuses_what_holds_no_results(tmp_path, capsys):
    (tmp_path / "x").write_text("nothing\n")
    assert ovseg(["bench", "show", str(tmp_path / "x")]) == 2
    assert "holds no row of results" in capsys.readouterr().err
    assert ovseg(["bench", "show"]) == 2


def test_show_reads_the_json_of_ovseg_bench(capsys):
    assert (
        ovseg(
            [
                "bench",
                "show",
                str(ROOT / "benchmarks" / "results" / "cpu" / "2026-11-21-resolution.json"),
            ]
        )
        == 0
    )
    assert "| upsample_argmax | structured | eager |" in capsys.readouterr().out


def test_inputs_are_drawn_on_the_device(monkeypatch):
    """Every random number: 8 GB from the host would take half a minute."""
    places = []
    for name in ("randn", "rand", "randint"):
        right = getattr(torch, name)

        def drawn(*args, right=right, **kwargs):
            places.append((kwargs["device"], kwargs["generator"].device.type))
            return right(*args, **kwargs)

        monkeypatch.setattr(torch, name, drawn)
    for case in registry.GPU_CASES:
        small = registry.Case(
            case.op, case.name, {k: min(v, 32) for k, v in case.shape.items()}, case.options
        )
        count = len(places)
        tensors = registry.inputs(small, device="cpu")
        assert len(places) > count and all(bool(x.isfinite().all()) for x in tensors.values())
    assert set(places) == {("cpu", "cpu")}


def test_16_bit_baselines_compute_in_16_bits():
    """Their products, that is; the definition would compute them in float32, which no user does."""
    small = {"B": 4, "T": 4, "N": 20, "D": 24, "L": 30, "G": 4, "groups": 3}
    for case in registry.GPU_CASES:
        if "bfloat16" not in case.dtypes or "eager" not in registry.implementations(case):
            continue
        options = case.options | ({"k_pos": 3, "k_neg": 5} if "k_pos" in case.options else {})
        case = registry.Case(case.op, case.name, {k: small[k] for k in case.shape}, options)
        seen = []

        class Products(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None, seen=seen):
                if function.overloadpacket in (
                    torch.ops.aten.mm,
                    torch.ops.aten.bmm,
                    torch.ops.aten.addmm,
                ):
                    seen.append(args[-1].dtype)
                return function(*args, **(kwargs or {}))

        with Products():
            registry.implementations(case)["eager"](**registry.inputs(case, torch.bfloat16))
        assert seen and set(seen) == {torch.bfloat16}, (case, seen)


def test_every_case_of_the_issue_is_there():
    shapes = {(case.op, case.shape.get("B"), case.shape.get("L")) for case in registry.GPU_CASES}
    assert ("center_assignment", 768, 784) in shapes
    for op in (
        "contrastive_loss",
        "folded_center_assignment",
        "segclip_center_assignment",
        "dense_contrastive_loss",
    ):
        assert next(case for case in registry.GPU_CASES if case.op == op).dtypes[0] == "bfloat16"


def test_what_a_gpu_is_asked_first():
    first = {(case.op, case.name): case for case in registry.FIRST_CASES}
    assert len(first) == len(registry.FIRST_CASES) == 11
    assert {"siglip-kernel", "eager"} <= set(first["contrastive_loss", "sigmoid-32768"].only)
    assert "Inf-CLIP's form" in first["contrastive_loss", "softmax-4096"].only
    patches = first["patch_text_similarity", "vector-4096"]
    assert patches.shape == {"B": 4096, "T": 4096, "N": 196, "D": 512}
    assert {case.op for case in registry.SMALL_CASES} == set(ok.OPERATORS)
    for case in (*registry.FIRST_CASES, *registry.SMALL_CASES):
        assert set(case.only) <= set(registry.implementations(case))
