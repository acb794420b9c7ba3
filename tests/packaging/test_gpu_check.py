"""scripts/gpu_check.sh without a GPU: every verb with clock, runner and device replaced; workers
that hang, die, are killed.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from backends import has

import ovseg_kernels as ok
from ovseg.cli.main import main as ovseg
from ovseg_kernels import _build

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]
import gpu_check  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_small  # noqa: E402
import gpu_smoke  # noqa: E402
from stand_in import CASES, StandIn  # noqa: E402

from benchmarks import gpu, lines, supervise  # noqa: E402
from benchmarks.supervise import Job, Outcome  # noqa: E402

VERBS = gpu_check.VERBS


class DryRun:
    """In place of processes: every job takes ``takes`` of what it is allowed, on a clock of its
    own.
    """

    def __init__(self, results, takes=1.0, status=0, output=""):
        self.now, self.takes, self.status, self.output = 1000.0, takes, status, output
        self.jobs, self.limits, self.said, self.writes = [], [], [], {}
        self.place = gpu_check.Place(
            "fake",
            "9.0",
            results,
            results / "work",
            cores=16,
            run=self.run,
            clock=lambda: self.now,
            missing=lambda name: False,
            tool=lambda name: f"/bin/{name}",
            say=self.said.append,
            date="2026-01-01",
        )

    def run(self, jobs, *, workers, until, logs, results=None, report=None, tick=None):
        """As supervise.run would at worst: as many at once as ``workers``, none beyond ``until``."""
        free, outcomes = [self.now] * workers, []
        for job in jobs:
            begin = min(free)
            limit = min(job.limit, until - begin)
            self.jobs.append(job)
            self.limits.append(limit)
            if limit < 2 * supervise.GRACE:
                outcomes.append(Outcome(job.name, None, 0.0, "not reached: the time was spent"))
            else:
                free[free.index(begin)] = begin + limit * self.takes
                outcomes.append(Outcome(job.name, self.status, limit * self.takes, "", self.output))
            for path in self.place.results.glob("*.jsonl"):
                self.writes.setdefault(path.name, path.stat().st_size)
            report(outcomes[-1])
        self.now = max(free)
        tick()
        return outcomes


@pytest.mark.parametrize("verb", VERBS)
def test_limits_add_up_to_eight_minutes_and_nine_for_the_first(verb):
    parts = gpu_check.limits(verb)
    longest = gpu_check.LONGEST[verb]
    assert longest == (540 if verb == "first" else 480)
    assert gpu_check.FACTS + sum(sum(steps.values()) for steps in parts.values()) <= longest
    assert list(parts) == {
        "first": list(gpu_check.PARTS),
        "all": ["build", "smoke", "bench", "test", "sanitize"],
    }.get(verb, [verb])
    assert all(
        seconds > 2 * supervise.GRACE for steps in parts.values() for seconds in steps.values()
    )
    if "smoke" in parts and verb == "smoke":
        assert gpu_check.FACTS + sum(parts["smoke"].values()) <= 40


@pytest.mark.parametrize("verb", VERBS)
def test_dry_run(verb, tmp_path, monkeypatch):
    """Everything takes all the time it may, and nothing is ready: order, limits, and that the file
    is written before the work.
    """
    monkeypatch.setenv("RESULTS", str(tmp_path))
    dry = DryRun(tmp_path, status=1)
    began = dry.now
    assert gpu_check.main(verb, dry.place) == 1
    assert dry.now - began <= gpu_check.LONGEST[verb] - gpu_check.FACTS
    names = [job.name for job in dry.jobs]
    expected = {
        "build": ["prebuilt", "compile", "info"],
        "bench": ["compile", "bench"],
        "test": ["cuda tests", "triton tests"],
        "smoke": ["smoke"],
        "sanitize": ["memcheck", "racecheck", "initcheck", "synccheck"],
    }
    expected["all"] = [
        "prebuilt",
        "compile",
        "info",
        "smoke",
        "bench",
        *expected["test"],
        *expected["sanitize"],
    ]
    expected["first"] = [
        "prebuilt",
        "rates",
        "smoke",
        "compile",
        "bench",
        "kernels",
        "calls",
        "cuda tests",
        "memcheck",
        "racecheck",
    ]
    kinds = [next(kind for kind in expected[verb] if name.startswith(kind)) for name in names]
    assert list(dict.fromkeys(kinds)) == expected[verb]
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert len(files) <= 10 and not [
        path for path in tmp_path.iterdir() if path.is_dir() and path.name != "work"
    ]
    first = "first-" if verb == "first" else ""
    written = [f"2026-01-01-{first}{part}.jsonl" for part in gpu_check.limits(verb)]
    assert {*written, "2026-01-01.log"} <= set(files)
    assert all(dry.writes[name] > 0 for name in written), (
        "nothing was on the disk when the work began"
    )
    for name in written:
        assert ovseg(["bench", "show", str(tmp_path / name)]) == 0


def test_time_left_over_goes_to_the_next_step(tmp_path):
    dry = DryRun(tmp_path, takes=0.1)
    gpu_check.main("test", dry.place)
    by_step = {
        name: limit
        for job, limit in zip(dry.jobs, dry.limits, strict=True)
        for name in [job.name.rsplit(" ", 1)[0]]
    }
    assert by_step["cuda tests"] == 180 and by_step["triton tests"] == pytest.approx(
        180 * 0.9 + 290
    )


def test_prebuilt_libraries_are_accepted_as_they_are(tmp_path):
    dry = DryRun(tmp_path, output="prebuilt libraries accepted: source 1234, sm_90a\n")
    assert gpu_check.main("build", dry.place) == 0
    assert [job.name for job in dry.jobs] == ["prebuilt"] and "accepted" in "".join(dry.said)


def test_the_first_verb_compiles_no_library_and_goes_on_without(tmp_path):
    dry = DryRun(tmp_path, status=1, output="_C_cuda.so: not built")
    assert gpu_check.main("first", dry.place) == 1
    assert "no time to compile" in (tmp_path / "2026-01-01-first-build.jsonl").read_text()
    assert "_C_cuda.so: not built" in (tmp_path / "2026-01-01-first-rates.jsonl").read_text()
    assert len(dry.jobs) > 20 and "setup.py" not in [
        word for job in dry.jobs for word in job.command
    ]


def test_the_first_verb_sanitizes_what_changed(tmp_path):
    dry = DryRun(tmp_path)
    gpu_check.main("first", dry.place, ["center_assignment", "upsample_argmax"])
    watched = [job.name.split()[:2] for job in dry.jobs if "check " in job.name]
    assert {tuple(name) for name in watched} == {
        (tool, op)
        for tool in ("memcheck", "racecheck")
        for op in ("center_assignment", "upsample_argmax")
    }
    done = subprocess.run(
        [sys.executable, "scripts/gpu_check.py", "bench", "center_assignment"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "bench takes no operators" in done.stderr


def test_a_run_that_has_a_name_goes_on(tmp_path):
    """A killed one, with the sanitizer as it was and smoke to the end."""
    dry = DryRun(tmp_path, output=CLEAN)
    dry.place.run_id = "a"
    assert gpu_check.main("sanitize", dry.place) == 0
    found = len(dry.jobs)
    assert gpu_check.main("sanitize", dry.place) == 0 and len(dry.jobs) == found
    dry.place.run_id = "b"
    assert gpu_check.main("sanitize", dry.place) == 0 and len(dry.jobs) == 2 * found
    dry.place.run = lambda jobs, **_: [Outcome(job.name, None, 0.0, "not reached") for job in jobs]
    assert gpu_check.main("smoke", dry.place) == 1
    dry.place.run = lambda jobs, **_: [Outcome(job.name, 0, 1.0) for job in jobs]
    assert gpu_check.main("smoke", dry.place) == 0


def test_the_first_verb_measures_by_its_own_programs(tmp_path, monkeypatch):
    """What times, kernels and calls are written by, as its commands say, on a device that stands
    in.
    """
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda function: function)  # it imports for seconds
    monkeypatch.setattr(gpu, "Gpu", StandIn)
    monkeypatch.setattr(gpu, "CASES", dict.fromkeys(gpu.CASES, (CASES[0], CASES[2])))
    measured = ("rates", "bench", "kernels", "calls")
    monkeypatch.setattr(gpu_check, "FIRST", {name: {name: 60} for name in measured})

    def here(jobs, *, report, tick, **_):
        outcomes = []
        for job in jobs:
            monkeypatch.setattr("sys.argv", job.command[job.command.index("benchmarks.gpu") :])
            outcomes.append(Outcome(job.name, gpu.main(), 1.0))
            report(outcomes[-1])
            tick()
        return outcomes

    said = []
    place = gpu_check.Place("fake", "9.0", tmp_path, tmp_path / "work", run=here, say=said.append)
    assert gpu_check.main("first", place) == 0, "\n".join(said)
    found = {
        name: list(lines.finished(lines.read(path)[0]).values())
        for name in measured
        for path in tmp_path.glob(f"*-first-{name}.jsonl")
    }
    assert [len(found[name]) for name in measured] == [0, 6, 6, 6]
    assert all(row["ms"] == 4.0 for row in found["bench"])
    assert all(row["launches"] == 3 and row["kernels_us"] == 31.5 for row in found["kernels"])
    assert all(row["wall_us"] == 50.0 and row["replay_us"] == 40.0 for row in found["calls"])
    rows = {path: lines.read(path)[0] for path in tmp_path.glob("*.jsonl")}
    assert gpu_check.main("first", place) == 0, "the same run, once more"
    for path, before in rows.items():
        again = lines.read(path)[0][len(before) :]
        assert not [row for row in again if "key" in row or row.get("op") == "environment"], path
    text = "\n".join(said)
    assert "L2 read 5000 GB/s" in text and "product tf32 100.0 TFLOP/s" in text
    assert "| product_kernel | 2 | 30.0 |" in text and "| 20.0 | 50.0 | 40.0 |" in text


def test_the_build_uses_all_cores_and_writes_what_it_built_from():
    job = gpu_jobs.build("9.0", 16, 300)
    assert (
        job.environment["MAX_JOBS"] == "16"
        and job.environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
        and "setup.py" in job.command
    )
    assert gpu_jobs.build("8.6", 4, 300).environment["TORCH_CUDA_ARCH_LIST"] == "8.6"


def test_what_is_missing_is_said(tmp_path):
    needs = {
        "test": ("pytest", "hypothesis"),
        "build": ("nvcc", "numpy"),
        "sanitize": ("compute-sanitizer",),
        "smoke": ("triton",),
    }
    for verb, absent in ((verb, name) for verb, names in needs.items() for name in names):
        dry = DryRun(tmp_path / f"{verb}-{absent}", status=1)
        dry.place.missing = lambda name, absent=absent: name == absent
        dry.place.tool = lambda name, absent=absent: None if name == absent else "/x"
        assert gpu_check.main(verb, dry.place) == 1
        assert (
            absent in "\n".join(dry.said)
            and absent in (dry.place.results / f"2026-01-01-{verb}.jsonl").read_text()
        )


def test_smoke_bench_and_sanitize_need_neither_pytest_nor_hypothesis():
    code = (
        "import sys, gpu_smoke, gpu_small, gpu_jobs, benchmarks.gpu;"
        "print([m for m in ('pytest', 'hypothesis', 'triton') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    code = "import sys; sys.modules['torch'] = None; import gpu_check; print('no torch')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.strip() == "no torch", (
        done.stderr
    )  # the program that keeps the time cannot hang in a driver


def test_without_a_gpu_the_script_says_so(tmp_path):
    done = subprocess.run(
        [str(ROOT / "scripts" / "gpu_check.sh"), "smoke"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path)},
    )
    if not torch.cuda.is_available():
        assert done.returncode == 1 and "needs an NVIDIA GPU" in done.stderr


WORKER = """
import sys, time
sys.path.insert(0, {root!r})
from benchmarks import lines
file = lines.Lines({out!r}, worker="w")
have = lines.finished(lines.read({out!r})[0])
for key in ("good", "hangs", "dies", "lost", "last"):
    if key in have:
        continue
    file.start(key)
    print(key, flush=True)
    if key == "hangs":
        time.sleep(60)
    if key == "dies":
        import os, signal
        os.kill(os.getpid(), signal.SIGSEGV)
    file.write({{"key": key}})
    if key == "lost":
        sys.exit(70)
