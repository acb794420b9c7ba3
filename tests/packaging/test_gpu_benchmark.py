"""The GPU benchmark's own logic, with the clock and the allocator of CUDA replaced: what it writes, and what it refuses."""

import json

import pytest
import torch

pytest.importorskip("triton")
from ovseg_benchmarks import gpu, registry
from ovseg_benchmarks.registry import FUSED, Case


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "do_bench", lambda function, **_: (function(), [1.0, 2.0, 3.0])[1])
    monkeypatch.setattr(gpu, "rooflines", lambda seconds: [{"op": "roofline", "dtype": d, "tflops": 100.0} for d in gpu.DTYPES])
    monkeypatch.setattr(gpu, "environment", lambda: {"op": "environment", "device": "none"})
    monkeypatch.setattr(gpu, "ours", lambda: {f"{FUSED} (cpu)": "cpu"})
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    small = Case("patch_text_similarity", "small", {"B": 3, "T": 5, "N": 7, "D": 8}, {"temperature": 0.1}, only=(FUSED, "eager"))
    monkeypatch.setattr(gpu, "GPU_CASES", (small,))
    return small


def test_rows(on_cpu, tmp_path):
    out = tmp_path / "deep" / "x.jsonl"
    assert gpu.run(str(out), 0.1, 100) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    measured = [row for row in rows if row["op"] == "patch_text_similarity"]
    assert {(row["dtype"], row["implementation"]) for row in measured} == {(d, i) for d in gpu.DTYPES for i in ("eager", f"{FUSED} (cpu)")}
    flops = registry.useful_flops(on_cpu)
    assert flops == 3 * 5 * (2 * 7 * (8 + 7) + 6 * 7 * 8 + 4 * 7 * 7)
    for row in measured:
        assert row["ms"] == 2.0 and row["tflops"] == round(flops / 2e-3 / 1e12, 1) and "percent_of_product" in row
        assert row["difference_from_eager"] <= gpu.TOLERANCE[row["dtype"]]


def test_a_wrong_kernel_is_not_timed(on_cpu, tmp_path, monkeypatch):
    right = registry.implementations(on_cpu)
    monkeypatch.setattr(registry, "implementations", lambda case: {**right, FUSED: lambda **x: 1.5 * right[FUSED](**x)})
    out = tmp_path / "x.jsonl"
    assert gpu.run(str(out), 0.1, 100) == 1
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    bad = [row for row in rows if row.get("implementation") == f"{FUSED} (cpu)"]
    assert bad and all("values differ" in row["failed"] and "ms" not in row for row in bad)


def test_what_time_did_not_allow_is_written_down(on_cpu, tmp_path):
    out = tmp_path / "x.jsonl"
    gpu.run(str(out), 0.1, budget=-1)
    rows = [json.loads(line) for line in out.read_text().splitlines() if "patch_text" in line]
    assert len(rows) == len(gpu.DTYPES) and all(row["failed"] == "not measured: the time was spent" for row in rows)
