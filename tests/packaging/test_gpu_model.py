"""The model of time on a GPU: its arithmetic, its cover, and the rates that replace its own."""

import json

import pytest
from native_build import ROOT

from benchmarks import gpu_model, gpu_passes
from benchmarks.gpu_model import Before, Device, Pass, Work
from ovseg_kernels import _library, _selection

# Round numbers, for arithmetic by hand.
ROUND = Device(
    "round",
    {"bfloat16": 500.0, "tf32": 250.0},
    copy=2.0,
    l2=5.0,
    multiprocessors=100,
    ghz=1.0,
    mufu=10,
    issue=4,
    gap_us=1.0,
    launch_us=5.0,
)


def test_a_kernel_takes_as_long_as_the_slowest_of_what_it_asks_for():
    work = Work(
        "some_kernel", flops=1e12, l2=2e10, memory=2e9, mufu=1e9, instructions=8e8, launches=3
    )
    assert work.bounds(ROUND) == pytest.approx(
        {"tensor": 2.0, "L2": 4.0, "memory": 1.0, "MUFU": 1.0, "issue": 2.0}
    )
    assert work.milliseconds(ROUND) == pytest.approx(4.0)
    product = Work("library", flops=1e12, dtype="tf32", library=True)
    assert product.bounds(ROUND)["tensor"] == pytest.approx(4.0 / gpu_model.LIBRARY)
    one = Pass("op", "forward", "triton", "some", (work, work), flops=2e12)
    assert one.milliseconds(ROUND) == pytest.approx(4 + 4 + 6 * 0.001)
    assert one.slowest(ROUND) == "L2"


def test_the_host_bounds_what_is_short():
    short = Work("some_kernel", memory=2e3, launches=4)
    one = Pass("op", "forward", "cuda", "some", (short,), bytes=2e3)
    assert one.milliseconds(ROUND) == pytest.approx(0.020)
    assert one.slowest(ROUND) == "launches"
    assert one.share(ROUND) == "0 % of copy"


def test_one_pass_by_hand():
    """contrastive_loss: 256 x 256 tiles, each reads 256 rows of 512 numbers of two bytes."""
    forward, backward = gpu_passes.contrastive_loss(32768, 512)
    stats = next(w for w in forward.work if w.kernel == "contrastive_loss_stats_kernel")
    assert stats.flops == 2 * 32768**2 * 512 == forward.flops
    assert stats.l2 == 65536 * 256 * 512 * 2
    assert stats.flops / stats.l2 == 64
    assert backward.flops == 3 * forward.flops
    assert forward.before == (
        Before("cuda", *[pytest.approx(1e3 * forward.flops / 790e12 / 0.02)] * 2),
        Before("triton", *[pytest.approx(1e3 * forward.flops / 790e12 / 0.06)] * 2),
    )


def test_every_operator_and_pass_is_there():
    found = {(one.operator, one.name.split(",")[0]) for one in gpu_passes.passes()}
    wanted = {(operator, "forward") for operator in _library.OPERATOR_OF.values()}
    for schema, operator in _library.OPERATOR_OF.items():
        if schema.endswith("_backward"):
            wanted.add((operator, "backward"))
    assert wanted <= found, wanted - found


def test_measured_rates_take_the_place_of_assumptions(tmp_path):
    rows = [
        {"op": "environment"},
        {"op": "roofline", "rate": "bfloat16", "tflops": 700.0},
        {"op": "roofline", "rate": "copy", "gb_per_s": 4000},
        {"op": "roofline", "rate": "L2 read", "failed": "triton is not installed"},
        {"op": "roofline", "rate": "launch", "host_us": 4.0, "replay_us": 1.5},
    ]
    device = gpu_model.H200.measured(rows)
    assert not device.assumed and device.tflops["bfloat16"] == 700.0 and device.copy == 4.0
    assert device.tflops["tf32"] == gpu_model.H200.tflops["tf32"]
    assert (device.l2, device.gap_us, device.launch_us) == (gpu_model.H200.l2, 1.5, 4.0)
    with pytest.raises(ValueError, match="no row of a rate"):
        gpu_model.H200.measured(rows[:1])


def test_tables_say_that_they_are_a_model(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["gpu_model", "--kernels"])
    gpu_model.main()
    printed = capsys.readouterr().out
    assert printed.startswith("A model. Every time below is computed, none was measured.")
    assert "no GPU has run this" in printed
    assert all(one.operator in printed for one in gpu_passes.passes())
    file = tmp_path / "rates.jsonl"
    file.write_text(json.dumps({"op": "roofline", "rate": "copy", "gb_per_s": 3000}) + "\n")
    monkeypatch.setattr("sys.argv", ["gpu_model", "--rates", str(file)])
    gpu_model.main()
    printed = capsys.readouterr().out
    assert "rates of rates.jsonl" in printed and "no GPU has run this" not in printed


def test_the_page_shows_what_the_model_says():
    """docs/gpu.md: the table of times, and what answers each pass, as the library chooses it."""
    page = (ROOT / "docs" / "gpu.md").read_text()
    table = gpu_model.table(gpu_passes.passes(), [gpu_model.H100, gpu_model.H200])
    assert table in page, f"docs/gpu.md has another table than the model:\n{table}"
    names = {"cuda": "CUDA", "triton": "Triton"}
    for schema, rules in _selection.TABLE.items():
        first = next(rule for rule in rules if not rule.float64).order[0]
        assert f"| `{schema}` | {names[first]} |" in page, schema
    assert "No GPU has run any of this" in page[:200]