"""


def test_a_worker_that_hangs_or_dies_costs_its_own_row(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "GRACE", 0.3)
    out = tmp_path / "x.jsonl"
    job = Job(
        "w",
        [sys.executable, "-c", WORKER.format(root=str(ROOT), out=str(out))],
        30,
        resume=True,
        stall=0.7,
    )
    (outcome,) = supervise.run(
        [job],
        workers=1,
        until=time.monotonic() + 30,
        logs=tmp_path / "logs",
        results=lines.Lines(out),
    )
    found = lines.finished(lines.read(out)[0])
    assert list(found) == ["good", "hangs", "dies", "lost", "last"] and outcome.status == 0
    assert (
        found["hangs"]["failed"] == "did not come back: silent for 1 s"
        and "SIGSEGV" in found["dies"]["failed"]
    )
    assert not any("failed" in found[key] for key in ("good", "lost", "last"))


def test_limits_are_kept_and_the_rest_is_said(tmp_path, monkeypatch):
    """One that ignores being asked, its child, and two for which no time is left."""
    monkeypatch.setattr(supervise, "GRACE", 0.3)
    mark = tmp_path / "child"
    stubborn = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        f"subprocess.Popen(['sh', '-c', 'sleep 2.5; touch {mark}']); time.sleep(60)"
    )
    jobs = [Job(f"j{i}", [sys.executable, "-c", stubborn], 1.5) for i in range(3)]
    began = time.monotonic()
    found = supervise.run(jobs, workers=1, until=began + 1.8, logs=tmp_path / "logs")
    assert time.monotonic() - began < 2.6
    assert [o.status for o in found] == [-signal.SIGKILL, None, None]
    assert (
        "limit" in found[0].reason
        and "cannot be killed" not in found[0].reason
        and found[1].reason.startswith("not reached")
    )
    time.sleep(1.5)
    assert not mark.exists(), "a child of the killed worker lives on"


TESTS = """
import time, pytest
@pytest.mark.parametrize("i", range(40))
def test_it(i):
    time.sleep({pause})
    assert i != 3, "three is wrong"
"""


def small_suite(folder, pause):
    (folder / "test_it.py").write_text(TESTS.format(pause=pause))
    (folder / "pytest.ini").write_text("[pytest]\n")
    options = ("-q", "-p", "gpu_pytest", "-p", "no:cacheprovider", "--rootdir", str(folder))
    return [sys.executable, "-m", "pytest", str(folder / "test_it.py"), *options]


def test_a_killed_test_run_leaves_readable_results(tmp_path, capsys):
    """SIGKILL of the driver while its workers run: every test that had ended is there, and no
    worker lives on.
    """
    command = small_suite(tmp_path, 0.1)
    driver = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts")!r}]
from pathlib import Path
import gpu_check, gpu_jobs
old = gpu_jobs.tests
gpu_jobs.tests = lambda *a: [gpu_jobs.Job(j.name, {command!r}, j.limit, j.environment, resume=True) for j in old(*a)]
where = Path({str(tmp_path)!r})
gpu_check.main("test", gpu_check.Place("fake", "9.0", where / "results", where / "work", cores=2))
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    process = subprocess.Popen(
        [sys.executable, "-c", driver], env=environment, stdout=subprocess.DEVNULL
    )
    deadline, out = time.monotonic() + 60, None
    while time.monotonic() < deadline:
        out = (
            next((tmp_path / "results").glob("*-test.jsonl"), None)
            if (tmp_path / "results").exists()
            else None
        )
        keys = list(lines.finished(lines.read(out)[0])) if out else []
        if len(keys) >= 6 and any(key.endswith("[3]") for key in keys):
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    time.sleep(0.5)
    rows, _ = lines.read(out)
    time.sleep(0.5)
    assert lines.read(out)[0] == rows, "workers live on after their driver"
    done = lines.finished(rows)
    assert 6 <= len(done) < 40 and "three is wrong" in next(
        row["failed"] for key, row in done.items() if key.endswith("[3]")
    )
    assert ovseg(["bench", "show", str(out)]) == 0
    text = capsys.readouterr().out
    assert (
        f"cuda: {len(done) - 1} passed, 1 failed" in text
        and "not reached: " in text
        and "FAILED test_it.py::test_it[3]" in text
    )


def test_shards_share_all_tests_and_a_second_run_skips_them(tmp_path):
    command, out = small_suite(tmp_path, 0), tmp_path / "x.jsonl"
    running = [
        subprocess.Popen(
            [*command, "-k", "not 1"],
            stdout=subprocess.DEVNULL,
            env={
                **os.environ,
                "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}",
                "OVSEG_LINES": str(out),
                "OVSEG_SHARD": f"{i}/2",
                "OVSEG_WORKER": f"w{i}",
                "OVSEG_GROUP": "cuda",
            },
        )
        for i in range(2)
    ]
    assert sorted(process.wait() for process in running) == [0, 1]
    rows = lines.read(out)[0]
    keys = [row["key"] for row in rows if "key" in row]
    assert len(keys) == len(set(keys)) == 27 == len(lines.planned(rows))
    assert len({row["worker"] for row in rows}) == 2
    gpu_jobs.junit(out, "cuda", tmp_path / "x.xml")
    suite = ElementTree.parse(tmp_path / "x.xml").getroot()
    assert (
        suite.attrib["tests"] == "27"
        and suite.attrib["failures"] == "1"
        and len(suite.findall("testcase")) == 27
    )
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}",
            "OVSEG_LINES": str(out),
            "OVSEG_WORKER": "again",
        },
    )
    assert len([row for row in lines.read(out)[0] if "key" in row]) == 40, done.stdout


def test_files_with_property_tests_run_without_hypothesis(tmp_path):
    (tmp_path / "test_p.py").write_text(
        "from hypothesis import HealthCheck, given, settings\nfrom hypothesis import strategies "
        "as st\n"
        "@settings(max_examples=3, "
        "suppress_health_check=[HealthCheck.too_slow])\n@given(st.integers(1, 3).map(str), "
        "n=st.floats())\n"
        "def test_property(x, n): assert False\ndef test_plain(): pass\n"
    )
    code = (
        "import sys, gpu_pytest; [sys.modules.pop(m) for m in list(sys.modules) if "
        "m.startswith('hypothesis')];"
        "gpu_pytest.stand_in_for_hypothesis(); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(tmp_path),
            "-q",
            "-p",
            "no:hypothesispytest",
            "-p",
            "no:cacheprovider",
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"},
    )
    assert "1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr


def test_tests_run_cuda_first_and_triton_in_fourteen():
    cuda, triton = (
        gpu_jobs.tests(group, n, Path("x"), 100) for group, n in (("cuda", 8), ("triton", 14))
    )
    assert len(triton) == 14 and "cuda" in cuda[0].command and "not cuda" in triton[0].command
    assert {job.environment["OVSEG_SHARD"] for job in triton} == {f"{i}/14" for i in range(14)}
    assert "0.57 s (measured on another machine" in gpu_jobs.estimate(Path("/nowhere"), 14)


def test_the_estimate_uses_what_smoke_measured(tmp_path):
    lines.Lines(tmp_path / "2026-01-01-smoke.jsonl").write(
        {"compiled": 100, "compile_seconds": 400.0}
    )
    seconds = round(gpu_jobs.SPECIALISATIONS * 4.0 / 14)
    said = f"4.00 s (as smoke measured it here) in 14 processes: {seconds} s"
    assert said in gpu_jobs.estimate(tmp_path, 14)


def test_smoke_sees_every_operator_dtype_and_backend():
    assert set(gpu_jobs.OPERATORS) == set(gpu_small.CALLS) == set(ok.OPERATORS)
    seen = set()
    for job in gpu_jobs.smoke(Path("x"), 35):
        op, backend = job.command[job.command.index("scripts/gpu_smoke.py") + 1 :][:2]
        seen |= {(op, backend, dtype) for dtype in job.command[job.command.index("--dtypes") + 1 :]}
    for op in ok.OPERATORS:
        for backend in ("cuda", "triton"):
            assert gpu_jobs.has(op, backend) == has(op, backend)
            if not gpu_jobs.has(op, backend):
                continue
            assert {(op, backend, dtype) for dtype in ("float32", "bfloat16", "float16")} <= seen


def test_smoke_on_the_cpu(tmp_path):
    """The same program with another backend: every operator passes, small, forward and backward."""
    out = str(tmp_path / "x.jsonl")
    for op in ok.OPERATORS:
        assert gpu_smoke.run(op, "cpu", out, ["bfloat16"], device="cpu", paper=False) == 0
    assert (
        gpu_smoke.run(
            "upsample_argmax", "cpu", out, ["float32", "float64"], device="cpu", paper=False
        )
        == 0
    )
    rows = lines.finished(lines.read(out)[0])
    assert {row["op"] for row in rows.values()} == set(ok.OPERATORS)
    assert all("error" in row or "labels_differ" in row for row in rows.values())
    assert gpu_smoke.run("upsample_argmax", "cpu", out, ["float32"], device="cpu", paper=False) == 0
    assert len(lines.read(out)[0]) == 2 * len(rows), "what is there is not run again"


def test_smoke_notices_a_wrong_gradient_a_nan_and_wrong_labels(tmp_path, monkeypatch):
    call = next(gpu_small.patch_text_similarity(gpu_small.Draw("cpu"), False))
    right = gpu_small.outputs(call, gpu_small.cast(call, torch.float32, torch.float32))

    def changed(i, x):
        return [x if j == i else y for j, y in enumerate(right[0])], right[1]

    floor = 1e-5
    assert "failed" not in gpu_smoke.judge(right, right, right, floor)
    assert (
        "tensor 1"
        in gpu_smoke.judge(changed(1, right[0][1] * 1.00005), right, right, floor)["failed"]
    )
    assert (
        "not finite" in gpu_smoke.judge(changed(0, right[0][0] / 0), right, right, floor)["failed"]
    )
    labels = torch.arange(3000) % 7
    assert "failed" not in gpu_smoke.judge(([], [labels]), ([], [labels]), ([], [labels]), floor)
    assert (
        "labels"
        in gpu_smoke.judge(([], [labels.roll(1)]), ([], [labels]), ([], [labels]), floor)["failed"]
    )


def test_an_error_in_one_operator_stops_no_other(tmp_path, monkeypatch):
    def raising(*_, **__):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(ok, "upsample_argmax", raising)
    out = str(tmp_path / "x.jsonl")
    assert gpu_smoke.run("upsample_argmax", "cpu", out, ["float32", "float16"], device="cpu") == 1
    rows = lines.finished(lines.read(out)[0])
    assert len(rows) == 4 and all(
        row["failed"] == "RuntimeError: no such kernel" for row in rows.values()
    )


def test_sanitizer_watches_every_kernel_of_ours():
    """The substrings given to it are in the name of every kernel."""
    for path in ROOT.glob("ovseg_kernels/triton/*.py"):
        for kernel in re.findall(r"def (\w+_kernel)\(", path.read_text()):
            assert any(name in kernel for name in gpu_jobs.TRITON_KERNELS), kernel
    for path in [*ROOT.glob("csrc/*/*.cu"), *ROOT.glob("csrc/*/*.cuh")]:
        text = path.read_text()
        first = text.find("__global__")
        assert first < 0 or 0 <= text.find("namespace ovseg {") < first, path
    assert gpu_jobs.ours("void ovseg::<unnamed>::patch_text_fwd_kernel<float>(Params)")
    assert gpu_jobs.ours("center_assignment_fwd_pool_kernel")
    assert not gpu_jobs.ours(
        "void at::native::vectorized_elementwise_kernel<4, FillFunctor<float>>"
    )


def test_sanitizer_commands():
    jobs = gpu_jobs.sanitize("/usr/bin/compute-sanitizer", no_triton=False)
    on_cuda, on_triton = (
        sum(gpu_jobs.has(op, backend) for op in ok.OPERATORS) for backend in ("cuda", "triton")
    )
    assert len(jobs) == len({job.name for job in jobs}) == 4 * (on_cuda + on_triton)
    assert {job.name.split()[0] for job in jobs[: on_cuda + on_triton]} == {"memcheck"}
    for job in jobs:
        tool, op, backend = job.name.split()
        assert job.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" and job.limit <= 75
        assert ("kns=ovseg" in job.command) == (backend == "cuda" and tool != "initcheck")
        assert ("--report-api-errors" in job.command) == (tool == "memcheck")
        assert job.command[job.command.index("scripts/gpu_small.py") + 1 :][:2] == [op, backend]
    assert len(gpu_jobs.sanitize("x", no_triton=True)) == 4 * on_cuda


CLEAN = "center_assignment cuda float32 hard\n========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
FOUND = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void ovseg::<unnamed>::center_assignment_fwd_kernel<float>(CenterParams)+0x90
========= ERROR SUMMARY: 1 error
"""
ELSEWHERE = FOUND.replace(
    "ovseg::<unnamed>::center_assignment_fwd_kernel", "at::native::copy_kernel"
)


@pytest.mark.parametrize(
    "tool,status,output,reason,expected",
    [
        ("memcheck", 0, CLEAN, "", ""),
        ("memcheck", 9, FOUND, "", "center_assignment_fwd_kernel"),
        ("initcheck", 9, FOUND, "", "Invalid __global__ read"),
        ("initcheck", 9, ELSEWHERE, "", ""),
        ("memcheck", 9, ELSEWHERE, "", "Invalid"),
        ("memcheck", 1, "Traceback\nRuntimeError: no kernel\n", "", "RuntimeError: no kernel"),
        ("memcheck", 0, "", "", "no summary"),
        ("racecheck", -9, CLEAN, "ended by its limit of 75 s", "limit"),
        ("racecheck", None, "", "not reached: the time was spent", "not reached"),
    ],
)
def test_what_the_sanitizer_said(tool, status, output, reason, expected):
    row = gpu_jobs.sanitized(Outcome(f"{tool} center_assignment cuda", status, 3.0, reason, output))
    assert (expected in row["failed"]) if expected else ("failed" not in row), row


def test_lines_survive_a_cut_and_two_writers(tmp_path):
    path = tmp_path / "x"
    first = lines.Lines(path, worker="a")
    first.write({"key": "one"})
    with open(path, "ab") as file:
        file.write(b'{"key": "tw')
    second = lines.Lines(path, worker="b")
    second.start("three")
    first.write({"key": "four"})
    rows, cut = lines.read(path)
    assert (
        cut == 1
        and [row.get("key") for row in rows] == ["one", None, "four"]
        and list(lines.unfinished(rows)) == ["three"]
    )


def test_what_libraries_say_they_were_built_from(tmp_path, monkeypatch):
    package = tmp_path / "ovseg_kernels"
    for folder in (package, tmp_path / "csrc" / "op"):
        folder.mkdir(parents=True)
    (tmp_path / "CMakeLists.txt").write_text("project(x)")
    source = tmp_path / "csrc" / "op" / "op_cuda.cu"
    source.write_text("kernel")
    monkeypatch.setattr(_build, "FOLDER", package)
    assert _build.stale() == {"_C_cpu.so": "not built", "_C_cuda.so": "not built"}
    for name in _build.LIBRARIES:
        (package / name).write_bytes(b"machine code")
    assert "unknown" in _build.stale()["_C_cuda.so"] and _build.cuda_archs() == []
    info = {
        "source": _build.source_hash(tmp_path),
        "libraries": _build.records(package),
        "cuda_archs": ["90a"],
    }
    (package / "build_info.json").write_text(json.dumps(info))
    assert _build.stale() == {} and _build.cuda_archs() == ["90a"]
    source.write_text("another kernel")
    assert "built from other sources" in _build.stale()["_C_cuda.so"]
    source.write_text("kernel")
    (package / "_C_cuda.so").write_bytes(b"replaced by hand, of another size")
    assert (
        "another file" in _build.stale()["_C_cuda.so"]
        and _build.cuda_archs() == []
        and "_C_cpu.so" not in _build.stale()
    )
    (tmp_path / "csrc" / "op" / "op_cuda.cu").unlink()
    assert _build.source_hash(tmp_path) == ""  # an installed package: nothing to compare with


def test_info_accepts_libraries_of_another_machine_only_if_they_fit(monkeypatch):
    from ovseg_kernels import info

    monkeypatch.setattr(_build, "stale", lambda: {})
    monkeypatch.setattr(_build, "cuda_archs", lambda: ["80", "90a"])
    monkeypatch.setattr(info.lib.CUDA, "loaded", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, fits in (((9, 0), True), ((8, 6), True), ((10, 0), False)):
        monkeypatch.setattr(
            torch.cuda, "get_device_capability", lambda *_, capability=capability: capability
        )
        assert (info.problems() == []) == fits
    monkeypatch.setattr(_build, "stale", lambda: {"_C_cuda.so": "built from other sources"})
    assert info.problems() == ["_C_cuda.so: built from other sources"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in info.problems()[-1]


def test_a_closed_screen_ends_nothing(tmp_path, monkeypatch):
    """`gpu_check.sh ... | head`, or a remote shell that is gone."""

    def closed(*_, **__):
        raise BrokenPipeError

    monkeypatch.setattr("builtins.print", closed)
    dry = DryRun(tmp_path)
    dry.place.say = gpu_check.say
    gpu_check.main("smoke", dry.place)
    assert (tmp_path / "2026-01-01-smoke.jsonl").stat().st_size > 0
